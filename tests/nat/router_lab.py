"""miniupnpd in the boxes of a lab: a real router that maps ports by PCP, NAT-PMP and UPnP."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

from lab_daemons import wait_until
from nat_lab import LabBox

_TABLE = """
table inet miniupnpd {
    chain forward { type filter hook forward priority -1; policy accept; jump miniupnpd; }
    chain prerouting { type nat hook prerouting priority -101; policy accept; jump prerouting_miniupnpd; }
    chain postrouting { type nat hook postrouting priority 99; policy accept; jump postrouting_miniupnpd; }
    chain miniupnpd { }
    chain prerouting_miniupnpd { }
    chain postrouting_miniupnpd { }
}
"""
_CONFIG = """
ext_ifname=wan
listening_ip=lan
ipv6_disable=yes
enable_natpmp={pmp}
enable_upnp={upnp}
upnp_table_name=miniupnpd
upnp_nat_table_name=miniupnpd
upnp_forward_chain=miniupnpd
upnp_nat_chain=prerouting_miniupnpd
upnp_nat_postrouting_chain=postrouting_miniupnpd
secure_mode=yes
system_uptime=no
notify_interval=60
min_lifetime={min_lifetime}
max_lifetime=86400
uuid=16793d9a-c063-4297-a84c-c6ef550fea70
{rules}
"""
_ALLOW = "allow 1024-65535 0.0.0.0/0 1024-65535\ndeny 0-65535 0.0.0.0/0 0-65535"
DENY = "deny 0-65535 0.0.0.0/0 0-65535"
_ONLY = """
table inet only {{
    chain input {{ type filter hook input priority -10; policy accept;
        udp dport 5351 @th,64,8 {version} drop
    }}
}}
"""
"""PCP and NAT-PMP share a port; the first byte tells them apart. miniupnpd cannot be told to speak one of them."""
_OTHER = {"pcp": 0, "nat-pmp": 2}


def miniupnpd_missing() -> str | None:
    """Why there is no such router here, `None` when there is."""
    path = shutil.which("miniupnpd", path="/usr/sbin:/usr/local/sbin:/usr/bin")
    return None if path else "miniupnpd is missing (Debian: apt install miniupnpd-nftables)"


class Router:
    """miniupnpd in a box. `speaks`: `pcp`, `nat-pmp`, `upnp` or `all`."""

    def __init__(self, box: LabBox, folder: Path, speaks: str = "all", *, rules: str = _ALLOW) -> None:
        self.box = box
        self.speaks = speaks
        self._config = folder / f"{box.netns.name}.conf"
        self._log_path = folder / f"{box.netns.name}.log"
        self._child: subprocess.Popen[bytes] | None = None
        yes = {True: "yes", False: "no"}
        self._config.write_text(
            _CONFIG.format(pmp=yes[speaks != "upnp"], upnp=yes[speaks in ("all", "upnp")], min_lifetime=10, rules=rules)
        )
        box.netns.nft(_TABLE)
        if speaks in _OTHER:
            box.netns.nft(_ONLY.format(version=_OTHER[speaks]))
        self.start()

    def start(self) -> None:
        command = ["miniupnpd", "-d", "-f", str(self._config), "-P", str(self._config.with_suffix(".pid"))]
        with open(self._log_path, "ab") as log:
            self._child = self.box.netns.start(command, stdout=log, stderr=log)
        wait_until(self._is_listening, 10.0, self.log)

    def _is_listening(self) -> bool:
        ports = self.box.netns.run(["ss", "-Huln"]).stdout
        wanted = ([":5351"] if self.speaks != "upnp" else []) + ([":1900"] if self.speaks in ("all", "upnp") else [])
        return all(port in ports for port in wanted)

    def stop(self) -> None:
        if self._child is not None:
            self._child.kill()
            self._child.wait()
            self._child = None

    def restart(self) -> None:
        """As after a power cut: nothing is remembered."""
        self.stop()
        self.box.netns.nft("flush chain inet miniupnpd prerouting_miniupnpd; flush chain inet miniupnpd miniupnpd")
        assert not self.mapped()
        self.start()

    def mapped(self) -> set[tuple[str, str]]:
        """(`tcp` or `udp`, inside address:port) of each mapping, as the kernel has it."""
        lines = self.box.netns.run(["nft", "list", "chain", "inet", "miniupnpd", "prerouting_miniupnpd"]).stdout
        found = set()
        for line in lines.splitlines():
            if "dnat" in line:
                transport = "tcp" if "@nh,72,8 0x6 " in line or "tcp" in line else "udp"
                found.add((transport, line.split(" to ")[1].split()[0]))
        return found

    def ruleset(self) -> str:
        return self.box.netns.run(["nft", "list", "table", "inet", "miniupnpd"]).stdout

    def log(self) -> str:
        return self._log_path.read_text("utf-8", "replace") + self.ruleset()
