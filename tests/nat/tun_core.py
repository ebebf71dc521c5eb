"""The core of a lab as one process: every packet between hosts and boxes passes it, and is delayed, lost or held there.

    host or box -- TUN device in its namespace -- this process -- TUN device -- host or box

It routes by destination address, takes one from the TTL (and says so by ICMP when none is left), and applies the
`Conditions` of the moment: loss drawn from a seed, a rate for each line, both ways, with a queue that drops what does
not fit, then the delay. It is told of lines and conditions by JSON datagrams, a TUN device along with each line.

    python tests/nat/tun_core.py FD SEED        FD: its end of the control socket
    python tests/nat/tun_core.py --probe        whether a TUN device can be made here; says why not
"""

from __future__ import annotations

import fcntl
import heapq
import json
import os
import random
import select
import socket
import struct
import sys
import time
from dataclasses import asdict, dataclass
from typing import Any

_TUNSETIFF = 0x400454CA
_IFF_TUN_NO_PI = 0x1001
_QUEUE_SECONDS = 0.2
"""What a line with a rate holds at most, as a home router's buffer does."""
_READS = 32
"""Packets taken from one device before the others have their turn."""
GATEWAY = socket.inet_aton("169.254.0.1")


@dataclass(frozen=True)
class Conditions:
    """On the core. `delay`: seconds one way between two places that are not central; a central one is halfway. `rate`:
    bytes a second of each line that is not central, 0: any."""

    delay: float = 0.0
    loss: float = 0.0
    rate: float = 0.0

    def __str__(self) -> str:
        loss = f", {self.loss:.0%} loss" if self.loss else ""
        rate = f", {self.rate * 8e-6:g} Mbit/s" if self.rate else ""
        return f"{2e3 * self.delay:g} ms round trip{loss}{rate}"


class TunCore:
    """The near end: what a lab tells its core."""

    def __init__(self, seed: int) -> None:
        import subprocess

        self._control, far = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with far:
            command = [sys.executable, __file__, str(far.fileno()), str(seed)]
            self._process = subprocess.Popen(command, pass_fds=[far.fileno()])

    def add_line(self, device: int, address: str, *, central: bool) -> None:
        """A TUN device, which is closed here, and the address behind it."""
        self._tell({"do": "line", "address": address, "central": central}, device)
        os.close(device)

    def add_route(self, prefix: str, via: str) -> None:
        """`prefix`: an address, or the first three numbers of a /24. Replaces another route for it."""
        self._tell({"do": "route", "prefix": prefix, "via": via})

    def set_conditions(self, conditions: Conditions) -> None:
        """For what is sent from now on."""
        self._tell({"do": "conditions", **asdict(conditions)})

    def counts(self) -> dict[str, int]:
        """Packets so far: `carried`, `lost` by chance, `full` (no room in a queue)."""
        found: dict[str, int] = self._tell({"do": "counts"})
        return found

    def close(self) -> None:
        """Ends the process."""
        self._control.close()
        self._process.wait(10)

    def _tell(self, message: dict[str, Any], *devices: int) -> Any:
        socket.send_fds(self._control, [json.dumps(message).encode()], devices)
        answer = self._control.recv(65536)
        assert answer, "the core has died"
        return json.loads(answer)


def open_tun(name: str) -> int:
    """A TUN device in the namespace of this thread; it goes away when its last descriptor is closed."""
    device = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        fcntl.ioctl(device, _TUNSETIFF, struct.pack("16sH22x", name.encode(), _IFF_TUN_NO_PI))
    except OSError:
        os.close(device)
        raise
    return device


def tun_problem() -> str | None:
    """Why no TUN device can be made in this namespace, `None` when it can."""
    try:
        os.close(open_tun("probe"))
    except OSError as error:
        return f"no TUN device can be made here ({error.strerror}: /dev/net/tun)"
    return None


# -- the process -----------------------------------------------------------------------------------------------------
class _Line:
    """A device and when it is free again, each way."""

    def __init__(self, device: int, central: bool) -> None:
        self.device = device
        self.central = central
        self.up_free = self.down_free = 0.0


class _Core:
    def __init__(self, control: socket.socket, seed: int) -> None:
        self._control = control
        self._rng = random.Random(seed)
        self._conditions = Conditions()
        self._lines: dict[int, _Line] = {}
        self._routes: dict[bytes, _Line] = {}
        self._heap: list[tuple[float, int, int, bytes]] = []
        self._counts = {"carried": 0, "lost": 0, "full": 0}
        self._sent = 0
        self._reading: list[int] = [control.fileno()]

    def run(self) -> None:
        """Until the lab closes its end."""
        while True:
            timeout = max(0.0, self._heap[0][0] - time.monotonic()) if self._heap else None
            for fd in select.select(self._reading, (), (), timeout)[0]:  # epoll's timeout is in whole milliseconds
                if fd != self._control.fileno():
                    self._read(self._lines[fd])
                elif not self._obey():
                    return
            now = time.monotonic()
            while self._heap and self._heap[0][0] <= now:
                _, _, device, packet = heapq.heappop(self._heap)
                self._write(device, packet)

    def _obey(self) -> bool:
        data, devices, _, _ = socket.recv_fds(self._control, 65536, 1)
        if not data:
            return False
        message = json.loads(data)
        answer: dict[str, int] = {}
        match message.pop("do"):
            case "line":
                line = self._lines[devices[0]] = _Line(devices[0], message["central"])
                self._routes[socket.inet_aton(message["address"])] = line
                self._reading.append(line.device)
            case "route":
                prefix = bytes(int(part) for part in message["prefix"].split("."))
                self._routes[prefix] = self._routes[socket.inet_aton(message["via"])]
            case "conditions":
                self._conditions = Conditions(**message)
            case "counts":
                answer = self._counts
        self._control.send(json.dumps(answer).encode())
        return True

    def _read(self, line: _Line) -> None:
        for _ in range(_READS):
            try:
                packet = bytearray(os.read(line.device, 65536))
            except BlockingIOError:
                return
            if len(packet) >= 20 and packet[0] >> 4 == 4:
                self._forward(packet, line)

    def _forward(self, packet: bytearray, line: _Line) -> None:
        if packet[8] <= 1:
            self._time_exceeded(packet, line)
            return
        packet[8] -= 1
        total = int.from_bytes(packet[10:12], "big") + 0x100
        packet[10:12] = ((total & 0xFFFF) + (total >> 16)).to_bytes(2, "big")
        to = bytes(packet[16:20])
        target = self._routes.get(to) or self._routes.get(to[:3])
        if target is None:
            return
        wanted = self._conditions
        if wanted.loss and self._rng.random() < wanted.loss:
            self._counts["lost"] += 1
            return
        now = time.monotonic()
        due = self._through_queues(len(packet), line, target, now)
        if due is None:
            self._counts["full"] += 1
            return
        self._counts["carried"] += 1
        self._sent += 1
        due += wanted.delay / 2 * (2 - line.central - target.central)
        if due <= now:
            self._write(target.device, bytes(packet))
        else:
            heapq.heappush(self._heap, (due, self._sent, target.device, bytes(packet)))

    def _through_queues(self, size: int, line: _Line, target: _Line, now: float) -> float | None:
        """When the last byte of a packet is through both lines; `None`: one of them has no room for it."""
        rate = self._conditions.rate
        if not rate:
            return now
        up = down = now
        if not line.central:
            up = max(now, line.up_free) + size / rate
        if not target.central:
            down = max(up, target.down_free) + size / rate
        if up - now > _QUEUE_SECONDS or down - up > _QUEUE_SECONDS:
            return None
        line.up_free, target.down_free = up, max(up, down)
        return target.down_free

    def _time_exceeded(self, packet: bytearray, line: _Line) -> None:
        """RFC 792, from a router that all share."""
        quoted = bytes(packet[: (packet[0] & 15) * 4 + 8])
        icmp = _with_checksum(struct.pack(">BBHI", 11, 0, 0, 0) + quoted, 2)
        length = 20 + len(icmp)
        head = struct.pack(">BBHHHBBH4s4s", 0x45, 0, length, 0, 0, 64, 1, 0, GATEWAY, bytes(packet[12:16]))
        self._write(line.device, _with_checksum(head, 10) + icmp)

    def _write(self, device: int, packet: bytes) -> None:
        try:
            os.write(device, packet)
        except (BlockingIOError, OSError) as error:
            if not isinstance(error, BlockingIOError) and error.errno not in _DEVICE_GONE:
                raise


_DEVICE_GONE = (5, 77)
"""EIO and EBADFD: the interface is down, or its namespace is gone."""


def _with_checksum(data: bytes, at: int) -> bytes:
    padded = data + bytes(len(data) % 2)
    total = sum(struct.unpack(f">{len(padded) // 2}H", padded))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return data[:at] + (total ^ 0xFFFF).to_bytes(2, "big") + data[at + 2 :]


def main(arguments: list[str]) -> int:
    if arguments == ["--probe"]:
        problem = tun_problem()
        sys.stderr.write(problem or "")
        return 1 if problem else 0
    with socket.socket(fileno=int(arguments[0])) as control:
        _Core(control, int(arguments[1])).run()
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
