"""One UDP socket and all QUIC connections on it, inbound and outbound.

That listening and dialling share the socket is what makes hole punching work: the NAT mapping that one made serves the
other. STUN shares it, too (`on_other_datagram`, `send_datagram`): by the first byte, 0 to 3 is STUN, 64 and up with the
fixed bit is QUIC (RFC 9443), and the rest is dropped, hole-punching noise among it.

Three tasks, however many connections there are:

* the reader drains the socket in batches and hands each datagram to its connection, found by connection id;
* the pump sends for every connection that was marked dirty, one turn of the scheduler later, so all that the tasks
  woken by one batch have written leaves together;
* the timer waits for the earliest deadline of a heap.
"""

from __future__ import annotations

import errno
import hmac
import time
from collections.abc import Callable
from heapq import heappop, heappush
from itertools import count
from typing import TYPE_CHECKING

import trio

from lattica.errors import DialError
from lattica.transports.quic_admission import Admission, Admitted, Answer, destination_id, source_id
from lattica.transports.quic_connection import QuicLink, to_multiaddr
from lattica.transports.quic_engine import RESET_TOKEN_BYTES, Address, Credentials, Engine
from lattica.transports.quic_socket import Datagrams, UdpSocket
from lattica_protocols.dcutr import PROBE_FIRST_BYTE

if TYPE_CHECKING:
    from lattica_protocols.peer_id import PeerId

OnOtherDatagram = Callable[[bytes, Address], None]
OnStunDatagram = Callable[[bytes, Address, bytes | None], None]
"""The last is what `send_datagram` needs to answer from the address that the datagram was sent to."""

_READS_PER_TURN = 32
"""Then the pump and the readers of streams get a turn."""
_UNREACHABLE = {errno.ENETUNREACH, errno.EHOSTUNREACH, errno.EINVAL, errno.EACCES, errno.EPERM, errno.EADDRNOTAVAIL}
_MAX_STUN_FIRST_BYTE = 3
_FIXED_BIT = 0x40


class Endpoint:
    """Runs in the task that calls `run`; every other method is a plain call, made from any task of the same loop."""

    def __init__(
        self,
        socket: UdpSocket,
        credentials: Credentials,
        admission: Admission,
        on_link: Callable[[Endpoint, QuicLink], None],
    ) -> None:
        self.socket = socket
        self.local_addr = to_multiaddr(socket.address)
        self.accepting = False
        self.on_other_datagram: OnStunDatagram | None = None
        """Gets each datagram that is not QUIC (STUN), with the sender's address. Must not raise."""
        self.on_probe: OnOtherDatagram | None = None
        """The same for hole punching's datagrams."""
        self.closed = False
        self.ends_with_links = False
        """Whether to close when the last connection is gone and no more are accepted."""
        self._credentials = credentials
        self._admission = admission
        self._on_link = on_link
        self._by_id: dict[bytes, QuicLink] = {}
        self._links: set[QuicLink] = set()
        self._dirty: dict[QuicLink, None] = {}
        self._pump_task: trio.lowlevel.Task | None = None
        self._backlog: list[tuple[Datagrams, bytes | None]] = []
        self._timers: list[tuple[float, int, QuicLink]] = []
        self._order = count()
        self._timer_scope: trio.CancelScope | None = None
        self._scope = trio.CancelScope()

    @property
    def links(self) -> set[QuicLink]:
        """All connections, half-open and closing ones among them."""
        return self._links

    async def run(self) -> None:
        """Until `close`, or until cancelled."""
        try:
            with self._scope:
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(self._read)
                    nursery.start_soon(self._pump)
                    nursery.start_soon(self._watch_timers)
        finally:
            self._shut_down()

    def close(self) -> None:
        """End all connections and the tasks."""
        self._scope.cancel()

    def connect(self, remote: Address, expected: PeerId | None, *, refusable: bool = False) -> QuicLink:
        """Start an outbound handshake; wait for `link.settled`.

        `refusable`: ICMP errors end it. A punched hole must not be: the other side's NAT may refuse us at first.
        """
        if self.closed:
            raise DialError("the socket is closed")
        engine = Engine(self._credentials, is_client=True)
        link = QuicLink(self, engine, "outbound", remote, expected)
        link.refusable = refusable
        self._links.add(link)
        self.add_connection_id(link, engine.host_cid)
        engine.connect(remote, trio.current_time())
        self.transmit_now(link)
        return link

    def send_datagram(self, data: bytes, addr: Address, source: bytes | None = None) -> None:
        """Send something that is not QUIC: STUN, or noise that opens a NAT. Lost silently like any datagram."""
        if not self.closed:
            self.socket.send([(data, addr)], source, _ignore)

    def send_short_lived(self, data: bytes, addr: Address, hops: int) -> None:
        """Send something that dies after `hops` hops: it opens our own NAT and reaches no other box."""
        if not self.closed:
            self.socket.send_short_lived(data, addr, hops)

    def wall_clock(self) -> float:
        """Unix time, for the dates of certificates."""
        return time.time()

    # -- called by the connections ------------------------------------------------------------------------------------
    def schedule(self, link: QuicLink) -> None:
        """Send for `link` when the tasks that run now have run."""
        self._dirty[link] = None
        if self._pump_task is not None:
            task, self._pump_task = self._pump_task, None
            trio.lowlevel.reschedule(task)

    def transmit_now(self, link: QuicLink) -> None:
        """Send for `link` at once, and set its timer."""
        if self.closed:
            return
        now = trio.current_time()
        self._dirty.pop(link, None)
        datagrams = link.transmit(now)
        if datagrams:
            self._send(link, datagrams, now)
        self._set_timer(link)

    def add_connection_id(self, link: QuicLink, connection_id: bytes) -> None:
        self._by_id[connection_id] = link
        link.connection_ids.add(connection_id)

    def remove_connection_id(self, link: QuicLink, connection_id: bytes) -> None:
        link.connection_ids.discard(connection_id)
        if self._by_id.get(connection_id) is link:
            del self._by_id[connection_id]

    def handshake_over(self, link: QuicLink) -> None:
        """The handshake succeeded, or the connection ended."""
        self._admission.settled(link)
        if link.established and link.direction == "inbound" and not link.closed.is_set():
            self._on_link(self, link)

    # -- receiving ----------------------------------------------------------------------------------------------------
    async def _read(self) -> None:
        socket = self.socket
        while True:
            await socket.wait_readable()
            now = trio.current_time()
            touched: set[QuicLink] = set()
            for turn in range(_READS_PER_TURN):
                received = socket.receive()
                if received is None:
                    if turn == 0:  # what woke us was no datagram
                        self._handle_errors()
                    break
                datagrams, addr, source = received
                if not datagrams:
                    self._handle_errors()
                for data in datagrams:
                    link = self._dispatch(data, addr, source, now)
                    if link is not None:
                        link.source = source
                        touched.add(link)
            for link in touched:
                link.handle_events(now)
                self.schedule(link)

    def _handle_errors(self) -> None:
        """ICMP says that a datagram did not arrive. It has to quote the random id of a handshake that may be refused:
        anybody can send ICMP."""
        for quoted, addr, error in self.socket.receive_errors():
            link = self._by_id.get(source_id(quoted) or b"")
            if link is not None and link.refusable and link.remote[:2] == addr[:2] and not link.established:
                link.send_failed(error)
                self.schedule(link)

    def _dispatch(self, data: bytes, addr: Address, source: bytes | None, now: float) -> QuicLink | None:
        """Give one datagram to its connection, and return that."""
        if not data:
            return None
        if not data[0] & _FIXED_BIT:
            if data[0] <= _MAX_STUN_FIRST_BYTE and self.on_other_datagram is not None:
                self.on_other_datagram(data, addr, source)
            elif data[0] == PROBE_FIRST_BYTE and self.on_probe is not None:
                self.on_probe(data, addr)
            return None
        to = destination_id(data)
        if to is None:
            return None
        link = self._by_id.get(to) or self._stranger(data, addr, now)
        if link is not None:
            link.receive(data, addr, now)
        return link

    def _stranger(self, data: bytes, addr: Address, now: float) -> QuicLink | None:
        """A datagram that belongs to no connection; perhaps it starts one."""
        if not data[0] & 0x80 and self._is_stateless_reset(data, addr, now):
            return None
        verdict = self._admission.judge(data, addr, self.accepting, now)
        if isinstance(verdict, Answer):
            self.send_datagram(verdict.data, addr)
        if not isinstance(verdict, Admitted):
            return None
        engine = Engine(
            self._credentials,
            is_client=False,
            original_destination_connection_id=verdict.original_destination_id,
            retry_source_connection_id=verdict.retry_source_id,
        )
        link = QuicLink(self, engine, "inbound", addr, None)
        self._links.add(link)
        self._admission.opened(link, addr)
        self.add_connection_id(link, verdict.destination_id)
        self.add_connection_id(link, engine.host_cid)
        return link

    def _is_stateless_reset(self, data: bytes, addr: Address, now: float) -> bool:
        """Whether it is one, or there is no budget to find out."""
        if not self._admission.may_answer(now):
            return True
        token = data[-RESET_TOKEN_BYTES:]
        for link in self._links:
            if link.remote == addr and link.stateless_reset(token):
                self._forget(link)
                return True
        return False

    # -- sending ------------------------------------------------------------------------------------------------------
    async def _pump(self) -> None:
        while True:
            if not self._dirty:
                self._pump_task = trio.lowlevel.current_task()
                await trio.lowlevel.wait_task_rescheduled(self._stop_pump)
            # Tasks that were woken together with this one may not have run yet: what they write leaves with the rest.
            await trio.lowlevel.checkpoint()
            while self._backlog:
                await self.socket.wait_writable()
                backlog, self._backlog = self._backlog, []
                for datagrams, source in backlog:
                    self._send_or_keep(datagrams, source)
            dirty, self._dirty = self._dirty, {}
            for link in dirty:
                self.transmit_now(link)

    def _stop_pump(self, _: object) -> trio.lowlevel.Abort:
        self._pump_task = None
        return trio.lowlevel.Abort.SUCCEEDED

    def _send(self, link: QuicLink, datagrams: Datagrams, now: float) -> None:
        def failed(addr: Address, size: int, error: OSError) -> None:
            if error.errno == errno.EMSGSIZE:
                link.datagram_too_big(size, now)
                self.schedule(link)
            elif error.errno in _UNREACHABLE and not link.established:
                link.send_failed(error)
            elif error.errno in _UNREACHABLE:
                link.source = None  # an address that we do not have any more: the system chooses another one

        rest = self.socket.send(datagrams, link.source, failed)
        if rest:
            self._backlog.append((rest, link.source))
            self.schedule(link)

    def _send_or_keep(self, datagrams: Datagrams, source: bytes | None) -> None:
        rest = self.socket.send(datagrams, source, _ignore)
        if rest:
            self._backlog.append((rest, source))

    # -- timers -------------------------------------------------------------------------------------------------------
    def _set_timer(self, link: QuicLink) -> None:
        deadline = link.next_timeout()
        if deadline is None:
            self._forget(link)
        elif deadline < link.scheduled_at:
            link.scheduled_at = deadline
            heappush(self._timers, (deadline, next(self._order), link))
            if self._timer_scope is not None and deadline < self._timer_scope.deadline:
                self._timer_scope.deadline = deadline

    async def _watch_timers(self) -> None:
        while True:
            with trio.CancelScope() as scope:
                scope.deadline = self._timers[0][0] if self._timers else float("inf")
                self._timer_scope = scope
                await trio.sleep_forever()
            self._timer_scope = None
            await trio.lowlevel.checkpoint_if_cancelled()
            now = trio.current_time()
            while self._timers and self._timers[0][0] <= now:
                deadline, _, link = heappop(self._timers)
                if deadline != link.scheduled_at or link not in self._links:
                    continue
                link.scheduled_at = float("inf")
                due = link.next_timeout()
                if due is None or due <= now:
                    link.handle_timer(now)
                    self.transmit_now(link)
                else:
                    self._set_timer(link)

    # -- the end ------------------------------------------------------------------------------------------------------
    def _forget(self, link: QuicLink) -> None:
        for connection_id in list(link.connection_ids):
            self.remove_connection_id(link, connection_id)
        self._links.discard(link)
        self._dirty.pop(link, None)
        self._admission.settled(link)
        self.close_if_unused()

    def close_if_unused(self) -> None:
        """Where `ends_with_links` says so."""
        if self.ends_with_links and not self._links and not self.accepting:
            self.close()

    def _shut_down(self) -> None:
        for link in list(self._links):
            link.abort()
            self._forget(link)
        self.closed = True
        self._timers.clear()
        self.socket.close()


def new_reset_secret(key_seed: bytes) -> bytes:
    """The secret behind stateless resets: the same after a restart, of no use for anything else."""
    return hmac.digest(key_seed, b"lattica quic stateless reset", "sha256")


def _ignore(addr: Address, size: int, error: OSError) -> None:
    """A datagram that was lost on our side of the network."""


__all__ = ["Endpoint", "OnOtherDatagram", "new_reset_secret"]
