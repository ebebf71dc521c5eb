"""These tests need namespaces of their own: `make nat` (tests/nat/run.py) makes them and runs them there."""

from __future__ import annotations

import os

import pytest


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if os.environ.get("LATTICA_NAT_LAB") != "1":
        for item in items:
            if "/nat/" in str(item.path):
                item.add_marker(pytest.mark.skip(reason="a lab of namespaces: run `make nat`"))
