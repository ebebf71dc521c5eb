"""The other implementations, installed once and started per test."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from install_peers import (
    OLD_RUST_LATTICA,
    RUST_LATTICA,
    install_js_libp2p,
    install_p2pd,
    install_py_libp2p,
    install_rust_lattica,
)


@pytest.fixture(scope="session")
def p2pd_binary() -> Path:
    return install_p2pd()


@pytest.fixture(scope="session", params=[RUST_LATTICA, OLD_RUST_LATTICA])
def rust_python(request: pytest.FixtureRequest) -> Path:
    return install_rust_lattica(request.param)


@pytest.fixture(scope="session")
def js_home() -> Path:
    if shutil.which("npm") is None:
        pytest.skip("npm is missing (Debian: apt install npm)")
    return install_js_libp2p()


@pytest.fixture(scope="session")
def py_libp2p_python() -> Path:
    return install_py_libp2p()
