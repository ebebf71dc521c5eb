"""DCUtR, hole punching synchronised over a relayed connection (libp2p/specs, relay/DCUtR.md), without I/O.

`/libp2p/dcutr`, each message `uvarint(length) || protobuf`:

    HolePunch { Type type = 1 (CONNECT 100, SYNC 300); repeated bytes ObsAddrs = 2; bytes token = 16;
                NatReport nat = 17; Technique guess = 18; }

    B, who accepted the relayed connection         A, who opened it
      CONNECT(B's addresses)   ------------------->                       B starts a clock
                               <-------------------   CONNECT(A's addresses)
      SYNC                     ------------------->   A punches at once
      B punches after half of the measured round trip

Both punch at the same moment, each packet opening the sender's own NAT for the other's. TCP: both connect from the port
they listen on. QUIC: A dials, B sends datagrams from the socket it listens on. Whatever comes of it, A is the client
and B the server of the handshakes above. Three attempts, each on a new stream.

`token` is ours, others skip it: 16 bytes that the partner puts into its datagrams (`encode_probe`), so that one which
arrives from an address nobody named (a NAT with a mapping for each destination) can be recognised and answered.

`nat` in CONNECT is ours, too: what the sender's NATs do (`nat/report.py`). When by both reports only guessed ports can
help, B says so in SYNC (`guess`: 2 predict, 3 birthday) and the two go on with `nat/guess.py` at once: at a prediction
nothing else is sent meanwhile, since each new flow moves a sequential NAT's ports on; beside a birthday TCP is tried.

    probe     0b | token 16 | random to 64 bytes          the first byte is neither STUN's nor QUIC's (RFC 9443)

Whom we send to. The addresses in a message are the partner's claim, and a lie would have us send to a third party. An
IP address counts as proven when the relay sees the partner there (`relay/messages.py`), or when we are connected with
it there. Others get so little that it is no use to anybody (`choose_targets`, `PunchBudget`).
"""

from __future__ import annotations

import enum
import ipaddress
import random
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Final, TypeAlias

from lattica_protocols import limits
from lattica_protocols.errors import LocalProtocolError, RemoteProtocolError
from lattica_protocols.multiaddr import Multiaddr
from lattica_protocols.nat.behaviour import NatBehaviour
from lattica_protocols.nat.guess import TECHNIQUES
from lattica_protocols.nat.punch_plan import Technique, choose_technique
from lattica_protocols.nat.report import NatReport
from lattica_protocols.peer_record import decode_addrs_untrusted
from lattica_protocols.protobuf import Kind, Message, optional, repeated

PROTOCOL_ID: Final = "/libp2p/dcutr"
TOKEN_BYTES: Final = 16
PROBE_BYTES: Final = 64
"""As go-libp2p."""
PROBE_FIRST_BYTE: Final = 0x0B
MAX_ROUND_TRIP: Final = 5.0
"""Seconds. Longer than this between CONNECT and CONNECT means a stalled path, and half of it says nothing."""

IpAddress: TypeAlias = ipaddress.IPv4Address | ipaddress.IPv6Address
IpNetwork: TypeAlias = ipaddress.IPv4Network | ipaddress.IPv6Network

_LOCAL_NETWORKS: Final = tuple(
    ipaddress.ip_network(text)
    for text in (
        "10.0.0.0/8",
        "172.16.0.0/12",
        "192.168.0.0/16",
        "100.64.0.0/10",
        "169.254.0.0/16",
        "fc00::/7",
        "fe80::/10",
    )
)
"""Mean something only where they are: RFC 1918, 6598, 3927, 4193."""


class PunchType(enum.IntEnum):
    """Both sides CONNECT, then the initiator sends SYNC."""

    CONNECT = 100
    SYNC = 300


@dataclass(frozen=True, slots=True)
class PunchMessage(Message):
    """Any of the three. Fields from 16 on are ours; others skip them."""

    type: int | None = optional(1, Kind.ENUM)
    addrs: Sequence[bytes] = repeated(2, Kind.BYTES, max_count=limits.DCUTR_MAX_ADDRS)
    token: bytes | None = optional(16, Kind.BYTES, max_bytes=TOKEN_BYTES)
    nat: NatReport | None = optional(17, NatReport, max_bytes=limits.NAT_MAX_REPORT_BYTES)
    guess: int | None = optional(18, Kind.ENUM)


@dataclass(frozen=True, slots=True)
class Partner:
    """What the other side said in its CONNECT."""

    addrs: tuple[Multiaddr, ...]
    token: bytes | None
    """To be put into probes; `None` from others than us."""
    nat: NatBehaviour | None = None
    """What it says of its NATs; `None` from others than us."""


_GUESSES: Final = {n: technique for n, technique in TECHNIQUES.items() if technique is not Technique.SIMPLE}


class PunchExchange:
    """The three messages of one attempt, either side's.

    exchange = PunchExchange(initiator, addrs, token, now)
    exchange.poll_transmit()             a message to send, without its length prefix
    exchange.receive_untrusted(message, now)
    exchange.partner                     set by its CONNECT: our own NAT may be opened now
    exchange.punch_at                    set by the last message: when to punch, on the clock of `now`
    """

    def __init__(
        self,
        *,
        initiator: bool,
        addrs: Sequence[Multiaddr],
        token: bytes,
        now: float,
        nat: NatBehaviour | None = None,
        may_guess: bool = False,
    ) -> None:
        """`nat`: what ours does; `None`: we guess no ports. `may_guess`: the initiator goes on with that if need be."""
        if len(token) != TOKEN_BYTES:
            raise LocalProtocolError(f"a token has {TOKEN_BYTES} bytes")
        self.initiator = initiator
        self.partner: Partner | None = None
        self.punch_at: float | None = None
        self.round_trip: float | None = None
        """Seconds over the relay, measured by the initiator."""
        self.guess: Technique | None = None
        """Set with `punch_at` when ports are guessed instead."""
        self._nat = nat
        self._may_guess = may_guess
        self._addrs = tuple(addr.to_bytes() for addr in addrs)
        self._token = token
        self._sent_at = now
        self._out: list[PunchMessage] = [self._connect()] if initiator else []

    def _connect(self) -> PunchMessage:
        report = None if self._nat is None else NatReport.of(self._nat)
        return PunchMessage(type=PunchType.CONNECT, addrs=self._addrs, token=self._token, nat=report)

    def _sync(self, partner: Partner) -> PunchMessage:
        if self._may_guess and self._nat is not None and partner.nat is not None:
            chosen = choose_technique(self._nat, partner.nat)
            self.guess = chosen if chosen in _GUESSES.values() else None
        number = next((n for n, technique in _GUESSES.items() if technique is self.guess), None)
        return PunchMessage(type=PunchType.SYNC, guess=number)

    def poll_transmit(self) -> bytes | None:
        """The next message to send, `None`: nothing now."""
        return self._out.pop(0).encode() if self._out else None

    def receive_untrusted(self, data: bytes, now: float) -> None:
        """One message of the partner."""
        message = PunchMessage.decode_untrusted(data)
        if self.punch_at is not None:
            raise RemoteProtocolError("a message after the exchange was over")
        if self.partner is None:
            if message.type != PunchType.CONNECT:
                raise RemoteProtocolError("the exchange has to begin with CONNECT")
            self.partner = partner_untrusted(message)
            if self.initiator:
                self.round_trip = now - self._sent_at
                if not 0 <= self.round_trip <= MAX_ROUND_TRIP:
                    raise RemoteProtocolError(f"the answer took {self.round_trip:.1f} s")
                self._out.append(self._sync(self.partner))
                self.punch_at = now + self.round_trip / 2
            else:
                self._out.append(self._connect())
        elif message.type == PunchType.SYNC:
            self.punch_at = now
            self.guess = _GUESSES.get(message.guess or 0)
        else:
            raise RemoteProtocolError("expected SYNC")


def partner_untrusted(connect: PunchMessage) -> Partner:
    """What a CONNECT says, without what we cannot read or use."""
    addrs = tuple(addr for addr in decode_addrs_untrusted(connect.addrs) if not addr.is_circuit)
    token = connect.token if connect.token and len(connect.token) == TOKEN_BYTES else None
    return Partner(addrs, token, None if connect.nat is None else connect.nat.behaviour())


# -- probes ------------------------------------------------------------------------------------------------------
def encode_probe(token: bytes | None, rng: random.Random) -> bytes:
    """A datagram that opens our NAT; with the partner's token it also tells it who we are."""
    if token is None:
        # go-libp2p sends random bytes. The fixed bit of QUIC is off, so that nobody takes it for a packet.
        return bytes([rng.randrange(PROBE_FIRST_BYTE + 1, 16)]) + rng.randbytes(PROBE_BYTES - 1)
    return bytes([PROBE_FIRST_BYTE]) + token + rng.randbytes(PROBE_BYTES - 1 - TOKEN_BYTES)


def probe_token_untrusted(data: bytes) -> bytes | None:
    """The token in a datagram, `None` when it is no probe of ours. Never raises."""
    if len(data) != PROBE_BYTES or data[0] != PROBE_FIRST_BYTE:
        return None
    return data[1 : 1 + TOKEN_BYTES]


def probe_delay(sent: int, rng: random.Random) -> float:
    """Seconds from probe number `sent` (from 0) to the next: go-libp2p's pace, quick at first."""
    return (10 + rng.uniform(0, min(10 * (sent + 1) ** 2, 200))) / 1000


# -- whom to send to ---------------------------------------------------------------------------------------------
@dataclass(frozen=True, slots=True)
class Target:
    """One address to punch at."""

    addr: Multiaddr
    proven: bool

    @property
    def probes(self) -> int:
        return limits.PUNCH_PROBES if self.proven else limits.PUNCH_PROBES_UNPROVEN

    @property
    def tcp_tries(self) -> int:
        return limits.PUNCH_TCP_TRIES if self.proven else limits.PUNCH_TCP_TRIES_UNPROVEN


def is_local(ip: IpAddress) -> bool:
    """Whether an address has no meaning outside of its own network."""
    return ip.is_loopback or any(ip in network for network in _LOCAL_NETWORKS if network.version == ip.version)


def choose_targets(
    claimed: Iterable[Multiaddr],
    *,
    proven: Collection[IpAddress],
    own_networks: Collection[IpNetwork],
    own_public: Collection[IpAddress],
) -> list[Target]:
    """Which of the partner's addresses to try, the most promising first.

    `proven`: where the partner is known to be. Local addresses are tried only where they can be the partner's: proven
    ones, those in a network of ours, and all when it is seen at the same public address as we (`own_public`): then it
    is behind the same NAT. A local network never is a third party's, so a wrong guess hurts nobody.
    """
    same_nat = any(ip in own_public for ip in proven)
    local, known, unproven = [], [], []
    for addr in dict.fromkeys(claimed):
        ip = addr.ip()
        if ip is None or ip.is_unspecified or ip.is_multicast or addr.is_circuit or not _is_transport(addr):
            continue
        if ip in proven:
            known.append(Target(addr, True))
        elif ip.is_loopback:
            continue
        elif is_local(ip):
            if same_nat or any(ip in network for network in own_networks if network.version == ip.version):
                local.append(Target(addr, True))
        else:
            unproven.append(Target(addr, False))
    return (local + known)[: limits.PUNCH_MAX_TARGETS] + unproven[: limits.PUNCH_MAX_UNPROVEN]


def _is_transport(addr: Multiaddr) -> bool:
    names = addr.without_peer().names()
    return names[1:] in (("tcp",), ("udp", "quic-v1"))


class PunchBudget:
    """How much is sent towards one IP address, over all partners: a token bucket each."""

    def __init__(
        self, burst: float = limits.PUNCH_PER_IP_BURST, per_second: float = limits.PUNCH_PER_IP_PER_SECOND
    ) -> None:
        self._burst, self._per_second = float(burst), per_second
        self._accounts: dict[IpAddress, tuple[float, float]] = {}

    def take(self, ip: IpAddress, now: float, count: int = 1) -> bool:
        """Whether so many more datagrams or connection attempts may go there."""
        account = self._accounts.get(ip)
        if account is None:
            if len(self._accounts) >= limits.PUNCH_TRACKED_IPS:
                self._sweep(now)
                if len(self._accounts) >= limits.PUNCH_TRACKED_IPS:
                    return False
            account = (self._burst, now)
        tokens = self._filled(account, now)
        allowed = tokens >= count
        self._accounts[ip] = (tokens - count if allowed else tokens), now
        return allowed

    def give_back(self, ip: IpAddress, now: float, count: int) -> None:
        """What was taken and not sent."""
        account = self._accounts.get(ip)
        if account is not None:
            self._accounts[ip] = min(self._burst, self._filled(account, now) + count), now

    def _filled(self, account: tuple[float, float], now: float) -> float:
        tokens, at = account
        return min(self._burst, tokens + (now - at) * self._per_second)

    def _sweep(self, now: float) -> None:
        for ip, account in list(self._accounts.items()):
            if self._filled(account, now) >= self._burst:
                del self._accounts[ip]
