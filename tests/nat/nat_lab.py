"""A small internet out of network namespaces: a routed core, public hosts, boxes with hosts behind them.

    core -- 198.18.0.x/32 -- public hosts, and the outside of boxes (interface `wan`)
            box `lan` (a bridge, 10.n.0.1/24; a carrier's 100.64.n.1/24; behind a firewall 198.19.n.1/24)
                -- hosts, further boxes

The core is a routed hop, so that a low TTL dies there. Must run inside `unshare -Urnm` (see run.py): then nothing of
it is left when the process ends, and no other lab is met.
"""

from __future__ import annotations

import subprocess
from dataclasses import dataclass, field
from itertools import count

from nat_rules import rules
from netns import Netns

GATEWAY = "169.254.0.1"
"""What every outside interface uses as its router: only the core has it, on each of its ends."""

_NUMBERS = count(1)


@dataclass
class LabHost:
    """A computer of the lab."""

    netns: Netns
    address: str
    more: list[str] = field(default_factory=list)
    """Further addresses."""

    def wire_bytes(self) -> tuple[int, int]:
        """Received and sent on its interface, headers included."""
        lines = self.netns.run(["cat", "/proc/net/dev"]).stdout.splitlines()
        fields = next(line for line in lines if line.strip().startswith("eth0:")).split(":")[1].split()
        return int(fields[0]), int(fields[8])


class LabBox:
    """A NAT or firewall and the network behind it."""

    def __init__(self, lab: Lab, kind: str, behind: LabBox | None, *, carrier: bool = False) -> None:
        self.lab = lab
        self.kind = kind
        self.netns = Netns(lab.next_name(f"box-{kind}"))
        self.netns.sysctl(
            net__ipv4__ip_forward=1,
            net__bridge__bridge_nf_call_iptables=0,
            **{"net__bridge__bridge-nf-call-iptables": 0},
        )
        self._hosts = 1
        number = lab.next_network()
        self.prefix = f"198.19.{number}" if kind == "fw" else f"100.64.{number}" if carrier else f"10.{number}.0"
        self.netns.ip(
            "link add lan type bridge",
            "link set lan up",
            f"addr add {self.prefix}.1/24 dev lan",
        )
        if behind is None:
            self.address = lab.join_core(self.netns, "wan")
        else:
            self.address = behind.plug(self.netns, "wan")
        if kind == "fw":
            lab.route(f"{self.prefix}.0/24", self.address)
        self.netns.nft(rules(kind, self.address))

    def rebind(self, *, kind: str | None = None, new_address: bool = False) -> None:
        """As after a restart: all mappings are forgotten. The box does what a box of `kind` does from then on, at
        another public address if wanted. On the core only."""
        if new_address:
            before, self.address = self.address, self.lab.one_more_address(self.address)
            self.netns.ip(
                f"addr add {self.address}/32 dev wan",
                f"route replace default {self.lab.way_out('wan')} src {self.address}",
                f"addr del {before}/32 dev wan",
            )
        self.kind = kind or self.kind
        self.netns.nft("flush ruleset\n" + rules(self.kind, self.address))
        self.netns.forget_flows()

    def plug(self, netns: Netns, interface: str) -> str:
        """Connect a namespace to the network inside. Returns its address there."""
        self._hosts += 1
        link = self.lab.next_name("l")
        self.netns.ip(
            f"link add {link} type veth peer name {interface} netns {netns.name}",
            f"link set {link} master lan",
            f"link set {link} up",
        )
        address = f"{self.prefix}.{self._hosts}"
        netns.ip(
            f"addr add {address}/24 dev {interface}",
            f"link set {interface} up",
            f"route add default via {self.prefix}.1",
        )
        return address

    def host(self, name: str = "host") -> LabHost:
        """A computer behind the box."""
        netns = Netns(self.lab.next_name(name))
        return LabHost(netns, self.plug(netns, "eth0"))


class Lab:
    """See the top of the file."""

    def __init__(self, *, delay_ms: float = 0.0) -> None:
        """`delay_ms`: between any two places on the core, one way; needs netem (see `has_netem`)."""
        self._delay_ms = delay_ms
        self._count = 0
        self._networks = 0
        self.last_link = ""
        self._links: dict[str, str] = {}
        """The core's end of the line to each address."""
        self.core = Netns(self.next_name("core"))
        self.core.sysctl(net__ipv4__ip_forward=1)

    def next_number(self) -> int:
        self._count += 1
        return self._count

    def next_network(self) -> int:
        self._networks += 1
        return self._networks

    def next_name(self, kind: str) -> str:
        """Also another one than those of other labs in this process."""
        return f"{kind}{next(_NUMBERS)}"

    def box(self, kind: str, behind: LabBox | None = None, *, carrier: bool = False) -> LabBox:
        """A box of one of `nat_rules.KINDS`, on the core or behind another. `carrier`: RFC 6598 addresses inside."""
        return LabBox(self, kind, behind, carrier=carrier)

    def chain(self, kinds: str) -> LabBox | None:
        """`apdf+sym`: a home router behind a carrier's; `none`: no box. Returns the innermost."""
        box = None
        parts = kinds.split("+")
        for i, kind in reversed(list(enumerate(parts))):
            box = None if kind == "none" else self.box(kind, box, carrier=i > 0)
        return box

    def host_behind(self, kinds: str) -> LabHost:
        """A computer behind such a chain."""
        box = self.chain(kinds)
        return self.public_host() if box is None else box.host()

    def public_host(self, addresses: int = 1) -> LabHost:
        """A computer on the core."""
        netns = Netns(self.next_name("pub"))
        first = self.join_core(netns, "eth0")
        more = []
        for _ in range(addresses - 1):
            more.append(self.one_more_address(first))
            netns.ip(f"addr add {more[-1]}/32 dev eth0")
        return LabHost(netns, first, more)

    def join_core(self, netns: Netns, interface: str) -> str:
        """Connect a namespace to the core. Returns its public address."""
        self.last_link = self.next_name("c")
        address = self._public_address()
        self.core.ip(
            f"link add {self.last_link} type veth peer name {interface} netns {netns.name}",
            f"addr add {GATEWAY}/32 dev {self.last_link}",
            f"link set {self.last_link} up",
            f"route add {address}/32 dev {self.last_link}",
        )
        if self._delay_ms:
            delay = ["delay", f"{self._delay_ms}ms", "limit", "10000"]
            done = self.core.run(["tc", "qdisc", "add", "dev", self.last_link, "root", "netem", *delay])
            assert not done.returncode, done.stderr
        netns.ip(
            f"addr add {address}/32 dev {interface}",
            f"link set {interface} up",
            f"route add {GATEWAY}/32 dev {interface} scope link src {address}",
            f"route add default {self.way_out(interface)} src {address}",
        )
        self._links[address] = self.last_link
        return address

    def way_out(self, interface: str) -> str:
        """The default route of a namespace on the core, as `ip route` has it."""
        return f"via {GATEWAY} dev {interface}"

    def route(self, prefix: str, via: str) -> None:
        """Lead an address or a /24 to a place on the core."""
        self.core.ip(f"route add {prefix} via {via} dev {self._links[via]}")

    def one_more_address(self, of: str) -> str:
        """A further public address that leads to the place with the address `of`."""
        address = self._public_address()
        self._links[address] = self._links[of]
        self.core.ip(f"route add {address}/32 dev {self._links[of]}")
        return address

    def _public_address(self) -> str:
        number = self.next_number()
        return f"198.18.{number // 250}.{number % 250 + 1}"


def has_netem() -> bool:
    """Whether delay can be added here. Call it inside of the lab's namespaces: it makes one more."""
    probe = Netns(f"netem{next(_NUMBERS)}")
    return probe.run(["tc", "qdisc", "add", "dev", "lo", "root", "netem", "delay", "1ms"]).returncode == 0


def missing() -> str | None:
    """Why a lab cannot be built here, `None` when it can."""
    for command, package in ((["ip", "-V"], "iproute2"), (["nft", "--version"], "nftables")):
        try:
            subprocess.run(command, capture_output=True, check=True)
        except (OSError, subprocess.CalledProcessError):
            return f"{command[0]} is missing (Debian: apt install {package})"
    return None
