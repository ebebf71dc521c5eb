"""Takes RPC sessions from one path to another: when theirs is lost, and when a direct one comes up beside a relay.

    opener of the new stream                         the other side
    RESUME(session, epoch, what it has)        ->
                                               <-    RESUME(session, epoch, what it has), what the opener misses
    what the other side misses                 ->

From its RESUME on each side is deaf to the streams before, so what it said to have stays true. Either side may open;
when both do at once, the higher epoch counts, and of two that are equal the one of the session's initiator. Refused is
with ERROR: CONNECTION_LOST when there is no such session (the process was restarted), RESOURCE_EXHAUSTED when the epoch
is not high enough, with the one to exceed as call id.
"""

from __future__ import annotations

import logging
import random
from collections.abc import Callable
from typing import TYPE_CHECKING, Final

import trio

from lattica.errors import LatticaError
from lattica.retry import Retry
from lattica.rpc.peer_channel import SILENT_SECONDS, PeerChannel
from lattica_protocols.errors import ProtocolError, RemoteProtocolError
from lattica_protocols.limits import RPC_MAX_SUSPENDED
from lattica_protocols.paths.retry import MOVE_PAUSES
from lattica_protocols.rpc.frames import (
    CONNECTION_LOST,
    ERROR,
    FINAL,
    HEADER,
    HEADER_SIZE,
    PROTOCOL_ID,
    RESOURCE_EXHAUSTED,
    RESUME,
    decode_error_head_untrusted,
    encode_error_head,
    encode_frame,
)
from lattica_protocols.rpc.resume import MAX_RESUME_HEAD, Resume, decode_resume_head_untrusted

if TYPE_CHECKING:
    from lattica.host import Host
    from lattica.interfaces import Connection, Stream
    from lattica_protocols.peer_id import PeerId

log = logging.getLogger("lattica.rpc")

FindSession = Callable[["PeerId", bytes], "PeerChannel | None"]

YIELD_SECONDS: Final = 1.0
"""The side that did not open the session leaves the first attempt to the other one."""
RELAY_DELAY: Final = 0.1
"""A direct path that is up wins over a relay that is by so much quicker."""
DIAL_DELAY: Final = 0.5
"""Connections that are up may have died with the one that was lost: after this a new one is made besides."""
STREAM_SECONDS: Final = 10.0
"""For one attempt to get a stream that answers."""
ANSWER_SECONDS: Final = 5.0
"""The stream has just brought the answer of its negotiation, so this is for a path that dies now."""
PAUSE_SECONDS: Final = (0.1, 2.0)
"""Between attempts: doubling from the first to the second."""


class SessionPaths:
    """Of all sessions of one node. `find` knows them."""

    def __init__(self, host: Host, find: FindSession) -> None:
        self._host = host
        self._rng = random.Random(host.rng.getrandbits(64))
        self._find = find
        self._suspended: dict[PeerChannel, None] = {}
        """In the order in which they lost their paths."""
        self._leaving: dict[PeerChannel, Retry] = {}
        """Sessions that are to leave a relay."""

    # -- this side ----------------------------------------------------------------------------------------
    async def reopen(self, channel: PeerChannel) -> None:
        """Find a path for a suspended session, until it is up again or its time is over."""
        mine = channel.suspensions
        self._make_room(channel)
        log.info("session_suspended peer=%s reason=%s", channel.peer.short(), channel.lost_reason)
        try:
            with trio.move_on_at(channel.give_up_at):
                await self._reopen(channel, mine)
            if channel.is_suspended(mine):
                channel.abort(channel.lost_reason)
        finally:
            if channel.suspensions == mine:
                self._suspended.pop(channel, None)

    def _make_room(self, channel: PeerChannel) -> None:
        """Note that a session waits. When too many with its peer do, one ends: the oldest without calls, if any."""
        self._suspended[channel] = None
        waiting = [c for c in self._suspended if c.peer == channel.peer and c.machine.suspended]
        if len(waiting) > RPC_MAX_SUSPENDED:
            loser = next((c for c in waiting if not c.seeks_path), waiting[0])
            loser.abort(loser.lost_reason)

    async def _reopen(self, channel: PeerChannel, mine: int) -> None:
        if not channel.seeks_path:
            await channel.ready()
            return
        if not channel.initiator:
            with trio.move_on_after(YIELD_SECONDS):
                await channel.ready()
        pause = PAUSE_SECONDS[0]
        while channel.is_suspended(mine):
            stream = await self._first_stream(channel.peer)
            if stream is not None:
                if not channel.is_suspended(mine):
                    stream.reset()
                elif await self._propose(channel, stream):
                    return
            with trio.move_on_after(pause * self._host.rng.uniform(0.75, 1.25)):
                await channel.ready()
            pause = min(2 * pause, PAUSE_SECONDS[1])

    async def leave_relay(self, channel: PeerChannel) -> None:
        """Take a session to a direct path: again and again, for as long as there is one and it is not on it."""
        if channel in self._leaving:
            self._leaving[channel].news()
            return
        retry = self._leaving[channel] = Retry(MOVE_PAUSES, self._rng)
        try:
            while (direct := self._better(channel)) is not None:
                await self._move(channel, direct)
                if self._better(channel) is None:
                    return
                await retry.rest()
        finally:
            del self._leaving[channel]

    def network_changed(self) -> None:
        """What failed may work now."""
        for retry in self._leaving.values():
            retry.news()

    def _better(self, channel: PeerChannel) -> Connection | None:
        """The direct connection that a session which goes over a relay should be on."""
        if channel.closed.is_set() or channel.machine.going_away or channel.stream.connection.path != "relay":
            return None
        best = self._host.connection(channel.peer)
        return best if best is not None and best.path != "relay" else None

    async def _move(self, channel: PeerChannel, connection: Connection) -> None:
        """Take a session that works from a relay to `connection`."""
        await channel.greeted.wait()
        if channel.closed.is_set() or channel.machine.suspended:
            return
        if channel.machine.resumption is None:
            channel.retire()
            return
        try:
            stream = await self._host.open_stream(channel.peer, PROTOCOL_ID, connection=connection, eager=True)
        except (LatticaError, ProtocolError) as error:
            log.info("session_stays peer=%s error=%s", channel.peer.short(), error)
            return
        if channel.closed.is_set() or channel.machine.suspended or channel.stream.connection.path != "relay":
            stream.reset()
            return
        channel.suspend("the session could not be taken to the direct path", SILENT_SECONDS, reopen=False)
        if not await self._propose(channel, stream) and channel.machine.suspended:
            await self.reopen(channel)

    async def _first_stream(self, peer: PeerId) -> Stream | None:
        """A stream whose peer answers: over whichever connection that is up does so first, else over a new one."""
        found: list[Stream] = []
        up = self._host.connections(peer)

        async def try_one(delay: float, connection: Connection | None) -> None:
            try:
                await trio.sleep(delay)
                if connection is None:
                    connection = await self._dial(peer, bool(up))
                stream = await self._host.open_stream(peer, PROTOCOL_ID, connection=connection, eager=True)
            except (LatticaError, ProtocolError) as error:
                log.debug("session_not_resumed peer=%s error=%s", peer.short(), error)
                return
            found.append(stream)
            nursery.cancel_scope.cancel()

        with trio.move_on_after(STREAM_SECONDS):
            async with trio.open_nursery() as nursery:
                for connection in up:
                    nursery.start_soon(try_one, RELAY_DELAY if connection.path == "relay" else 0.0, connection)
                nursery.start_soon(try_one, DIAL_DELAY if up else 0.0, None)
        for stream in found[1:]:
            stream.reset()
        return found[0] if found else None

    async def _dial(self, peer: PeerId, beside: bool) -> Connection:
        if beside:
            return await self._host.dial(peer, self._host.peerstore.addrs(peer))
        return await self._host.connect(peer)

    async def _propose(self, channel: PeerChannel, stream: Stream) -> bool:
        """Offer `stream` to the peer. Whether the session goes on, over this stream or another one, or has ended."""
        epoch = channel.epoch = (channel.epoch + 1) & 0xFFFFFFFF
        channel.proposing = True
        attached = False
        try:
            stream.write(encode_frame(RESUME, 0, 0, Resume(channel.session, epoch, channel.account()).encode()))
            with trio.fail_after(ANSWER_SECONDS):
                kind, call_id, head = await _receive_frame(stream)
            if channel.epoch != epoch or channel.closed.is_set():
                return True  # the peer's own proposal was quicker
            if kind == ERROR:
                return _refused(channel, call_id, head)
            answer = decode_resume_head_untrusted(head)
            if kind != RESUME or (answer.session, answer.epoch) != (channel.session, epoch):
                raise RemoteProtocolError("the answer to a RESUME is for another one")
            attached = True
            channel.attach(stream, answer.account)
            log.info("session_resumed peer=%s path=%s", channel.peer.short(), stream.connection.path)
            return True
        except (LatticaError, trio.TooSlowError) as error:
            log.debug("session_not_resumed peer=%s error=%s", channel.peer.short(), error)
            return False
        except RemoteProtocolError as error:
            channel.abort(f"the peer broke the protocol: {error}")
            return True
        finally:
            if channel.epoch == epoch:
                channel.proposing = False
            if not attached:
                stream.reset()

    # -- the other side -----------------------------------------------------------------------------------
    async def accept(self, stream: Stream, head: bytes) -> None:
        """The peer opened a stream with a RESUME. Returns when the stream is closed."""
        resume = decode_resume_head_untrusted(head)
        channel = self._find(stream.connection.peer_id, resume.session)
        if channel is None or channel.closed.is_set() or channel.machine.resumption is None:
            await _refuse(stream, 0, CONNECTION_LOST, "there is no such session")
            return
        tie = resume.epoch == channel.epoch and channel.proposing and not channel.initiator
        if resume.epoch <= channel.epoch and not tie:
            await _refuse(stream, channel.epoch, RESOURCE_EXHAUSTED, "the epoch is not above that of the session")
            return
        channel.detach()
        channel.epoch, channel.proposing = resume.epoch, False
        answer = Resume(channel.session, resume.epoch, channel.account())
        stream.write(encode_frame(RESUME, 0, 0, answer.encode()))
        try:
            path = channel.attach(stream, resume.account)
        except RemoteProtocolError as error:
            channel.abort(f"the peer broke the protocol: {error}")
            raise
        log.info("session_resumed peer=%s path=%s", channel.peer.short(), stream.connection.path)
        await path.gone.wait()


async def _receive_frame(stream: Stream) -> tuple[int, int, bytes]:
    """`(kind, call id, head)` of the one frame that answers a RESUME."""
    body, kind, _, head_length, call_id = HEADER.unpack(await stream.receive_exactly(HEADER_SIZE))
    if body != head_length or body > MAX_RESUME_HEAD:
        raise RemoteProtocolError(f"frame of kind {kind} and {body} bytes in answer to a RESUME")
    return kind, call_id, await stream.receive_exactly(body)


async def _refuse(stream: Stream, epoch: int, code: int, message: str) -> None:
    stream.write(encode_frame(ERROR, FINAL, epoch, encode_error_head(code, "NotResumed", message)))
    await stream.aclose()


def _refused(channel: PeerChannel, epoch: int, head: bytes) -> bool:
    """The peer said no. Whether that is the end of the session."""
    if decode_error_head_untrusted(head)[0] != RESOURCE_EXHAUSTED:
        channel.abort(f"{channel.lost_reason}; the peer does not know the session any more (was it restarted?)")
        return True
    channel.epoch = max(channel.epoch, epoch)
    return False
