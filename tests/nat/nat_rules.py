"""Every kind of NAT as nftables rules: what the kernel of a home router or a carrier would run.

`wan` is the interface outside, `lan` the one inside, `{wan}` the address outside. Linux by itself is
endpoint-independent with port-dependent filter (plain `masquerade`: the mapping of a source is used again). The other
kinds are made by learning, for each packet that leaves, which port it was really given:

    @eim    protocol, inside address and port -> public port        the same one for whatever comes next from there
    @rev    protocol, public port -> inside address and port        let in what comes to it
    @adf    protocol, public port, remote address                   … but only from there
"""

from __future__ import annotations

_TABLE = """
table ip lab {{
    map eim {{ type inet_proto . ipv4_addr . inet_service : inet_service; flags dynamic, timeout; timeout 120s; }}
    map adm {{ type inet_proto . ipv4_addr . inet_service . ipv4_addr : inet_service;
               flags dynamic, timeout; timeout 120s; }}
    map rev {{ type inet_proto . inet_service : ipv4_addr . inet_service; flags dynamic, timeout; timeout 120s; }}
    set adf {{ type inet_proto . inet_service . ipv4_addr; flags dynamic, timeout; timeout 120s; }}
    chain pre {{ type nat hook prerouting priority dstnat;
        {pre}
    }}
    chain post {{ type nat hook postrouting priority srcnat;
        {post}
    }}
    chain learn {{ type filter hook postrouting priority 300;
        {learn}
    }}
    chain input {{ type filter hook input priority filter; policy {input_policy};
        iifname != "wan" accept
        ct state established,related accept
        icmp type echo-request accept
        {input}
    }}
    chain forward {{ type filter hook forward priority filter; policy drop;
        {forward}
        ct state established,related accept
        iifname "lan" accept
        ct status dnat accept
    }}
}}
"""

_SENT = 'oifname "wan" meta l4proto {{ tcp, udp }}'
_LEARN = 'oifname "wan" ip saddr {wan} meta l4proto {l4} ct status snat'
"""Once for each protocol: `ct original proto-src` has a type only where nft knows the protocol."""
_LEARN_EIM = _LEARN + " update @eim {{ meta l4proto . ct original ip saddr . ct original proto-src : th sport }}"
_LEARN_ADM = (
    _LEARN + " update @adm {{ meta l4proto . ct original ip saddr . ct original proto-src . ip daddr : th sport }}"
)
_LEARN_REV = _LEARN + " update @rev {{ meta l4proto . th sport : ct original ip saddr . ct original proto-src }}"
_LEARN_ADF = _LEARN + " update @adf {{ meta l4proto . th sport . ip daddr }}"
_TO_REV = "dnat to meta l4proto . th dport map @rev"
_DNAT = f'iifname "wan" ip daddr {{wan}} {_TO_REV}'
_DNAT_ADF = f'iifname "wan" ip daddr {{wan}} meta l4proto . th dport . ip saddr @adf {_TO_REV}'
_PLAIN = _SENT + " snat to {wan}"
_RANDOM = _SENT + " snat to {wan}:1024-65535 fully-random"
_HAIRPIN = 'iifname "lan" oifname "lan" ct status dnat snat to {wan}'
_HAIRPIN_DNAT = f'iifname "lan" ip daddr {{wan}} {_TO_REV}'
_NO_UDP = "meta l4proto udp drop"
_COUNTED = ", ".join(f"{i} : {20000 + i}" for i in range(2000))
_REJECT = 'iifname "wan" meta l4proto tcp reject with tcp reset\n        iifname "wan" reject'

_KINDS: dict[str, dict[str, tuple[str, ...]]] = {
    "apdf": {"post": (_PLAIN,)},
    "rej": {"post": (_PLAIN,), "input": (_REJECT,)},
    "open": {"post": (_PLAIN,), "input_policy": ("accept",)},
    "full": {"pre": (_DNAT, _HAIRPIN_DNAT), "post": (_PLAIN, _HAIRPIN), "learn": (_LEARN_REV,)},
    "adf": {"pre": (_DNAT_ADF,), "post": (_PLAIN,), "learn": (_LEARN_REV, _LEARN_ADF)},
    "apdfr": {
        "post": (_SENT + " snat to {wan} : meta l4proto . ip saddr . th sport map @eim", _RANDOM),
        "learn": (_LEARN_EIM,),
    },
    "adm": {
        "post": (_SENT + " snat to {wan} : meta l4proto . ip saddr . th sport . ip daddr map @adm", _RANDOM),
        "learn": (_LEARN_ADM,),
    },
    "symf": {"pre": (_DNAT,), "post": (_RANDOM,), "learn": (_LEARN_REV,)},
    "syma": {"pre": (_DNAT_ADF,), "post": (_RANDOM,), "learn": (_LEARN_REV, _LEARN_ADF)},
    "symseq": {"post": (_SENT + " snat to {wan} : numgen inc mod 2000 map {{ " + _COUNTED + " }}",)},
    "sym": {"post": (_RANDOM,)},
    "symblk": {"post": (_SENT + " snat to {wan}:30000-32047 fully-random",)},
    "noudp": {"post": (_PLAIN,), "forward": (_NO_UDP,)},
    "tcp443": {"post": (_PLAIN,), "forward": (_NO_UDP, 'iifname "lan" tcp dport != {{ 80, 443 }} drop')},
    "fw": {},
}
KINDS = tuple(_KINDS)


def rules(kind: str, wan: str) -> str:
    """The ruleset of a box of that kind with the address `wan` outside."""
    parts = _KINDS[kind]

    def chain(name: str) -> str:
        lines = [line.format(wan=wan, l4=l4) for l4 in ("udp", "tcp") for line in parts.get(name, ())]
        return "\n        ".join(dict.fromkeys(lines))

    return _TABLE.format(
        pre=chain("pre"),
        post=chain("post"),
        learn=chain("learn"),
        input=chain("input"),
        forward=chain("forward"),
        input_policy=parts.get("input_policy", ("drop",))[0],
    )
