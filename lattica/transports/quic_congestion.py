"""How fast a QUIC connection sends: CUBIC and pacing, shaped for an engine that runs in Python.

aioquic's own CUBIC and pacer are built for small datagrams and exact timers. Four things differ here.

* Datagrams grow while the connection runs (see `quic_mtu`), so sizes are not fixed at construction.
* A Python peer answers in bursts, a few milliseconds apart. That jitter looks like a filling queue to HyStart, which
  would end slow start at a few dozen kilobytes; it has to last longer and be larger here.
* Grown without being used, a window says nothing about the path; aioquic lets it grow.
* Waking up costs about 50 us, so the pacer lets at least a millisecond's worth of packets out each time, and does
  not pace at all when the round trip is too short for a queue to build up in the network.
"""

from __future__ import annotations

from collections.abc import Iterable

from aioquic.quic.congestion.base import register_congestion_control
from aioquic.quic.congestion.cubic import CubicCongestionControl
from aioquic.quic.packet_builder import QuicSentPacket
from aioquic.quic.recovery import QuicPacketPacer

ALGORITHM = "lattica-cubic"
"""The name under which `QuicConfiguration.congestion_control_algorithm` finds it."""

BASE_DATAGRAM_BYTES = 1200
"""What every QUIC path carries (RFC 9000 section 14)."""

BURST_BYTES = 512 * 1024
"""Sent without looking at the socket in between: about 5 ms of encryption, half of a receiver's socket buffer."""

_BURST_PACKETS = 64
_PACING_RTT_SECONDS = 0.004
"""Below this round trip nothing is paced: the burst limit alone keeps queues under a few milliseconds."""
_PACING_INTERVAL_SECONDS = 0.002
"""How much the pacer lets out at once, in time at the pacing rate."""
_PACING_GAIN = 1.25
"""Pace a quarter faster than the window drains, so that pacing never limits the window (RFC 9002 section 7.7)."""
_QUEUE_SECONDS = 0.008
"""A rise of the round trip below this is jitter of the peer's scheduler and no reason to leave slow start."""


class Cubic(CubicCongestionControl):
    """CUBIC that knows datagrams may grow and counts losses of large ones for black-hole detection."""

    def __init__(self, max_datagram_size: int) -> None:
        super().__init__(max_datagram_size=max_datagram_size)
        self.large_loss_events = 0
        """Loss events in a row that hit datagrams over the base size, with none of them acknowledged between."""
        self._rtt_floor = float("inf")

    def set_datagram_size(self, size: int) -> None:
        """Account in segments of `size` from now on; the window starts anew at no less than the initial one."""
        self._max_datagram_size = size
        self.additive_increase_factor = size
        # RFC 9002 section 7.2: min(10 * size, max(2 * size, 14720)).
        self.congestion_window = max(self.congestion_window, min(10 * size, max(2 * size, 14720)))

    def on_packet_acked(self, *, now: float, packet: QuicSentPacket) -> None:
        if packet.sent_bytes > BASE_DATAGRAM_BYTES:
            self.large_loss_events = 0
        if 2 * self.bytes_in_flight < self.congestion_window:
            # Not the window limits us but the application: it has proven nothing (RFC 9002 section 7.8).
            self.bytes_in_flight -= packet.sent_bytes
            self.last_ack = packet.sent_time or now
            return
        super().on_packet_acked(now=now, packet=packet)

    def on_packets_lost(self, *, now: float, packets: Iterable[QuicSentPacket]) -> None:
        lost = list(packets)
        self._count_large(lost)
        super().on_packets_lost(now=now, packets=lost)

    def on_packets_expired(self, *, packets: Iterable[QuicSentPacket]) -> None:
        expired = list(packets)
        self._count_large(expired)
        super().on_packets_expired(packets=expired)

    def on_rtt_measurement(self, *, now: float, rtt: float) -> None:
        self._rtt_floor = min(self._rtt_floor, rtt)
        if rtt - self._rtt_floor < _QUEUE_SECONDS:
            self.rtt = rtt
            return
        super().on_rtt_measurement(now=now, rtt=rtt)

    def _count_large(self, packets: list[QuicSentPacket]) -> None:
        if any(packet.sent_bytes > BASE_DATAGRAM_BYTES for packet in packets):
            self.large_loss_events += 1


class BurstPacer(QuicPacketPacer):
    """Paces in bursts worth a wake-up, and limits what one transmission may hold."""

    def __init__(self, *, max_datagram_size: int) -> None:
        super().__init__(max_datagram_size=max_datagram_size)
        self._left = _BURST_PACKETS
        self._rate: float | None = None

    def begin_turn(self) -> None:
        """A new transmission starts: it may hold a whole burst again."""
        self._left = max(8, min(_BURST_PACKETS, BURST_BYTES // self._max_datagram_size))

    def limit_turn(self, packets: int) -> None:
        """This transmission may hold no more than `packets`."""
        self._left = packets

    def set_datagram_size(self, size: int) -> None:
        self._max_datagram_size = size

    def next_send_time(self, now: float) -> float | None:  # type: ignore[override]  # its annotation lacks None
        if self._left <= 0:
            return now
        if self._rate is None:
            return None
        self.update_bucket(now=now)
        if self.bucket_time <= 0:
            return now + min(self.bucket_max, _PACING_INTERVAL_SECONDS)
        return None

    def update_after_send(self, now: float) -> None:
        self._left -= 1
        if self._rate is not None:
            self.bucket_time -= self._max_datagram_size / self._rate

    def update_rate(self, congestion_window: int, smoothed_rtt: float) -> None:
        if smoothed_rtt < _PACING_RTT_SECONDS:
            self._rate = None
            return
        self._rate = _PACING_GAIN * congestion_window / smoothed_rtt
        self.bucket_max = max(_PACING_INTERVAL_SECONDS, 2 * self._max_datagram_size / self._rate)
        self.bucket_time = min(self.bucket_time, self.bucket_max)


register_congestion_control(ALGORITHM, Cubic)
