"""From a relayed connection to a direct one: connection reversal, and hole punching over UDP and TCP at once (DCUtR).

A relayed connection comes up. Both sides then dial what they know of the other; one of them may be public, and the
first dial was beaten by the relay. At the same time B, who accepted it, synchronises a punch (`dcutr.py`), up to three
times; most pairs do not have to wait for that (`early_punch.py`). Whatever connection comes up joins the session; new
streams take it, RPC moves over (`rpc/service.py`), and the relayed connection is closed when nothing runs on it.

What each side does at the moment of a punch, towards the addresses that `choose_targets` allows:

    A   dials QUIC, and TCP from the port it listens on; where the partner is not proven to be, it sends probes and
        waits for one of the partner's
    B   sends probes from the socket it listens on, and dials TCP from the port it listens on, as the server of the
        handshake that follows

Where by both sides' reports that cannot work, ports are guessed (`nat/guesser.py`): at once instead of it, and after
three attempts in vain whatever the reports say.

A probe of the partner that comes from an address which nobody named is answered with a dial (peer-reflexive). Before
that, when the partner's addresses are known but it is not time yet, each side sends a datagram that dies behind its own
NAT: if the partner's is early, it finds the mapping made instead of being taken for a stranger ("poisoned" boxes, whose
own input chain accepts strays, otherwise give our flow another port).
"""

from __future__ import annotations

import logging
import os
import random
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Final

import trio

from lattica.early_punch import EarlyPunch
from lattica.errors import ConnectError, LatticaError
from lattica.host import NetworkChanged, PeerConnected, PeerDisconnected, PeerIdentified
from lattica.listen_addrs import interface_networks
from lattica.nat.guesser import Guess, PortGuesser
from lattica.negotiate import LazyStream
from lattica.punch_report import MAX_REPORTS, PunchReport, PunchReports
from lattica.retry import Retry
from lattica_protocols import dcutr
from lattica_protocols.dcutr import PROTOCOL_ID, PunchBudget, PunchExchange, Target, choose_targets, is_local
from lattica_protocols.errors import ProtocolError
from lattica_protocols.limits import DCUTR_MAX_MESSAGE_BYTES, PUNCH_ANSWERS_PER_MINUTE, PUNCH_ATTEMPTS, PUNCH_QUIC_DIAL
from lattica_protocols.nat.behaviour import Ports
from lattica_protocols.nat.punch_plan import Technique
from lattica_protocols.paths.retry import PUNCH_PAUSES

if TYPE_CHECKING:
    from lattica.host import Host
    from lattica.interfaces import Connection, Stream
    from lattica.nat import NatService
    from lattica.transports.circuit import CircuitTransport
    from lattica.transports.quic import QuicTransport
    from lattica.transports.quic_engine import Address
    from lattica.transports.tcp import TcpTransport
    from lattica_protocols.multiaddr import Multiaddr
    from lattica_protocols.peer_id import PeerId

log = logging.getLogger("lattica.punch")

EXCHANGE_SECONDS: Final = 10.0
"""For the messages of one attempt: three times across a relay that is slow."""
PUNCH_SECONDS: Final = 4.0
"""How long one attempt tries. TCP sends its second SYN after one second, its third after three."""
SECOND_PATH_SECONDS: Final = 1.0
"""After the first success the rest goes on for so long: TCP for bulk beside QUIC is worth a second."""
PREDICTION_SECONDS: Final = 0.5
"""Behind a NAT that counts its ports up nothing is dialled for so long: each flow would spoil a prediction."""
TCP_PAUSE: Final = 0.1
"""After a refusal. The partner's box answered before the partner was ready."""
OPENING_HOPS: Final = 2
"""Hop limit of the opening datagram: it passes our own box and dies at the next router. Behind two NATs of our own it
opens the first only."""
RELAYED_LINGER: Final = 10.0
"""Seconds after which an unused relayed connection is closed when a direct one is up."""
SIGN_SECONDS: Final = 3.0
"""For a sign of life of the direct one, as a heartbeat has it."""
MAX_CANDIDATES: Final = 16
"""Addresses of ours that we name; a partner of ours tries six."""


class HolePuncher:
    """Looks for direct connections to peers that are connected over a relay. `run` does the work."""

    def __init__(
        self,
        host: Host,
        circuits: CircuitTransport,
        *,
        tcp: TcpTransport | None = None,
        quic: QuicTransport | None = None,
        opening_hops: Callable[[], int] = lambda: OPENING_HOPS,
    ) -> None:
        self.reports = PunchReports()
        self.more_candidates: Callable[[], Sequence[Multiaddr]] = lambda: ()
        """Further addresses of ours, most promising first: mapped ports, and what STUN servers see."""
        self.refresh: Callable[[], Awaitable[None]] = trio.lowlevel.checkpoint
        """Looks at them again after a failed attempt: a clash in our own box may have moved them."""
        self._host = host
        self._circuits = circuits
        self._tcp = tcp
        self._quic = quic
        self.opening_hops = opening_hops
        """How far the opening datagram goes; 0: there is nothing of ours to open. One that goes too far reaches the
        partner's box before the partner has opened it, and does the harm that it is to prevent."""
        self.hops_measured: Callable[[], bool] = lambda: False
        """Whether that is known to suffice."""
        self._rng = random.Random(host.rng.getrandbits(64))
        self._budget = PunchBudget()
        self._direct: dict[PeerId, trio.Event] = {}
        self._upgrading: dict[PeerId, Connection] = {}
        """The relayed connections that are to be left."""
        self._resting: dict[Connection, tuple[Retry, frozenset[Multiaddr]]] = {}
        """Until the next round, and where the peer was said to be in the last one. By relayed connection: a peer that
        comes back has another one before the rounds for the former have ended."""
        self._answering: dict[PeerId, trio.CancelScope] = {}
        self._answered: OrderedDict[PeerId, list[float]] = OrderedDict()
        self._expected: dict[bytes, Callable[[Address], None]] = {}
        self.guesser: PortGuesser | None = None
        self.early_hops: Callable[[], int] = lambda: OPENING_HOPS
        """The same for a partner that dials before the punch: then a firewall has to be opened, too."""
        self._early = EarlyPunch(
            host,
            candidates=lambda: self.candidates(),
            behaviour=lambda: None if self.guesser is None else self.guesser.nat.behaviour,
            choose=self._choose,
            open_nat=lambda targets: self._open_nat(targets, self.early_hops()),
        )
        if tcp is not None:
            tcp.source_port = self._source_port

    def guess_with(self, nat: NatService) -> None:
        """Guess ports where nothing else helps. `nat` samples our own."""
        if self._quic is None:
            return
        self.guesser = PortGuesser(
            self._host,
            self._circuits,
            nat,
            self._quic,
            opening_hops=lambda: self.opening_hops(),
            hops_measured=lambda: self.hops_measured(),
        )
        self.guesser.on_guess = self._guessing

    async def run(self) -> None:
        """Until cancelled."""
        self._host.handle(PROTOCOL_ID, self._answer)
        self._early.start()
        if self.guesser is not None:
            self.guesser.start()
        async with trio.open_nursery() as nursery:
            events = self._host.subscribe()
            for connection in self._host.connections():
                self._consider(connection, nursery)
            async for event in events:
                if isinstance(event, PeerConnected):
                    self._consider(event.connection, nursery)
                elif isinstance(event, PeerDisconnected):
                    self._direct.pop(event.peer, None)
                elif isinstance(event, PeerIdentified | NetworkChanged):
                    self._heard_news(event)

    def _consider(self, connection: Connection, nursery: trio.Nursery) -> None:
        """A connection is up."""
        peer = connection.peer_id
        if connection.path != "relay":
            self._direct.pop(peer, trio.Event()).set()
            self._tell_direct(connection)
            nursery.start_soon(self._leave_relays, connection, nursery)
        elif (direct := self._direct_connection(peer)) is not None:
            nursery.start_soon(self._leave_relays, direct, nursery)
        elif (other := self._upgrading.get(peer)) is None or other.closed.is_set():
            self._upgrading[peer] = connection
            nursery.start_soon(self._upgrade, connection)

    # -- one relayed connection ---------------------------------------------------------------------------
    async def _upgrade(self, relayed: Connection) -> None:
        """Rounds of attempts until there is a direct connection, or the relayed one is gone."""
        peer = relayed.peer_id
        retry = Retry(PUNCH_PAUSES, self._rng)
        report = self._report(relayed)
        first = True
        try:
            while not relayed.closed.is_set():
                async with trio.open_nursery() as nursery:
                    if first and relayed.direction == "outbound":
                        nursery.start_soon(self._dial_early, relayed, report)
                    nursery.start_soon(self._dial_known, relayed, report)
                    if relayed.direction == "inbound":
                        nursery.start_soon(self._initiate, relayed, report, first)
                first = False
                if self._is_direct(peer):
                    return
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(_cancel_when, relayed.closed.wait, nursery)
                    nursery.start_soon(_cancel_when, partial(self._until_direct, peer), nursery)
                    await self._rest(relayed, retry)
                    nursery.cancel_scope.cancel()
                if self._is_direct(peer):
                    return
        finally:
            if self._upgrading.get(peer) is relayed:
                del self._upgrading[peer]

    async def _rest(self, relayed: Connection, retry: Retry) -> None:
        """Until the next round: sooner when either side's network changes."""
        self._resting[relayed] = retry, frozenset(self._host.peerstore.addrs(relayed.peer_id))
        try:
            await retry.rest()
        finally:
            del self._resting[relayed]

    def _heard_news(self, event: PeerIdentified | NetworkChanged) -> None:
        """Of our own network, or by identify of the partner's."""
        for relayed, (retry, known) in self._resting.items():
            peer = relayed.peer_id
            if isinstance(event, PeerIdentified) and (
                event.peer != peer or known.issuperset(self._host.peerstore.addrs(peer))
            ):
                continue
            retry.news()

    def _tell_direct(self, connection: Connection) -> None:
        """Into the report: the first direct connection."""
        report = self.reports.get(connection.peer_id)
        if report is not None and not report.result:
            report.tell_direct(connection, trio.current_time())
            took = "-" if report.seconds is None else f"{report.seconds:.3f}"
            log.info("relay_left peer=%s path=%s seconds=%s", report.peer.short(), report.result, took)

    async def _dial_early(self, relayed: Connection, report: PunchReport) -> None:
        """Where the partner opened its NAT for us, before the punch is agreed on."""
        targets = [] if self._quic is None else await self._early.offer(relayed)
        with trio.move_on_after(PUNCH_SECONDS):
            async with trio.open_nursery() as nursery:
                for target in targets:
                    report.tried.append(f"{target.addr} (before the punch)")
                    nursery.start_soon(self._dial_quic, target.addr, relayed.peer_id, report)
                await self._until_direct(relayed.peer_id)

    async def _dial_known(self, relayed: Connection, report: PunchReport) -> None:
        """Reversal: where identify says that the peer is, and that can be, it is dialled."""
        peer, guesser = relayed.peer_id, self.guesser
        if guesser is not None and guesser.nat.behaviour.allocation.ports is Ports.SEQUENTIAL:
            await trio.sleep(PREDICTION_SECONDS)
        with trio.move_on_after(PUNCH_SECONDS):
            known: set[Multiaddr] = set()
            while not self._is_direct(peer):
                targets = self._choose(relayed, self._host.peerstore.addrs(peer))
                addrs = [t.addr for t in targets if t.addr not in known and self._may_dial(t, peer)]
                known.update(target.addr for target in targets)
                if addrs:
                    try:
                        await self._host.dial(peer, addrs)
                    except ConnectError as error:
                        report.add_error(f"dial: {error}")
                if self._host.peerstore.info(peer) is not None:
                    return
                await trio.sleep(TCP_PAUSE)  # identify is on its way

    # -- the two sides of the exchange --------------------------------------------------------------------
    async def _initiate(self, relayed: Connection, report: PunchReport, first_round: bool) -> None:
        """B's part."""
        guessed = speaks_ours = False
        for _ in range(PUNCH_ATTEMPTS):
            if self._is_direct(relayed.peer_id) or relayed.closed.is_set() or not self.candidates():
                return
            report.attempts += 1
            try:
                with trio.fail_after(EXCHANGE_SECONDS):
                    stream = LazyStream(await relayed.open_stream(), PROTOCOL_ID)
                    exchange, token = await self._exchange(stream, relayed, initiator=True, may_guess=not guessed)
            except (LatticaError, ProtocolError, trio.TooSlowError) as error:
                report.add_error(f"exchange: {error}")
                return
            assert exchange.punch_at is not None
            assert exchange.partner is not None
            speaks_ours = exchange.partner.nat is not None
            async with trio.open_nursery() as nursery:
                if exchange.guess is not None:
                    guessed = True
                    nursery.start_soon(self._guess, relayed, report, first_round)
                await trio.sleep_until(exchange.punch_at)
                await self._punch(relayed, exchange, token, report)
            if self._is_direct(relayed.peer_id):
                return
            await self.refresh()
        if speaks_ours and not guessed:
            await self._guess(relayed, report, first_round)

    async def _guess(self, relayed: Connection, report: PunchReport, first_round: bool) -> None:
        if self.guesser is None or self._is_direct(relayed.peer_id) or relayed.closed.is_set():
            return
        try:
            await self.guesser.attempt(relayed, hopeless_too=first_round)
        except (LatticaError, ProtocolError, trio.TooSlowError) as error:
            report.add_error(f"guessing ports: {error}")

    def _guessing(self, relayed: Connection, guess: Guess) -> None:
        report = self._report(relayed)
        report.guesses = [*report.guesses[-7:], guess]
        report.partner = guess.partner

    async def _answer(self, stream: Stream) -> None:
        """A's part."""
        relayed = stream.connection
        peer, now = relayed.peer_id, trio.current_time()
        recent = [at for at in self._answered.get(peer, []) if now - at < 60]
        if relayed.path != "relay" or len(recent) >= PUNCH_ANSWERS_PER_MINUTE:
            stream.reset()
            return
        if peer in self._answering:
            self._answering.pop(peer).cancel()  # the partner gave the former attempt up some milliseconds before us
        self._answered[peer] = [*recent, now]
        self._answered.move_to_end(peer)
        while len(self._answered) > MAX_REPORTS:
            self._answered.popitem(last=False)
        with trio.CancelScope() as scope:
            self._answering[peer] = scope
            try:
                report = self._report(relayed)
                report.attempts += 1
                try:
                    with trio.fail_after(EXCHANGE_SECONDS):
                        exchange, token = await self._exchange(stream, relayed, initiator=False)
                except (LatticaError, ProtocolError, trio.TooSlowError) as error:
                    report.add_error(f"exchange: {error}")
                    raise
                if not await self._punch(relayed, exchange, token, report):
                    await self.refresh()
            finally:
                if self._answering.get(peer) is scope:
                    del self._answering[peer]

    async def _exchange(
        self, stream: Stream, relayed: Connection, *, initiator: bool, may_guess: bool = False
    ) -> tuple[PunchExchange, bytes]:
        """All messages of one attempt, and our NAT opened for what comes."""
        token = os.urandom(dcutr.TOKEN_BYTES)
        exchange = PunchExchange(
            initiator=initiator,
            addrs=self.candidates(),
            token=token,
            now=trio.current_time(),
            nat=None if self.guesser is None else self.guesser.nat.behaviour,
            may_guess=may_guess,
        )
        with stream.reset_on_error():
            opened = False
            while True:
                if exchange.partner is not None and not opened:
                    # before our next message: the partner may send the moment it has that
                    opened = True
                    self._open_nat(self._targets(relayed, exchange), self.opening_hops())
                while (message := exchange.poll_transmit()) is not None:
                    await stream.send_frame(message)
                if exchange.punch_at is not None:
                    await stream.aclose()
                    return exchange, token
                message = await stream.receive_frame(DCUTR_MAX_MESSAGE_BYTES)
                exchange.receive_untrusted(message, trio.current_time())

    # -- the punch ----------------------------------------------------------------------------------------
    async def _punch(self, relayed: Connection, exchange: PunchExchange, token: bytes, report: PunchReport) -> bool:
        """Everything at once. Whether there is a direct connection afterwards."""
        peer, partner, is_client = relayed.peer_id, exchange.partner, not exchange.initiator
        assert partner is not None
        report.partner = partner.nat
        targets = self._targets(relayed, exchange)
        if exchange.guess is Technique.PREDICT:
            return self._is_direct(peer)  # each new flow of ours would move the ports on that are to be predicted
        if exchange.guess is not None:
            targets = [target for target in targets if target.addr.has("tcp")]
        report.tried = [str(target.addr) for target in targets]
        proven = {target.addr for target in targets if target.proven}
        foreign = (a for a in partner.addrs if a not in proven and (ip := a.ip()) is not None and not is_local(ip))
        report.unproven = [str(addr) for addr in foreign][:MAX_CANDIDATES]
        if not targets:
            report.add_error("the peer named no address that can be tried")
        log.debug("punch peer=%s client=%s targets=%s", peer.short(), is_client, " ".join(report.tried))
        with trio.move_on_after(PUNCH_SECONDS), self._expecting(targets if is_client else []):
            async with trio.open_nursery() as nursery:
                if is_client:
                    self._await_probes(token, targets, peer, nursery, report)
                for target in targets:
                    if target.addr.has("tcp"):
                        nursery.start_soon(self._punch_tcp, target, peer, is_client, report)
                    elif is_client and (target.proven or partner.token is None):
                        nursery.start_soon(self._dial_quic, target.addr, peer, report)
                    else:
                        nursery.start_soon(self._send_probes, target, partner.token)
                await self._until_direct(peer)
                await trio.sleep(SECOND_PATH_SECONDS)
                nursery.cancel_scope.cancel()
        self._expected.pop(token, None)
        return self._is_direct(peer)

    def _targets(self, relayed: Connection, exchange: PunchExchange) -> list[Target]:
        return self._choose(relayed, () if exchange.partner is None else exchange.partner.addrs)

    def _choose(self, relayed: Connection, claimed: Sequence[Multiaddr]) -> list[Target]:
        facts = self._circuits.facts(relayed)
        seen = () if facts is None else facts.seen_at
        proven = {ip for addr in seen if (ip := addr.ip()) is not None}
        own = {ip for addr in self._observed() if (ip := addr.ip()) is not None}
        return choose_targets(
            claimed,
            proven=proven,
            own_networks=interface_networks(),
            own_public=own,
        )

    def _may_dial(self, target: Target, peer: PeerId) -> bool:
        """Whether the address can be afforded (a stranger may have named somebody else's) and is not being dialled."""
        found, ip, expensive = target.addr.host_port(), target.addr.ip(), target.addr.has("udp") and not target.proven
        if self._quic is not None and found and found[0] == "udp" and self._quic.is_dialling(found[1:], peer):
            return False
        return ip is not None and self._budget.take(ip, trio.current_time(), PUNCH_QUIC_DIAL if expensive else 1)

    async def _punch_tcp(self, target: Target, peer: PeerId, is_client: bool, report: PunchReport) -> None:
        """Connect from the port we listen on until it works."""
        port, ip = self._listening_port("tcp", target.addr), target.addr.ip()
        if self._tcp is None or port is None or ip is None:
            return
        for _ in range(target.tcp_tries):
            if not self._budget.take(ip, trio.current_time()):
                return
            try:
                connection = await self._tcp.dial(target.addr, peer, bind_port=port, initiator=is_client)
            except ConnectError as error:
                report.add_error(str(error))
                await trio.sleep(TCP_PAUSE)
            else:
                self._host.adopt(connection)
                return

    async def _dial_quic(self, addr: Multiaddr, peer: PeerId, report: PunchReport) -> None:
        found, ip = addr.host_port(), addr.ip()
        if self._quic is None or found is None or ip is None or not self._budget.take(ip, trio.current_time()):
            return
        if self._quic.is_dialling(found[1:], peer):
            self._quic.hurry(found[1:], peer)  # the early punch came too early, or is about to succeed
            return
        try:
            self._host.adopt(await self._quic.dial(addr, peer))
        except ConnectError as error:
            report.add_error(str(error))

    async def _send_probes(self, target: Target, token: bytes | None) -> None:
        """Datagrams that open our NAT for the partner, and tell it where we are."""
        found, ip = target.addr.host_port(), target.addr.ip()
        if self._quic is None or found is None or ip is None:
            return
        address = (found[1], found[2])
        endpoint = self._quic.endpoint_for(address)
        for sent in range(target.probes):
            if not self._budget.take(ip, trio.current_time()):
                return
            endpoint.send_datagram(dcutr.encode_probe(token, self._rng), address)
            await trio.sleep(dcutr.probe_delay(sent, self._rng))

    def _open_nat(self, targets: Sequence[Target], hops: int) -> None:
        """One datagram to each UDP address that dies on its way."""
        for target in targets if hops else ():
            found, ip = target.addr.host_port(), target.addr.ip()
            if self._quic is None or found is None or ip is None or found[0] != "udp":
                continue
            if self._budget.take(ip, trio.current_time()):
                address = (found[1], found[2])
                probe = dcutr.encode_probe(None, self._rng)
                self._quic.endpoint_for(address).send_short_lived(probe, address, hops)

    # -- what comes from addresses that nobody named --------------------------------------------------------
    def _await_probes(
        self, token: bytes, targets: Sequence[Target], peer: PeerId, nursery: trio.Nursery, report: PunchReport
    ) -> None:
        """Dial where probes with our token come from, once each and few in all."""
        from lattica.transports.quic_connection import to_multiaddr

        dialled = {target.addr for target in targets if target.proven}
        places = len(dialled) + 2

        def arrived(address: Address) -> None:
            addr = to_multiaddr(address)
            if addr not in dialled and len(dialled) < places:
                dialled.add(addr)
                report.tried.append(f"{addr} (from where its probe came)")
                nursery.start_soon(self._dial_quic, addr, peer, report)

        self._expected[token] = arrived
        if self._quic is not None:
            for endpoint in self._quic.endpoints:
                endpoint.on_probe = self._probe_arrived

    def _probe_arrived(self, data: bytes, address: Address) -> None:
        token = dcutr.probe_token_untrusted(data)
        arrived = None if token is None else self._expected.get(token)
        if arrived is not None:
            arrived(address)

    @contextmanager
    def _expecting(self, targets: Sequence[Target]) -> Iterator[None]:
        """Tell the TCP transport who may connect and then wait for us to begin."""
        ips = {str(address) for target in targets if (address := target.addr.ip()) is not None}
        punching = None if self._tcp is None else self._tcp.punching
        if punching is not None:
            punching.update(ips)
        try:
            yield
        finally:
            if punching is not None:
                punching.subtract(ips)
                for ip in ips:
                    if punching[ip] <= 0:
                        del punching[ip]

    # -- our own addresses --------------------------------------------------------------------------------
    def candidates(self) -> list[Multiaddr]:
        """Where the partner may find us: observed, mapped and local addresses."""
        own = [addr for addr in self._host.advertised_addrs() if not addr.is_circuit]
        return list(dict.fromkeys([*self.more_candidates(), *self._observed(), *own]))[:MAX_CANDIDATES]

    def _observed(self) -> list[Multiaddr]:
        """What directly connected peers see as the address of a socket we listen on, the most often seen first."""
        votes: dict[Multiaddr, int] = {}
        for connection in self._host.connections():
            observed = connection.observed_addr
            if observed is None or observed.is_circuit or connection.path == "relay":
                continue
            found, local = observed.host_port(), connection.local_addr.host_port()
            if found and local and local[2] == self._listening_port(found[0], connection.local_addr):
                votes[observed] = votes.get(observed, 0) + 1
        return sorted(votes, key=lambda addr: -votes[addr])

    def _listening_port(self, kind: str, like: Multiaddr) -> int | None:
        """The port we listen on with TCP or UDP, in the address family of `like`."""
        family = like.value("ip6") is None
        for addr in self._host.bound_addrs():  # the addresses of the interfaces do not matter, and take time to list
            found = addr.host_port()
            if found is not None and found[0] == kind and not addr.is_circuit and (addr.value("ip6") is None) == family:
                return found[2]
        return None

    def _source_port(self, peer: PeerId | None, addr: Multiaddr) -> int | None:
        """Relays and bootstrap peers are dialled from the port we listen on: they see the mapping others can use."""
        watches = peer is not None and (self._circuits.is_relay(peer) or self._host.is_protected(peer))
        return self._listening_port("tcp", addr) if watches else None

    # -- state --------------------------------------------------------------------------------------------
    def _is_direct(self, peer: PeerId) -> bool:
        return self._direct_connection(peer) is not None

    def _direct_connection(self, peer: PeerId) -> Connection | None:
        direct = (c for c in self._host.connections(peer) if c.path != "relay" and not c.closed.is_set())
        return next(direct, None)

    async def _until_direct(self, peer: PeerId) -> None:
        if not self._is_direct(peer):
            await self._direct.setdefault(peer, trio.Event()).wait()

    async def _leave_relays(self, direct: Connection, nursery: trio.Nursery) -> None:
        """Close relayed connections with the peer when nothing runs on them any more; when the direct one is lost
        before, look for another.

        A peer comes by a relay also because it lost the direct path, of which we may not know yet: nothing is left for
        a path that gives no sign of life.
        """
        peer = direct.peer_id
        while not direct.closed.is_set():
            heard = direct.received_bytes
            direct.ask()
            with trio.move_on_after(SIGN_SECONDS):
                await direct.closed.wait()
            if direct.received_bytes == heard:
                direct.doubt()
            with trio.move_on_after(RELAYED_LINGER - SIGN_SECONDS):
                await direct.closed.wait()
                break
            if not self._relayed(peer):
                return
            for connection in self._relayed(peer):
                if connection.stream_count() == 0 and not direct.doubtful:
                    await connection.aclose()
        for connection in self._relayed(peer):
            self._consider(connection, nursery)

    def _relayed(self, peer: PeerId) -> list[Connection]:
        return [c for c in self._host.connections(peer) if c.path == "relay" and not c.closed.is_set()]

    def _report(self, relayed: Connection) -> PunchReport:
        return self.reports.of(relayed, trio.current_time(), is_direct=self._is_direct(relayed.peer_id))


async def _cancel_when(happened: Callable[[], Awaitable[None]], nursery: trio.Nursery) -> None:
    await happened()
    nursery.cancel_scope.cancel()


__all__ = ["HolePuncher", "PunchReport"]
