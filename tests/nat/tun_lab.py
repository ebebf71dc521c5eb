"""Labs whose core is a process (`tun_core.py`): delay, loss and rates between the kernel NATs, replayed by seed."""

from __future__ import annotations

from nat_lab import Lab, LabHost
from netns import Netns
from tun_core import Conditions, TunCore, open_tun


class TunLab(Lab):
    """The conditions hold between places on the core; what is behind one box talks without. Hosts made by
    `central_host` are halfway between all others: what goes by way of them takes no longer than straight."""

    def __init__(self, conditions: Conditions, *, seed: int) -> None:
        super().__init__()
        self._central = False
        self.wire = TunCore(seed)
        self.set_conditions(conditions)

    def set_conditions(self, conditions: Conditions) -> None:
        """From now on."""
        self.conditions = conditions
        self.wire.set_conditions(conditions)

    def close(self) -> None:
        self.wire.close()

    def central_host(self) -> LabHost:
        """For a relay or an observer."""
        self._central = True
        try:
            return self.public_host()
        finally:
            self._central = False

    def join_core(self, netns: Netns, interface: str) -> str:
        address = self._public_address()
        with netns.entered():
            device = open_tun(interface)
        netns.ip(
            f"link set {interface} txqueuelen 5000",
            f"addr add {address}/32 dev {interface}",
            f"link set {interface} up",
            f"route add default {self.way_out(interface)} src {address}",
        )
        self.wire.add_line(device, address, central=self._central)
        return address

    def way_out(self, interface: str) -> str:
        return f"dev {interface}"

    def route(self, prefix: str, via: str) -> None:
        self.wire.add_route(prefix.removesuffix(".0/24"), via)

    def one_more_address(self, of: str) -> str:
        address = self._public_address()
        self.wire.add_route(address, of)
        return address
