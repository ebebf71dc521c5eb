"""The file with the private key: made once, for its user alone, and refused when it is damaged."""

import os
import stat
from pathlib import Path

import pytest

from lattica.errors import ConfigError
from lattica.identity_file import load_or_create_key


def test_creates_once_with_mode_0600_and_loads_the_same_key(tmp_path: Path) -> None:
    path = tmp_path / "home" / "identity.key"
    created = load_or_create_key(path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert path.read_bytes() == created.to_protobuf()
    assert load_or_create_key(path).seed == created.seed
    assert [entry.name for entry in path.parent.iterdir()] == ["identity.key"]


def test_a_key_that_appears_meanwhile_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "identity.key"
    real_link = os.link

    def link_second(source: Path, target: Path) -> None:
        monkeypatch.setattr(os, "link", real_link)
        load_or_create_key(path)
        real_link(source, target)

    monkeypatch.setattr(os, "link", link_second)
    assert load_or_create_key(path).to_protobuf() == path.read_bytes()
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o620, 0o660])
def test_refuses_a_file_open_to_others(tmp_path: Path, mode: int) -> None:
    path = tmp_path / "identity.key"
    load_or_create_key(path)
    path.chmod(mode)
    with pytest.raises(ConfigError, match=rf"mode {mode:04o}.*chmod 600"):
        load_or_create_key(path)


@pytest.mark.parametrize("damage", [b"", b"garbage", b"x" * 5000])
def test_refuses_a_damaged_file(tmp_path: Path, damage: bytes) -> None:
    path = tmp_path / "identity.key"
    path.write_bytes(damage)
    path.chmod(0o600)
    with pytest.raises(ConfigError, match="is damaged") as caught:
        load_or_create_key(path)
    assert "\n" not in str(caught.value)
    assert path.read_bytes() == damage


def test_refuses_a_flipped_bit(tmp_path: Path) -> None:
    path = tmp_path / "identity.key"
    data = bytearray(load_or_create_key(path).to_protobuf())
    data[10] ^= 1
    path.write_bytes(data)
    with pytest.raises(ConfigError, match="does not fit"):
        load_or_create_key(path)


def test_says_what_cannot_be_created(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(ConfigError, match=r"identity file .*: Not a directory"):
        load_or_create_key(tmp_path / "file" / "identity.key")
    with pytest.raises(ConfigError, match="Is a directory"):
        load_or_create_key(tmp_path)
