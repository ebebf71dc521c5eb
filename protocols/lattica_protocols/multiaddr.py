"""Multiaddrs: self-describing network addresses (https://github.com/multiformats/multiaddr).

Text: `/name/value` repeated; some names have no value. Binary: for each part `uvarint(code)` and then either a value of
fixed size or `uvarint(length) || value`. Examples:

    /ip4/1.2.3.4/udp/9/quic-v1/p2p/ID       04 01020304 | 91 02 0009 | cd 03 | a5 03 26 0024...
    /ip4/1.2.3.4/tcp/9/p2p/ID
    <relay addr>/p2p/RELAY/p2p-circuit/p2p/TARGET

Parts from the network with an unknown code are refused as a whole: the caller skips such an address, for it could not
dial it anyway. `PART_TABLE` has the codes; `/memory/NUMBER` (as in rust-libp2p) is for the in-memory network of tests.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, total_ordering
from typing import Literal, TypeAlias

from lattica_protocols.base_encoding import decode_multibase, encode_multibase
from lattica_protocols.errors import RemoteProtocolError
from lattica_protocols.limits import MAX_MULTIADDR_BYTES, MAX_MULTIADDR_PARTS, MAX_TEXT_BYTES
from lattica_protocols.multihash import Multihash
from lattica_protocols.peer_id import PeerId
from lattica_protocols.varint import decode_uvarint_untrusted, encode_uvarint

IpAddress: TypeAlias = ipaddress.IPv4Address | ipaddress.IPv6Address

_PARSED_ADDRESSES = 4096
"""Addresses kept parsed. A node sees the same few thousand again and again, in each Kademlia answer."""

_SHARED_SPACE = ipaddress.IPv4Network("100.64.0.0/10")
"""RFC 6598: between a carrier's NAT and its customers. Python calls it neither private nor global."""

_NAT64 = ipaddress.IPv6Network("64:ff9b::/96")
"""RFC 6052: an IPv4 address in the last 32 bits."""


# -- the values of the parts ----------------------------------------------------------------------------------
def _ip4_from_text(text: str) -> bytes:
    return ipaddress.IPv4Address(text).packed


def _ip4_to_text(value: bytes) -> str:
    return str(ipaddress.IPv4Address(value))


def _ip6_from_text(text: str) -> bytes:
    if "%" in text:
        raise ValueError(f"{text!r}: write the zone as /ip6zone/NAME before /ip6")
    return ipaddress.IPv6Address(text).packed


def _ip6_to_text(value: bytes) -> str:
    address = ipaddress.IPv6Address(value)
    # Python writes mapped addresses differently from version to version; Go and RFC 5952 write the IPv4 form.
    return f"::ffff:{address.ipv4_mapped}" if address.ipv4_mapped else str(address)


def _number_from_text(size: int) -> Callable[[str], bytes]:
    def parse(text: str) -> bytes:
        if not (text.isascii() and text.isdecimal() and len(text) <= 20 and int(text) < 1 << 8 * size):
            raise ValueError(f"{text!r} is not a number from 0 to {(1 << 8 * size) - 1}")
        return int(text).to_bytes(size, "big")

    return parse


def _number_to_text(value: bytes) -> str:
    return str(int.from_bytes(value, "big"))


def _name_from_text(text: str) -> bytes:
    if not text or not text.isprintable() or "/" in text or " " in text:
        raise ValueError(f"{text!r} is not a name")
    return text.encode()


def _name_to_text(value: bytes) -> str:
    text = value.decode()
    _name_from_text(text)
    return text


def _peer_from_text(text: str) -> bytes:
    return PeerId.parse(text).to_bytes()


def _peer_to_text(value: bytes) -> str:
    return str(PeerId.from_bytes_untrusted(value))


def _hash_from_text(text: str) -> bytes:
    return Multihash.from_bytes_untrusted(decode_multibase(text)).to_bytes()


def _hash_to_text(value: bytes) -> str:
    Multihash.from_bytes_untrusted(value)
    return encode_multibase(value, "u")


def _path_from_text(text: str) -> bytes:
    if len(text) < 2 or not text.startswith("/") or text.endswith("/") or not text.isprintable():
        raise ValueError(f"{text!r} is not an absolute path")
    return text.encode()


def _path_to_text(value: bytes) -> str:
    text = value.decode()
    _path_from_text(text)
    return text


@dataclass(frozen=True, slots=True)
class Part:
    """One protocol of the multicodec table. `size` in bytes: 0 no value, None length-prefixed."""

    code: int
    name: str
    size: int | None = 0
    from_text: Callable[[str], bytes] | None = None
    to_text: Callable[[bytes], str] | None = None
    is_path: bool = False
    """The value is the whole rest of the text."""


PART_TABLE = (
    Part(4, "ip4", 4, _ip4_from_text, _ip4_to_text),
    Part(6, "tcp", 2, _number_from_text(2), _number_to_text),
    Part(41, "ip6", 16, _ip6_from_text, _ip6_to_text),
    Part(42, "ip6zone", None, _name_from_text, _name_to_text),
    Part(53, "dns", None, _name_from_text, _name_to_text),
    Part(54, "dns4", None, _name_from_text, _name_to_text),
    Part(55, "dns6", None, _name_from_text, _name_to_text),
    Part(56, "dnsaddr", None, _name_from_text, _name_to_text),
    Part(273, "udp", 2, _number_from_text(2), _number_to_text),
    Part(280, "webrtc-direct"),
    Part(281, "webrtc"),
    Part(290, "p2p-circuit"),
    Part(400, "unix", None, _path_from_text, _path_to_text, is_path=True),
    Part(421, "p2p", None, _peer_from_text, _peer_to_text),
    Part(448, "tls"),
    Part(449, "sni", None, _name_from_text, _name_to_text),
    Part(454, "noise"),
    Part(460, "quic"),
    Part(461, "quic-v1"),
    Part(465, "webtransport"),
    Part(466, "certhash", None, _hash_from_text, _hash_to_text),
    Part(477, "ws"),
    Part(478, "wss"),
    Part(480, "http"),
    Part(777, "memory", 8, _number_from_text(8), _number_to_text),
)
_BY_CODE = {part.code: part for part in PART_TABLE}
_BY_NAME = {part.name: part for part in PART_TABLE} | {"ipfs": _BY_CODE[421]}
_HOST_NAMES = frozenset({"ip4", "ip6", "dns", "dns4", "dns6"})

Parts: TypeAlias = tuple[tuple[Part, bytes], ...]


# -- the address -------------------------------------------------------------------------------------------------
@total_ordering
class Multiaddr:
    """An immutable address. Equal, hashable and ordered by its binary form."""

    __slots__ = ("_bytes", "_parts", "_text")

    _bytes: bytes
    _parts: Parts
    _text: str

    def __init__(self, parts: Parts) -> None:
        """From checked parts; everybody else uses the class methods."""
        binary = b"".join(
            encode_uvarint(part.code) + (encode_uvarint(len(value)) if part.size is None else b"") + value
            for part, value in parts
        )
        if len(binary) > MAX_MULTIADDR_BYTES or len(parts) > MAX_MULTIADDR_PARTS:
            raise ValueError(f"address is over {MAX_MULTIADDR_BYTES} bytes or {MAX_MULTIADDR_PARTS} parts")
        object.__setattr__(self, "_parts", parts)
        object.__setattr__(self, "_bytes", binary)
        object.__setattr__(self, "_text", "".join(_part_to_text(part, value) for part, value in parts) or "/")

    # -- making one ------------------------------------------------------------------------------------------
    @classmethod
    def parse(cls, text: str) -> Multiaddr:
        """From text. `ValueError` with one line that names the part that is wrong."""
        return _parse(text)

    @classmethod
    def from_bytes_untrusted(cls, data: bytes) -> Multiaddr:
        """From the binary form. Unknown codes and malformed values are refused."""
        if len(data) > MAX_MULTIADDR_BYTES:
            raise RemoteProtocolError(f"address of {len(data)} bytes is over {MAX_MULTIADDR_BYTES}")
        return _from_bytes_untrusted(bytes(data))

    @classmethod
    def tcp(cls, host: str, port: int) -> Multiaddr:
        """`/ip4|ip6|dns/HOST/tcp/PORT`. `ValueError` for a bad host or port."""
        return cls((_host_part(host), (_BY_NAME["tcp"], _number_from_text(2)(str(port)))))

    @classmethod
    def quic(cls, host: str, port: int) -> Multiaddr:
        """`/ip4|ip6|dns/HOST/udp/PORT/quic-v1`. `ValueError` for a bad host or port."""
        port_part = _BY_NAME["udp"], _number_from_text(2)(str(port))
        return cls((_host_part(host), port_part, (_BY_NAME["quic-v1"], b"")))

    # -- looking into it -------------------------------------------------------------------------------------
    def to_bytes(self) -> bytes:
        """The binary form."""
        return self._bytes

    def protocols(self) -> tuple[tuple[str, str | None], ...]:
        """(name, value as text) of each part; the value is None for names without one."""
        return tuple((part.name, _value_to_text(part, value)) for part, value in self._parts)

    def names(self) -> tuple[str, ...]:
        """The names of the parts alone: `("ip4", "udp", "quic-v1")`."""
        return tuple(part.name for part, _ in self._parts)

    def value(self, name: str) -> str | None:
        """The text value of the first part called `name`; None when there is none or it has no value."""
        for part, value in self._parts:
            if part.name == name:
                return _value_to_text(part, value)
        return None

    def has(self, name: str) -> bool:
        """Whether a part is called `name`."""
        return any(part.name == name for part, _ in self._parts)

    def peer_id(self) -> PeerId | None:
        """The peer at the address: a `/p2p` at its very end. None for `<relay>/p2p/RELAY/p2p-circuit`."""
        if self._parts and self._parts[-1][0].name == "p2p":
            return PeerId.from_bytes_untrusted(self._parts[-1][1])
        return None

    def relay_id(self) -> PeerId | None:
        """The relay of a circuit address: the `/p2p` before `/p2p-circuit`."""
        for (part, value), (following, _) in zip(self._parts, self._parts[1:], strict=False):
            if part.name == "p2p" and following.name == "p2p-circuit":
                return PeerId.from_bytes_untrusted(value)
        return None

    def without_peer(self) -> Multiaddr:
        """Without a `/p2p` at the end."""
        return Multiaddr(self._parts[:-1]) if self._parts and self._parts[-1][0].name == "p2p" else self

    def with_peer(self, peer: PeerId) -> Multiaddr:
        """With `/p2p/<peer>` at the end, instead of the one there may be."""
        return Multiaddr((*self.without_peer()._parts, (_BY_NAME["p2p"], peer.to_bytes())))

    def encapsulate(self, other: Multiaddr | str) -> Multiaddr:
        """This address, then the other."""
        other = Multiaddr.parse(other) if isinstance(other, str) else other
        return Multiaddr(self._parts + other._parts)

    def before_circuit(self) -> Multiaddr | None:
        """Of `<relay>/p2p-circuit...` the part that reaches the relay; None when this is no circuit."""
        names = self.names()
        return Multiaddr(self._parts[: names.index("p2p-circuit")]) if "p2p-circuit" in names else None

    def host_port(self) -> tuple[Literal["tcp", "udp"], str, int] | None:
        """(transport, host, port) of the first two parts, the host an IP address (with %zone) or a name."""
        parts = self._parts
        zone = ""
        if parts and parts[0][0].name == "ip6zone":
            zone, parts = "%" + parts[0][1].decode(), parts[1:]
        if len(parts) < 2 or parts[0][0].name not in _HOST_NAMES:
            return None
        (host, value), (transport, port) = parts[:2]
        text = (_value_to_text(host, value) or "") + (zone if host.name == "ip6" else "")
        if transport.name == "tcp":
            return "tcp", text, int.from_bytes(port, "big")
        return ("udp", text, int.from_bytes(port, "big")) if transport.name == "udp" else None

    def ip(self) -> IpAddress | None:
        """The IP address it starts with (of the relay, for a circuit); a mapped IPv4 address as IPv4."""
        for part, value in self._parts[:2]:
            if part.name == "ip4":
                return ipaddress.IPv4Address(value)
            if part.name == "ip6":
                address = ipaddress.IPv6Address(value)
                return address.ipv4_mapped or address
        return None

    @property
    def is_circuit(self) -> bool:
        """Goes through a relay."""
        return self.has("p2p-circuit")

    @property
    def is_loopback(self) -> bool:
        """Reaches this machine only: a loopback IP address, or the name localhost."""
        ip = self.ip()
        return ip.is_loopback if ip is not None else self._is_local_name()

    @property
    def is_private(self) -> bool:
        """An IP address that means something in a local network only: RFC 1918, 100.64/10, fc00::/7, link-local."""
        ip = self.ip()
        if ip is None or ip.is_loopback or ip.is_unspecified or ip.is_multicast:
            return False
        return ip.is_private or ip in _SHARED_SPACE

    @property
    def is_global(self) -> bool:
        """Can be reached over the internet: a global unicast IP address, or a DNS name other than localhost."""
        ip = self.ip()
        if ip is None:
            return self.names()[:1] != () and self.names()[0].startswith("dns") and not self._is_local_name()
        return (ip.is_global or ip in _NAT64) and not ip.is_multicast

    @property
    def is_unspecified(self) -> bool:
        """0.0.0.0 or ::, where a listener means all its interfaces."""
        ip = self.ip()
        return ip is not None and ip.is_unspecified

    def _is_local_name(self) -> bool:
        name = next((value for part, value in self._parts[:1] if part.name.startswith("dns")), b"")
        return name.rstrip(b".").lower().rpartition(b".")[2] == b"localhost"

    # -- being a value ---------------------------------------------------------------------------------------
    def __setattr__(self, name: str, value: object) -> None:
        raise AttributeError("a Multiaddr is immutable")

    def __str__(self) -> str:
        return self._text

    def __repr__(self) -> str:
        return f"Multiaddr({self._text!r})"

    def __reduce__(self) -> tuple[object, ...]:
        return Multiaddr, (self._parts,)  # for `copy`, which otherwise sets attributes

    def __hash__(self) -> int:
        return hash(self._bytes)

    def __eq__(self, other: object) -> bool:
        return self._bytes == other._bytes if isinstance(other, Multiaddr) else NotImplemented

    def __lt__(self, other: object) -> bool:
        return self._bytes < other._bytes if isinstance(other, Multiaddr) else NotImplemented


# -- parsing -----------------------------------------------------------------------------------------------------
@lru_cache(maxsize=_PARSED_ADDRESSES)
def _parse(text: str) -> Multiaddr:
    try:
        return Multiaddr(_parts_from_text(text))
    except (ValueError, RemoteProtocolError) as error:
        raise ValueError(f"{text[:200]!r} is not a multiaddr: {error}") from None


def _parts_from_text(text: str) -> Parts:
    if len(text) > MAX_TEXT_BYTES:
        raise ValueError(f"over {MAX_TEXT_BYTES} characters")
    if not text.startswith("/"):
        raise ValueError("it has to start with a slash")
    words = text.rstrip("/").split("/")[1:]
    if not words:
        raise ValueError("it is empty")
    parts: list[tuple[Part, bytes]] = []
    position = 0
    while position < len(words):
        part = _BY_NAME.get(words[position])
        position += 1
        if part is None:
            raise ValueError(f"unknown protocol {words[position - 1]!r}")
        if part.from_text is None:
            parts.append((part, b""))
            continue
        if position == len(words):
            raise ValueError(f"/{part.name} needs a value")
        value = "/" + "/".join(words[position:]) if part.is_path else words[position]
        position = len(words) if part.is_path else position + 1
        parts.append((part, part.from_text(value)))
    return tuple(parts)


@lru_cache(maxsize=_PARSED_ADDRESSES)
def _from_bytes_untrusted(data: bytes) -> Multiaddr:
    parts: list[tuple[Part, bytes]] = []
    offset = 0
    while offset < len(data):
        code, offset = decode_uvarint_untrusted(data, offset)
        part = _BY_CODE.get(code)
        if part is None:
            raise RemoteProtocolError(f"unknown protocol {code} in an address")
        size = part.size
        if size is None:
            size, offset = decode_uvarint_untrusted(data, offset)
        if offset + size > len(data):
            raise RemoteProtocolError("address is cut off")
        parts.append((part, data[offset : offset + size]))
        offset += size
        if part.is_path and offset < len(data):
            raise RemoteProtocolError(f"something follows /{part.name} in an address")
    if not parts:
        raise RemoteProtocolError("empty address")
    try:
        return Multiaddr(tuple(parts))
    except ValueError as error:
        raise RemoteProtocolError(f"malformed address: {error}") from None


def _host_part(host: str) -> tuple[Part, bytes]:
    try:
        ip = ipaddress.ip_address(host)
    except ValueError:
        return _BY_NAME["dns"], _name_from_text(host)
    return (_BY_NAME["ip4"] if ip.version == 4 else _BY_NAME["ip6"]), ip.packed


def _value_to_text(part: Part, value: bytes) -> str | None:
    return None if part.to_text is None else part.to_text(value)


def _part_to_text(part: Part, value: bytes) -> str:
    text = _value_to_text(part, value)
    if text is None:
        return f"/{part.name}"
    return f"/{part.name}{text}" if part.is_path else f"/{part.name}/{text}"
