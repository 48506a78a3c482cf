"""What a guest on a macvtap may send: a table of nftables per macvtap, `netdev`, of the same name.

It is asked at the egress of the macvtap, where what the guest sends comes by, before the kernel hands it to the parent
or to another macvtap on it (Linux 5.16, CONFIG_NETFILTER_EGRESS). What others send to the guest comes by no hook.
"""

from __future__ import annotations

from innkeeper.plan.nft import DROP, ETHERTYPE, Command, Expression, field, match
from innkeeper.plan.sender import BEHIND_FRAGMENT, DISCOVERY, UPPER_LAYERS

CHAIN, DROPPED = "from-guest", "dropped"


def rules(name: str, mac: str) -> list[Command]:
    """The table anew and whole, in one transaction; the macvtap is there already."""
    table = {"family": "netdev", "name": name}
    inside = {"family": "netdev", "table": name}
    drop: list[Expression] = [{"counter": DROPPED}, DROP]
    base = {"type": "filter", "hook": "egress", "dev": name, "prio": 0, "policy": "accept"}
    return [
        *removed(name),
        {"add": {"table": table}},
        {"add": {"counter": inside | {"name": DROPPED}}},
        {"add": {"chain": inside | {"name": CHAIN} | base}},
        *({"add": {"rule": inside | {"chain": CHAIN, "expr": each}}} for each in _refused(mac, drop)),
    ]


def removed(name: str) -> list[Command]:
    """The table away, whether it is there or not."""
    table = {"table": {"family": "netdev", "name": name}}
    return [{"add": table}, {"delete": table}]


def _refused(mac: str, drop: list[Expression]) -> list[list[Expression]]:
    """As of cards in bridged networks (plan/sender.py), for one card."""
    kind = field("icmpv6", "type")
    return [
        [match(field("ether", "saddr"), mac, "!="), *drop],
        [match(ETHERTYPE, {"set": [0x0800, 0x0806, 0x86DD]}, "!="), *drop],
        [match(field("udp", "sport"), {"set": [67, 547]}), *drop],
        [match(BEHIND_FRAGMENT, UPPER_LAYERS, "!="), *drop],
        [match(BEHIND_FRAGMENT, 58), match(kind, DISCOVERY), *drop],
        [match(kind, {"set": ["nd-router-advert", "nd-redirect"]}), *drop],
        [match(field("arp", "saddr ether"), mac, "!="), *drop],
    ]
