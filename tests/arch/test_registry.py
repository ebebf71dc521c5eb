"""Every protocol id and number of ours stands in the registry, `protocols/README.md`."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from lattica_protocols.cid import BLOB_MANIFEST
from lattica_protocols.noise import CIPHERS_FIELD
from lattica_protocols.replica import SPACE_CODEC

ROOT = Path(__file__).parents[2]
REGISTRY = (ROOT / "protocols" / "README.md").read_text()
ID = re.compile(r"[\"'](/(?:lattica|libp2p|ipfs|multistream|yamux|noise)(?:/[a-z0-9.-]+)*)[\"']")


def ids_in_the_code() -> list[str]:
    found = set()
    for package in ("protocols", "lattica", "daemon"):
        for path in (ROOT / package).rglob("*.py"):
            found |= {name for name in ID.findall(path.read_text()) if re.search(r"/\d|^/noise$", name)}
    return sorted(found)


@pytest.mark.parametrize("name", ids_in_the_code())
def test_a_protocol_id_is_registered(name: str) -> None:
    assert f"`{name}`" in REGISTRY


def test_ids_are_found() -> None:
    wanted = {"/lattica/rpc/1", "/lattica/punch/early/1", "/noise", "/libp2p/autonat/2/dial-back"}
    assert wanted <= set(ids_in_the_code())


@pytest.mark.parametrize("number", [BLOB_MANIFEST, SPACE_CODEC])
def test_a_number_is_registered(number: int) -> None:
    assert f"`{number:#06x}`" in REGISTRY


def test_the_extension_of_noise_is_registered() -> None:
    assert f"`{CIPHERS_FIELD}`" in REGISTRY
