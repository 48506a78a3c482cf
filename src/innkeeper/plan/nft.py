"""The words of nftables' JSON (libnftables-json(5)) that the rules are made of."""

from __future__ import annotations

import ipaddress
from typing import Any

Command = dict[str, Any]
Expression = dict[str, Any]
NAME = "innkeeper"
B: Command = {"family": "bridge", "table": NAME}
I: Command = {"family": "inet", "table": NAME}  # noqa: E741 - as B
DROP: Expression = {"drop": None}
ACCEPT: Expression = {"accept": None}
IIF: Expression = {"meta": {"key": "iifname"}}
OIF: Expression = {"meta": {"key": "oifname"}}
PROTOCOL: Expression = {"meta": {"key": "l4proto"}}
ETHERTYPE: Expression = {"payload": {"base": "ll", "offset": 96, "len": 16}}
"""As it came: `ether type` is what is inside a tag that the kernel has taken off."""
COUNTER: Expression = {"counter": {"packets": 0, "bytes": 0}}


def chain(table: Command, name: str, kind: str, hook: str, priority: int) -> Command:
    """A chain that packets come to by themselves."""
    return {"add": {"chain": table | {"name": name, "type": kind, "hook": hook, "prio": priority, "policy": "accept"}}}


def rule(table: Command, chain: str, *expressions: Expression, **more: str) -> Command:
    """`more`: a `comment`."""
    return {"add": {"rule": table | {"chain": chain, "expr": list(expressions)} | more}}


def jump(name: str) -> Expression:
    return {"jump": {"target": name}}


def goto(name: str) -> Expression:
    return {"goto": {"target": name}}


def match(left: Expression, right: Any, op: str = "==") -> Expression:
    return {"match": {"op": op, "left": left, "right": right}}


def field(protocol: str, name: str) -> Expression:
    """Of a packet's header."""
    return {"payload": {"protocol": protocol, "field": name}}


def concat(*fields: Any) -> Expression:
    return {"concat": list(fields)}


def prefix(network: ipaddress.IPv4Network | ipaddress.IPv6Network) -> Expression:
    return {"prefix": {"addr": str(network.network_address), "len": network.prefixlen}}
