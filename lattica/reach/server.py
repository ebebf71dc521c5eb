"""Trying for others whether they can be reached: AutoNAT versions 2 and 1, within one budget."""

from __future__ import annotations

import logging
import random
from collections import Counter
from typing import TYPE_CHECKING, Final

import trio

from lattica.listen_addrs import interface_ips
from lattica.reach.dial_back import dial_back
from lattica_protocols.autonat.admission import DialBudget, dial_reason
from lattica_protocols.autonat.exchange import ServedRequest
from lattica_protocols.autonat.messages import (
    DIAL_REQUEST_PROTOCOL,
    V1_PROTOCOL,
    DialStatus,
    V1Status,
    v1_addrs_untrusted,
    v1_response,
)
from lattica_protocols.errors import RemoteProtocolError
from lattica_protocols.limits import AUTONAT_MAX_MESSAGE_BYTES, AUTONAT_MAX_RUNNING, AUTONAT_V1_MAX_DIALS
from lattica_protocols.nat.scope import is_local

if TYPE_CHECKING:
    from lattica.host import Host
    from lattica.interfaces import Stream
    from lattica_protocols.multiaddr import Multiaddr
    from lattica_protocols.nat.scope import IpAddress

log = logging.getLogger("lattica.reach")

REQUEST_SECONDS: Final = 40.0
"""For all of a request: 100 kB over a slow line, and the dial."""


class DialServer:
    """Serves from the moment it is made."""

    def __init__(self, host: Host) -> None:
        self.budget = DialBudget()
        self.served: Counter[tuple[int, str]] = Counter()
        """Requests that were answered after a dial, by version and `DialStatus`."""
        self._host = host
        self._running = trio.CapacityLimiter(AUTONAT_MAX_RUNNING)
        self._rng = random.Random(host.rng.getrandbits(64))
        host.handle(DIAL_REQUEST_PROTOCOL, self._serve)
        host.handle(V1_PROTOCOL, self._serve_v1)

    # -- version 2 ----------------------------------------------------------------------------------------
    async def _serve(self, stream: Stream) -> None:
        observed = self._client(stream)
        peer = stream.connection.peer_id
        own = interface_ips()
        served = ServedRequest(
            lambda addr: self._dialable(addr, observed, own),
            lambda: self.budget.take_data(trio.current_time()),
            observed,
            self._rng,
            admitted=self._admit(stream, observed),
        )
        with trio.fail_after(REQUEST_SECONDS):
            while not served.finished:
                while (message := served.poll_transmit()) is not None:
                    await stream.send_frame(message)
                if served.finished:
                    break
                if served.dial is None:
                    served.receive_untrusted(await stream.receive_frame(AUTONAT_MAX_MESSAGE_BYTES))
                    continue
                await trio.sleep(served.dial.wait)
                async with self._running:
                    status = await dial_back(served.dial.addr, peer, served.dial.nonce)
                log.debug("dialled_back peer=%s addr=%s status=%s", peer.short(), served.dial.addr, status.name)
                self.served[2, status.name] += 1
                served.dialled(status)
            await stream.aclose()

    # -- version 1 ----------------------------------------------------------------------------------------
    async def _serve_v1(self, stream: Stream) -> None:
        observed = self._client(stream)
        peer = stream.connection.peer_id
        with trio.fail_after(REQUEST_SECONDS):
            addrs = v1_addrs_untrusted(await stream.receive_frame(AUTONAT_MAX_MESSAGE_BYTES), peer)
            if self._admit(stream, observed):
                await stream.send_frame(await self._try(stream, addrs, observed))
            else:
                await stream.send_frame(v1_response(V1Status.DIAL_REFUSED, "too many requests"))
            await stream.aclose()

    async def _try(self, stream: Stream, addrs: tuple[Multiaddr, ...], observed: IpAddress) -> bytes:
        peer = stream.connection.peer_id
        usable = [addr for addr in addrs if addr.ip() == observed and self._dialable(addr, observed, [])]
        if not usable:
            return v1_response(V1Status.DIAL_REFUSED, "no address at the IP address you have here")
        async with self._running:
            for addr in usable[:AUTONAT_V1_MAX_DIALS]:
                status = DialStatus.DIAL_ERROR
                with trio.move_on_after(REQUEST_SECONDS / 2 / AUTONAT_V1_MAX_DIALS):
                    status = await dial_back(addr, peer, None)
                log.debug("dialled_back_v1 peer=%s addr=%s status=%s", peer.short(), addr, status.name)
                if status is DialStatus.OK:
                    self.served[1, status.name] += 1
                    return v1_response(V1Status.OK, addr=addr)
        self.served[1, DialStatus.DIAL_ERROR.name] += 1
        return v1_response(V1Status.DIAL_ERROR, "none of the addresses answered")

    # -- both ---------------------------------------------------------------------------------------------
    def _client(self, stream: Stream) -> IpAddress:
        """Where the client is; a relayed one is somewhere else than it seems."""
        ip = stream.connection.remote_addr.ip()
        if stream.connection.path == "relay" or ip is None:
            raise RemoteProtocolError("asked over a relay")
        return ip

    def _admit(self, stream: Stream, observed: IpAddress) -> bool:
        if self._running.borrowed_tokens >= AUTONAT_MAX_RUNNING:
            return False
        return self.budget.take(stream.connection.peer_id, observed, trio.current_time())

    def _dialable(self, addr: Multiaddr, observed: IpAddress, own: list[IpAddress]) -> bool:
        ip = addr.ip()
        if ip is not None and ip.version == 6 and not any(o.version == 6 and not is_local(o) for o in interface_ips()):
            return ip == observed
        bare = addr.without_peer()
        return dial_reason(addr, observed, own) is None and any(t.can_dial(bare) for t in self._host.transports())
