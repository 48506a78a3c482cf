"""What a guest on a macvtap may send: a table of nftables per macvtap, `netdev`, of the same name.

It is asked at the egress of the macvtap, where what the guest sends comes by, before the kernel hands it to the parent
or to another macvtap on it (Linux 5.16, CONFIG_NETFILTER_EGRESS). What others send to the guest comes by no hook.
"""

from __future__ import annotations

from innkeeper.plan.ruleset import DROP, Command, Expression, nobodys_outside

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
        *({"add": {"rule": inside | {"chain": CHAIN, "expr": each}}} for each in nobodys_outside(mac, drop)),
    ]


def removed(name: str) -> list[Command]:
    """The table away, whether it is there or not."""
    table = {"table": {"family": "netdev", "name": name}}
    return [{"add": table}, {"delete": table}]
