"""Settings of the daemon: what there is, what is allowed, and where each value in force came from.

Four sources, the later wins: the default, the TOML file, the environment, the command line. The sections below are
the whole list; `daemon/lattica.example.toml` is the manual and a test keeps it equal to them. An unknown key or a value
out of range is refused with one line that names the key, the value and what is allowed: a daemon that starts with a
setting silently ignored is worse than one that does not start.

The environment variable of `section.key` is `LATTICA_SECTION_KEY`; lists are separated by commas.
"""

from __future__ import annotations

import dataclasses
import os
import textwrap
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, TypeVar

from lattica.errors import ConfigError

T = TypeVar("T")


@dataclass(frozen=True)
class Rule:
    """How one setting is checked: `check` returns the value to use or raises ValueError."""

    allowed: str
    check: Callable[[object], object]
    from_text: Callable[[str], object]


# -- the rules ------------------------------------------------------------------------------------------------------
def _number(low: float, high: float) -> Rule:
    def check(value: object) -> object:
        if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
            raise ValueError
        return float(value)

    return Rule(f"a number from {low:g} to {high:g}", check, float)


def _choice(*names: str) -> Rule:
    def check(value: object) -> object:
        if value not in names:
            raise ValueError
        return value

    return Rule("one of " + ", ".join(names), check, str)


def _text(allowed: str, accept: Callable[[str], None] = lambda _: None) -> Rule:
    def check(value: object) -> object:
        if not isinstance(value, str):
            raise ValueError
        accept(value)
        return value

    return Rule(allowed, check, str)


def _addresses(allowed: str, accept: Callable[[Any], None]) -> Rule:
    """A list of multiaddrs. `accept` raises ValueError with the reason for one that does not fit."""

    def check(value: object) -> object:
        from lattica_protocols.multiaddr import Multiaddr

        if not isinstance(value, list | tuple):
            raise ValueError
        for text in value:
            if not isinstance(text, str):
                raise ValueError
            accept(Multiaddr.parse(text))
        return tuple(value)

    return Rule(allowed, check, lambda text: [part.strip() for part in text.split(",") if part.strip()])


def _servers(allowed: str) -> Rule:
    """A list of HOST:PORT."""

    def check(value: object) -> object:
        if not isinstance(value, list | tuple):
            raise ValueError
        for text in value:
            if not isinstance(text, str) or not text:
                raise ValueError
            _accept_host_port(text)
        return tuple(value)

    return Rule(allowed, check, lambda text: [part.strip() for part in text.split(",") if part.strip()])


def _accept_listen(addr: Any) -> None:
    if addr.host_port() is None:
        raise ValueError(f"{addr} names no TCP or UDP port")


def _accept_bootstrap(addr: Any) -> None:
    if addr.peer_id() is None:
        raise ValueError(f"{addr} does not end in /p2p/PEER")


def _accept_anything(addr: Any) -> None:
    """Announced addresses are taken as they are: only the operator knows what stands before the machine."""


def _accept_host_port(value: str) -> None:
    if value:
        host, colon, port = value.rpartition(":")
        if not (host and colon and port.isdigit() and int(port) < 65536):
            raise ValueError


def _accept_protocol(value: str) -> None:
    if not value.startswith("/") or len(value) > 128:
        raise ValueError


def _setting(default: T, rule: Rule, help: str) -> T:
    value: T = field(default=default, metadata={"rule": rule, "help": help})
    return value


# -- the sections ---------------------------------------------------------------------------------------------------
DEFAULT_PORT = 4101
"""As in `lattica.node`, which is not imported here: showing settings should not load the whole node."""

DEFAULT_LISTEN = (
    f"/ip4/0.0.0.0/tcp/{DEFAULT_PORT}",
    f"/ip6/::/tcp/{DEFAULT_PORT}",
    f"/ip4/0.0.0.0/udp/{DEFAULT_PORT}/quic-v1",
    f"/ip6/::/udp/{DEFAULT_PORT}/quic-v1",
)


@dataclass(frozen=True)
class ListenSettings:
    """Where the daemon accepts connections."""

    addrs: tuple[str, ...] = _setting(
        DEFAULT_LISTEN,
        _addresses("a list of addresses such as /ip4/0.0.0.0/tcp/4101 or /ip6/::/udp/4101/quic-v1", _accept_listen),
        "addresses to listen on; port 0 takes a free one. A default port that is taken is replaced by a free one",
    )
    announce: tuple[str, ...] = _setting(
        (),
        _addresses("a list of multiaddrs without /p2p", _accept_anything),
        "addresses to tell other peers instead of those listened on, e.g. of a port forwarded by hand",
    )
    port_mapping: str = _setting(
        "on",
        _choice("on", "off"),
        "on asks the router (PCP, NAT-PMP, UPnP) to lead our ports to this machine where its own address is private; "
        "the mappings end with the daemon",
    )


@dataclass(frozen=True)
class DiscoverySettings:
    """How other peers and content are found."""

    bootstrap: tuple[str, ...] = _setting(
        (),
        _addresses("a list of multiaddrs that end in /p2p/PEER", _accept_bootstrap),
        "peers to connect to at the start; the rest of the network is found through them",
    )
    mode: str = _setting(
        "auto",
        _choice("auto", "server", "client"),
        "server answers other peers' lookups and stores records; client only asks; auto decides by reachability",
    )
    protocol: str = _setting(
        "/lattica/kad/1.0.0",
        _text("a protocol id that starts with /", _accept_protocol),
        "protocol id of the Kademlia network to take part in",
    )
    mdns: str = _setting(
        "on",
        _choice("on", "off"),
        "on finds peers in the local network, and is found by them, without any bootstrap peer (multicast DNS)",
    )
    stun_servers: tuple[str, ...] = _setting(
        (),
        _servers("a list of HOST:PORT"),
        "STUN servers to ask how others see us, besides connected peers, which answer STUN, too. What they say is "
        "trusted: one of your own or one you would believe",
    )


@dataclass(frozen=True)
class RelaySettings:
    """Connections of peers that cannot reach each other, carried by a third."""

    serve: str = _setting(
        "off",
        _choice("off", "on"),
        "on carries other peers' connections, of use at a machine that others reach. What goes through is encrypted "
        "from end to end; every circuit gets the same share of the bandwidth",
    )
    max_mb_per_second: float = _setting(
        0.0, _number(0, 100_000), "megabytes per second for all circuits together, both ways added; 0 for no cap"
    )
    use: str = _setting(
        "auto",
        _choice("auto", "always", "never"),
        "hold places at relays so that others reach us there; auto does so while we are behind a NAT",
    )
    relays: tuple[str, ...] = _setting(
        (),
        _addresses("a list of multiaddrs that end in /p2p/PEER", _accept_bootstrap),
        "relays to ask first; others are found among connected peers and in the DHT",
    )
    punch: str = _setting(
        "on", _choice("on", "off"), "on looks for a direct path to every peer that is connected over a relay"
    )


@dataclass(frozen=True)
class PeerSettings:
    """Who may connect. Single rules are set with `lattica peer allow` and `lattica peer block`."""

    default: str = _setting(
        "allow",
        _choice("allow", "block"),
        "what happens to a peer no rule speaks of; block makes the allow rules the guest list",
    )


@dataclass(frozen=True)
class LogSettings:
    """What is logged on standard error."""

    level: str = _setting("info", _choice("debug", "info", "warning", "error"), "least severe level that is logged")
    format: str = _setting("text", _choice("text", "json"), "text is key=value, json one object a line")


@dataclass(frozen=True)
class MetricsSettings:
    """A Prometheus endpoint."""

    listen: str = _setting(
        "",
        _text("HOST:PORT, or empty for off", _accept_host_port),
        "serve metrics at http://HOST:PORT/metrics; it asks for no password, so keep it on 127.0.0.1. "
        "Needs the prometheus-client package",
    )


@dataclass(frozen=True)
class DaemonSettings:
    """The process."""

    drain_seconds: float = _setting(
        10.0, _number(0, 600), "after SIGTERM, seconds that calls in flight get to finish before they are cancelled"
    )


@dataclass(frozen=True)
class Settings:
    """All settings, and `sources`: for each `section.key`, where its value came from."""

    listen: ListenSettings = ListenSettings()
    discovery: DiscoverySettings = DiscoverySettings()
    relay: RelaySettings = RelaySettings()
    peers: PeerSettings = PeerSettings()
    log: LogSettings = LogSettings()
    metrics: MetricsSettings = MetricsSettings()
    daemon: DaemonSettings = DaemonSettings()
    sources: Mapping[str, str] = field(default_factory=dict)

    def source(self, key: str) -> str:
        """`default`, `file PATH`, `environment NAME` or `flag --NAME`."""
        return self.sources.get(key, "default")

    def describe(self) -> dict[str, dict[str, object]]:
        """For `lattica config show`: `{key: {value, source, allowed, help}}`."""
        out: dict[str, dict[str, object]] = {}
        for key, (rule, help) in _RULES.items():
            section, name = key.split(".")
            value = getattr(getattr(self, section), name)
            shown = list(value) if isinstance(value, tuple) else value
            out[key] = {"value": shown, "source": self.source(key), "allowed": rule.allowed, "help": help}
        return out


def _rules() -> dict[str, tuple[Rule, str]]:
    out: dict[str, tuple[Rule, str]] = {}
    for section in fields(Settings):
        if section.name == "sources":
            continue
        for item in fields(getattr(Settings(), section.name)):
            out[f"{section.name}.{item.name}"] = (item.metadata["rule"], item.metadata["help"])
    return out


_RULES = _rules()


# -- reading them -----------------------------------------------------------------------------------------------------
def load(
    file: Path | None,
    *,
    environ: Mapping[str, str] = os.environ,
    flags: Mapping[str, tuple[str, object]] | None = None,
) -> Settings:
    """Settings in force.

    `file` may be None; when it is given it must exist. `flags` maps `section.key` to (flag name, value). Raises
    `ConfigError` with one line.
    """
    chosen: dict[str, tuple[object, str]] = {}
    if file is not None:
        for key, value in _read_file(file).items():
            chosen[key] = (_checked(key, value, f"file {file}"), f"file {file}")
    for key, (name, text) in _read_environment(environ).items():
        rule = _RULES[key][0]
        try:
            value = rule.from_text(text)
        except ValueError:
            raise ConfigError(_refusal(key, text, f"environment {name}", "")) from None
        chosen[key] = (_checked(key, value, f"environment {name}"), f"environment {name}")
    for key, (name, value) in (flags or {}).items():
        chosen[key] = (_checked(key, value, f"flag {name}"), f"flag {name}")
    return _assemble(chosen)


def _assemble(chosen: Mapping[str, tuple[object, str]]) -> Settings:
    defaults = Settings()
    sections: dict[str, Any] = {}
    for key, (value, _) in chosen.items():
        section, name = key.split(".")
        current = sections.get(section, getattr(defaults, section))
        sections[section] = dataclasses.replace(current, **{name: value})
    return Settings(**sections, sources={key: source for key, (_, source) in chosen.items()})


def _read_file(file: Path) -> dict[str, object]:
    try:
        table = tomllib.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"no settings file {file}: `lattica config init` writes one") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read the settings file {file}: {error}") from None
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{file} is not TOML: {error}") from None
    out: dict[str, object] = {}
    for section, content in table.items():
        if not isinstance(content, dict):
            raise ConfigError(f"file {file}: {section} = {content!r} stands outside a [section]; {_known(section)}")
        for name, value in content.items():
            key = f"{section}.{name}"
            if key not in _RULES:
                raise ConfigError(f"file {file}: unknown setting {key} = {value!r}; {_known(section)}")
            out[key] = value
        if not content and not any(key.startswith(section + ".") for key in _RULES):
            raise ConfigError(f"file {file}: unknown section [{section}]; {_known(section)}")
    return out


def _known(section: str) -> str:
    names = [key for key in _RULES if key.startswith(section + ".")]
    if names:
        return f"[{section}] has " + ", ".join(key.partition(".")[2] for key in names)
    sections = dict.fromkeys(key.partition(".")[0] for key in _RULES)
    return "the sections are " + ", ".join(sections)


def _read_environment(environ: Mapping[str, str]) -> dict[str, tuple[str, str]]:
    names = {"LATTICA_" + key.upper().replace(".", "_"): key for key in _RULES}
    prefixes = tuple({"LATTICA_" + key.partition(".")[0].upper() + "_" for key in _RULES})
    out: dict[str, tuple[str, str]] = {}
    for name, text in environ.items():
        if name in names:
            out[names[name]] = (name, text)
        elif name.startswith(prefixes):
            raise ConfigError(f"environment {name}={text!r}: no such setting; known are {', '.join(sorted(names))}")
    return out


def _checked(key: str, value: object, source: str) -> object:
    try:
        return _RULES[key][0].check(value)
    except ValueError as error:
        raise ConfigError(_refusal(key, value, source, str(error))) from None


def _refusal(key: str, value: object, source: str, reason: str) -> str:
    because = f" ({reason})" if reason else ""
    return f"{source}: {key} = {value!r} is not allowed{because}: it must be {_RULES[key][0].allowed}"


# -- writing the manual -----------------------------------------------------------------------------------------------
def example_toml() -> str:
    """A settings file with every setting at its default, commented with effect and range. Parses to `Settings()`."""
    lines = [
        "# Settings of latticad with their defaults: effect, then what is allowed. Copy to HOME/config.toml and change",
        "# what you need; `lattica config check FILE` says whether it is right, `lattica config show` what is in force",
        "# and where it came from. Every setting can also be given in the environment as LATTICA_SECTION_KEY.",
    ]
    defaults = Settings()
    last = ""
    for key, (rule, help) in _RULES.items():
        section, name = key.split(".")
        if section != last:
            doc = (type(getattr(defaults, section)).__doc__ or "").strip().splitlines()[0]
            lines += ["", f"[{section}]", f"# {doc}"]
            last = section
        value = getattr(getattr(defaults, section), name)
        lines += ["", *textwrap.wrap(help, 116, initial_indent="# ", subsequent_indent="# ")]
        lines.append(f"# Allowed: {rule.allowed}.")
        lines.append(f"{name} = {_toml_value(value)}")
    return "\n".join(lines) + "\n"


def _toml_value(value: object) -> str:
    if isinstance(value, tuple):
        if not value:
            return "[]"
        return "[\n" + "".join(f'    "{item}",\n' for item in value) + "]"
    if isinstance(value, str):
        return f'"{value}"'
    return str(value)
