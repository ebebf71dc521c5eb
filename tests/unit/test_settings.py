"""Settings: four sources, each value with its origin, and one clear line for whatever is wrong."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest

from lattica.errors import ConfigError
from lattica_daemon.settings import DEFAULT_LISTEN, Settings, example_toml, load

ROOT = Path(__file__).resolve().parents[2]
PEER = "12D3KooWJrDiMu6uEsp5FSmiAPyNqCwiPdNQFVdWaMaP2fXYgqoF"


def write(tmp_path: Path, text: str) -> Path:
    file = tmp_path / "config.toml"
    file.write_text(text)
    return file


def test_the_default_is_used_without_any_source() -> None:
    settings = load(None, environ={})
    assert settings == Settings()
    assert settings.source("log.level") == "default"


def test_file_then_environment_then_flag_wins(tmp_path: Path) -> None:
    file = write(tmp_path, "[log]\nlevel = 'debug'\nformat = 'json'\n[daemon]\ndrain_seconds = 3\n")
    settings = load(
        file,
        environ={"LATTICA_LOG_LEVEL": "error", "LATTICA_LOG_FORMAT": "text", "PATH": "/bin"},
        flags={"log.level": ("--log-level", "warning")},
    )
    assert (settings.log.level, settings.log.format, settings.daemon.drain_seconds) == ("warning", "text", 3.0)
    assert settings.source("log.level") == "flag --log-level"
    assert settings.source("log.format") == "environment LATTICA_LOG_FORMAT"
    assert settings.source("daemon.drain_seconds") == f"file {file}"
    assert settings.source("peers.default") == "default"


def test_lists_come_from_the_environment_with_commas() -> None:
    settings = load(None, environ={"LATTICA_LISTEN_ADDRS": "/ip4/127.0.0.1/tcp/0, /ip4/127.0.0.1/udp/0/quic-v1"})
    assert settings.listen.addrs == ("/ip4/127.0.0.1/tcp/0", "/ip4/127.0.0.1/udp/0/quic-v1")


def test_stun_servers_are_named_with_their_port(tmp_path: Path) -> None:
    file = write(tmp_path, "[discovery]\nstun_servers = ['stun.example.org:3478', '192.0.2.1:3478']\n")
    assert load(file, environ={}).discovery.stun_servers == ("stun.example.org:3478", "192.0.2.1:3478")
    for wrong in ("['stun.example.org']", "['stun:x:99999']", "'a:1'", "['']"):
        with pytest.raises(ConfigError, match=r"discovery\.stun_servers.*HOST:PORT"):
            load(write(tmp_path, f"[discovery]\nstun_servers = {wrong}\n"), environ={})


def test_numbers_come_from_the_environment_as_text() -> None:
    assert load(None, environ={"LATTICA_DAEMON_DRAIN_SECONDS": "2.5"}).daemon.drain_seconds == 2.5


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[log]\nlevel = 'loud'\n", ["log.level", "'loud'", "one of debug, info, warning, error"]),
        ("[log]\nlevle = 'info'\n", ["unknown setting log.levle", "level, format"]),
        ("[logs]\nlevel = 'info'\n", ["logs.level", "the sections are listen"]),
        ("[logs]\n", ["unknown section [logs]"]),
        ("level = 'info'\n", ["level = 'info'", "outside a [section]"]),
        ("[daemon]\ndrain_seconds = -1\n", ["daemon.drain_seconds", "-1", "from 0 to 600"]),
        ("[daemon]\ndrain_seconds = true\n", ["daemon.drain_seconds", "True"]),
        ("[daemon]\ndrain_seconds = nan\n", ["daemon.drain_seconds", "nan"]),
        ("[listen]\naddrs = '/ip4/1.2.3.4/tcp/1'\n", ["listen.addrs", "a list of addresses"]),
        ("[listen]\naddrs = ['/ip4/1.2.3/tcp/1']\n", ["listen.addrs", "1.2.3"]),
        ("[listen]\naddrs = ['/ip4/1.2.3.4']\n", ["listen.addrs", "no TCP or UDP port"]),
        ("[discovery]\nbootstrap = ['/ip4/1.2.3.4/tcp/1']\n", ["discovery.bootstrap", "does not end in /p2p/PEER"]),
        ("[discovery]\nprotocol = 'kad'\n", ["discovery.protocol", "'kad'"]),
        ("[metrics]\nlisten = 'localhost'\n", ["metrics.listen", "HOST:PORT"]),
        ("[log\n", ["is not TOML"]),
    ],
)
def test_a_wrong_file_is_refused_in_one_line(tmp_path: Path, text: str, words: list[str]) -> None:
    file = write(tmp_path, text)
    with pytest.raises(ConfigError) as caught:
        load(file, environ={})
    message = str(caught.value)
    assert "\n" not in message
    for word in [*words, str(file)]:
        assert word in message


@pytest.mark.parametrize("name", ["LATTICA_LOG_LEVLE", "LATTICA_LISTEN_ADDR"])
def test_a_misspelt_variable_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match=name):
        load(None, environ={name: "x"})


def test_other_variables_are_left_alone() -> None:
    load(None, environ={"LATTICA_HOME": "/x", "LATTICA_WORKER_THING": "1"})


def test_a_wrong_variable_is_named() -> None:
    with pytest.raises(ConfigError, match=r"environment LATTICA_DAEMON_DRAIN_SECONDS.*'soon'.*from 0 to 600"):
        load(None, environ={"LATTICA_DAEMON_DRAIN_SECONDS": "soon"})


def test_a_wrong_flag_is_named() -> None:
    with pytest.raises(ConfigError, match=r"flag --listen: listen\.addrs"):
        load(None, environ={}, flags={"listen.addrs": ("--listen", ["nowhere"])})


def test_a_missing_file_says_how_to_make_one(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="lattica config init"):
        load(tmp_path / "none.toml", environ={})


def test_a_file_that_is_no_text_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "config.toml"
    file.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="cannot read"):
        load(file, environ={})


def test_a_bootstrap_address_is_accepted() -> None:
    addr = f"/ip4/192.0.2.1/tcp/4101/p2p/{PEER}"
    assert load(None, environ={"LATTICA_DISCOVERY_BOOTSTRAP": addr}).discovery.bootstrap == (addr,)


def test_the_manual_has_every_setting_at_its_default() -> None:
    file = ROOT / "daemon" / "lattica.example.toml"
    assert file.read_text() == example_toml(), "write it again: python -m lattica_daemon --init-config"
    settings = load(file, environ={})
    for key, entry in Settings().describe().items():
        assert settings.describe()[key]["value"] == entry["value"]
        assert settings.source(key) == f"file {file}"
    assert all(isinstance(section, dict) for section in tomllib.loads(file.read_text()).values())


def test_the_default_addresses_are_those_of_an_embedded_node() -> None:
    from lattica import node

    assert DEFAULT_LISTEN == node.DEFAULT_LISTEN
    assert Settings().discovery.protocol == node.KAD_PROTOCOL
