"""Finding out whether strangers reach us: connected peers that serve AutoNAT v2 try each address that might work.

What they find decides `host.reachability`, by which we take places at relays and serve the DHT or not, and which of
the observed and mapped addresses are advertised.
"""

from __future__ import annotations

import logging
import random
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

import trio

from lattica.errors import ConnectionLost, LatticaError
from lattica.host import PeerDisconnected, PeerIdentified, SelfChanged
from lattica.listen_addrs import interface_ips
from lattica_protocols.autonat.exchange import AskedRequest
from lattica_protocols.autonat.messages import (
    DIAL_BACK_PROTOCOL,
    DIAL_REQUEST_PROTOCOL,
    DialBack,
    DialBackResponse,
    DialStatus,
    ResponseStatus,
)
from lattica_protocols.autonat.reach import Outcome, Question, ReachTracker, Verdict
from lattica_protocols.errors import ProtocolError, RemoteProtocolError
from lattica_protocols.limits import AUTONAT_MAX_MESSAGE_BYTES
from lattica_protocols.nat.scope import is_local, voice_of

if TYPE_CHECKING:
    from collections.abc import Callable

    from lattica.host import Host
    from lattica.interfaces import Connection, Stream
    from lattica_protocols.autonat.exchange import Answer
    from lattica_protocols.multiaddr import Multiaddr
    from lattica_protocols.nat.scope import IpAddress
    from lattica_protocols.peer_id import PeerId

log = logging.getLogger("lattica.reach")

ASK_SECONDS: Final = 40.0
"""For one question: the data, a server's wait of 3 s at most, and its dial."""
HEARD_SECONDS: Final = 2.0
"""That a dial-back may come after the server's answer."""
SETTLE_SECONDS: Final = 10.0
"""From the start, or a change of our network, until what peers see without having tried counts: at first some of them
are not connected yet."""
_HIDDEN_VOICES: Final = 2


@dataclass(slots=True)
class _Expected:
    """A dial-back that may come."""

    addr: Multiaddr
    heard: trio.Event = field(default_factory=trio.Event)


class ReachService:
    """One for each node. `run` in a task."""

    def __init__(self, host: Host) -> None:
        self.asked = 0
        """Questions so far."""
        self.on_known: Callable[[], None] = lambda: None
        """Called when a verdict on an address has changed."""
        self.paid_bytes = 0
        """Data sent so that servers dial other IP addresses than the one they see us at."""
        self._host = host
        self._tracker = ReachTracker(random.Random(host.rng.getrandbits(64)))
        self._expected: dict[int, _Expected] = {}
        self._wakeup = trio.Event()
        self._settled_at = float("inf")
        host.handle(DIAL_BACK_PROTOCOL, self._dialled_back)

    def verdicts(self) -> dict[Multiaddr, Verdict]:
        """Of each address that is tried."""
        return self._tracker.verdicts()

    def reached(self) -> list[Multiaddr]:
        """Addresses at which strangers reach us."""
        return [addr for addr, verdict in self.verdicts().items() if verdict == "public"]

    async def run(self) -> None:
        """Until cancelled."""
        self._settled_at = trio.current_time() + SETTLE_SECONDS
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._follow)
            nursery.start_soon(self._settle)
            while True:
                self._wakeup = trio.Event()
                while (question := self._tracker.next_question(trio.current_time())) is not None:
                    nursery.start_soon(self._ask, question)
                due = self._tracker.next_timeout()
                with trio.move_on_at(float("inf") if due is None else due):
                    await self._wakeup.wait()

    def reset(self) -> None:
        """Our network changed."""
        self._tracker.reset(trio.current_time())
        self._settled_at = trio.current_time() + SETTLE_SECONDS
        self._apply()

    async def _settle(self) -> None:
        while True:
            await trio.sleep_until(max(self._settled_at, trio.current_time() + SETTLE_SECONDS))
            self._look()

    async def _follow(self) -> None:
        events = self._host.subscribe()
        self._look()
        async for event in events:
            if isinstance(event, PeerIdentified | PeerDisconnected | SelfChanged):
                self._look()

    def _look(self) -> None:
        now = trio.current_time()
        self._tracker.set_addrs(self.candidates(), now)
        self._tracker.set_servers(self.servers(), now)
        self._apply()

    def candidates(self) -> list[Multiaddr]:
        """Addresses at which strangers might reach us: public ones that are announced, listened on, seen or mapped."""
        host = self._host
        found = list(host.announce) or [addr for source in host.address_sources for addr in source()]
        found += [] if host.announce else host.listen_addrs()
        out = []
        for addr in found:
            ip = addr.ip()
            if ip is not None and not addr.is_circuit and addr.host_port() is not None and not is_local(ip):
                out.append(addr.without_peer())
        return out

    def servers(self) -> dict[PeerId, IpAddress]:
        """Who can try: those in a local network of ours cannot tell what others reach."""
        found: dict[PeerId, IpAddress] = {}
        for connection in self._host.connections():
            ip = connection.remote_addr.ip()
            if connection.path == "relay" or ip is None or is_local(ip):
                continue
            if DIAL_REQUEST_PROTOCOL in self._host.peerstore.protocols(connection.peer_id):
                found[connection.peer_id] = ip
        return found

    def _apply(self) -> None:
        """Tell the host what is known now."""
        host, verdicts = self._host, self._tracker.verdicts()
        unreachable = frozenset(addr for addr, verdict in verdicts.items() if verdict == "private")
        reachability: Verdict = self._tracker.overall()
        if not verdicts and trio.current_time() >= self._settled_at and self._looks_hidden():
            reachability = "private"
        changed = (unreachable, reachability) != (host.unreachable, host.reachability)
        host.unreachable, before, host.reachability = unreachable, host.reachability, reachability
        if before != reachability:
            log.info("reachability value=%s", reachability)
        self._wakeup.set()
        if changed:
            host.addrs_changed()

    def _looks_hidden(self) -> bool:
        """Whether several independent peers see us at IP addresses that no interface of ours has."""
        own, voices = set(interface_ips()), set()
        for connection in self._host.connections():
            observed, observer = connection.observed_addr, connection.remote_addr.ip()
            ip = None if observed is None or connection.path == "relay" else observed.ip()
            if ip is not None and observer is not None and ip not in own:
                voices.add(voice_of(observer))
        return len(voices) >= _HIDDEN_VOICES

    # -- one question -------------------------------------------------------------------------------------
    async def _ask(self, question: Question) -> None:
        nonce = self._host.rng.getrandbits(64)
        expected = self._expected[nonce] = _Expected(question.addr)
        self.asked += 1
        outcome = Outcome.NOTHING
        try:
            with trio.fail_after(ASK_SECONDS):
                answer = await self._exchange(question, nonce)
                if answer.status is ResponseStatus.OK and answer.dial_status is not DialStatus.DIAL_ERROR:
                    with trio.move_on_after(HEARD_SECONDS):
                        await expected.heard.wait()
                elif answer.status is ResponseStatus.OK:
                    outcome = Outcome.UNREACHED
        except (LatticaError, ProtocolError, trio.TooSlowError) as error:
            log.debug("reach_not_asked server=%s error=%s", question.server.short(), error)
            outcome = Outcome.LOST
        finally:
            del self._expected[nonce]
        if expected.heard.is_set():
            outcome = Outcome.REACHED
        log.debug("reach_asked server=%s addr=%s outcome=%s", question.server.short(), question.addr, outcome.value)
        if self._tracker.answered(question, outcome, trio.current_time()):
            verdict = self._tracker.known(question.addr)
            log.info("reach_known addr=%s verdict=%s", question.addr, verdict)
            self.on_known()
        self._apply()

    async def _exchange(self, question: Question, nonce: int) -> Answer:
        asked = AskedRequest(question.addr, nonce)
        connection = self._usable(question.server)
        stream = await self._host.open_stream(question.server, DIAL_REQUEST_PROTOCOL, connection=connection)
        try:
            while asked.answer is None:
                while (message := asked.poll_transmit()) is not None:
                    await stream.send_frame(message)
                asked.receive_untrusted(await stream.receive_frame(AUTONAT_MAX_MESSAGE_BYTES))
            return asked.answer
        finally:
            self.paid_bytes += asked.paid_bytes
            stream.reset()

    def _usable(self, server: PeerId) -> Connection:
        """A direct connection; not one from an address that we had before our network changed."""
        own = set(interface_ips())
        for connection in self._host.connections(server):
            local = connection.local_addr.ip()
            stale = local is not None and not local.is_unspecified and local not in own
            if connection.path != "relay" and not stale:
                return connection
        raise ConnectionLost("no direct connection is up")

    async def _dialled_back(self, stream: Stream) -> None:
        """Somebody connected with us and says for whom."""
        with trio.fail_after(HEARD_SECONDS):
            said = DialBack.decode_untrusted(await stream.receive_frame(AUTONAT_MAX_MESSAGE_BYTES))
            expected = self._expected.get(said.nonce or 0)
            if expected is None or not _is_at(stream.connection, expected.addr):
                raise RemoteProtocolError("a dial-back that nobody asked for")
            expected.heard.set()
            await stream.send_frame(DialBackResponse(status=0).encode())
            await stream.aclose()


def _is_at(connection: Connection, addr: Multiaddr) -> bool:
    """Whether the connection came in by the kind of socket that `addr` leads to. Behind a NAT more cannot be seen."""
    kind = "tcp" if addr.has("tcp") else "quic"
    if connection.direction != "inbound" or connection.path != kind:
        return False
    return (connection.local_addr.value("ip4") is None) == (addr.value("ip4") is None)
