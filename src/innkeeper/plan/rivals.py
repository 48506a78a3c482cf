"""Other programs' firewalls: would this packet pass their rules? Their nftables as `nft -j list` says them, in.

A packet passes where every base chain of its way accepts it; one that says drop is enough, whatever ours says. What
cannot be told here (iptables' extensions, rates, marks) counts as not matching, so that nothing is accused in vain.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

FAMILIES = {4: ("ip", "inet"), 6: ("ip6", "inet")}
DROPS = ("drop", "reject")
DEPTH = 16
"""Jumps within jumps, as many as nftables allows."""


@dataclass(frozen=True)
class Packet:
    """The first packet of a connection. `hooks` are those that it passes; `fields` by nft's words: `meta iifname`,
    `ip daddr`, `tcp dport`."""

    version: int
    hooks: tuple[str, ...]
    fields: Mapping[str, Any]


@dataclass(frozen=True)
class Drop:
    """Where a packet ends: in a chain of a table, by a rule (its handle) or by the chain's policy (None). `base` is the
    chain that the kernel called."""

    family: str
    table: str
    base: str
    hook: str
    chain: str
    handle: int | None


def packet(version: int, protocol: str, port: int, **fields: Any) -> Packet:
    """One from `iifname` to `oifname`, where it is forwarded, else to the host itself."""
    hooks = ("prerouting", "forward", "postrouting") if "oifname" in fields else ("prerouting", "input")
    ip = "ip" if version == 4 else "ip6"
    found = {f"meta {name}" if name.endswith("ifname") else f"{ip} {name}": value for name, value in fields.items()}
    more = {
        "meta l4proto": protocol, "meta nfproto": f"ipv{version}", "ip protocol": protocol, "ip6 nexthdr": protocol,
        "meta protocol": ip, f"{protocol} dport": port, "th dport": port, "ct state": "new",
    }  # fmt: skip
    return Packet(version, hooks, found | more)


def drops(rules: Iterable[Mapping[str, Any]], packet: Packet) -> Iterator[Drop]:
    """Every base chain that does not let it pass."""
    rules = list(rules)
    chains = [entry["chain"] for entry in rules if "chain" in entry]
    for base in chains:
        on_its_way = base.get("hook") in packet.hooks and base["family"] in FAMILIES[packet.version]
        if not on_its_way or base.get("type") != "filter":
            continue
        judge = _Judge(base, rules, packet)
        verdict, chain, handle = judge.walk(base["name"])
        if verdict in DROPS or (verdict not in ("accept",) and base.get("policy") == "drop"):
            where = (chain, handle) if verdict in DROPS else (base["name"], None)
            yield Drop(base["family"], base["table"], base["name"], base["hook"], *where)


class _Judge:
    """One packet in the chains of one table."""

    def __init__(self, base: Mapping[str, Any], rules: Iterable[Mapping[str, Any]], packet: Packet) -> None:
        self._packet = packet
        self._chains: dict[str, list[Mapping[str, Any]]] = {}
        self._sets: dict[str, list[Any]] = {}
        for entry in rules:
            for kind, what in entry.items():
                if (what.get("family"), what.get("table")) != (base["family"], base["table"]):
                    continue
                if kind == "rule":
                    self._chains.setdefault(what["chain"], []).append(what)
                if kind in ("set", "map"):
                    self._sets[f"@{what['name']}"] = what.get("elem", [])

    def walk(self, chain: str, depth: int = 0) -> tuple[str, str, int | None]:
        """(verdict, chain, handle of the rule); the verdict `continue` where none was reached."""
        for rule in self._chains.get(chain, ()):
            for verdict, target in self._verdicts(rule["expr"]):
                if verdict in ("accept", *DROPS):
                    return verdict, chain, rule["handle"]
                if verdict == "return":
                    return "continue", chain, None
                if depth < DEPTH and verdict in ("jump", "goto"):
                    below = self.walk(target, depth + 1)
                    if below[0] != "continue" or verdict == "goto":
                        return below
        return "continue", chain, None

    def _verdicts(self, expressions: Iterable[Mapping[str, Any]]) -> Iterator[tuple[str, str]]:
        """What a rule says, where all of it matches for certain."""
        for expression in expressions:
            for kind, what in expression.items():
                if kind == "match":
                    if not self._matches(what):
                        return
                elif kind in ("xt", "limit", "ct count", "fib", "socket", "osf"):
                    return
                elif kind == "vmap":
                    yield from self._looked_up(what)
                elif kind in ("accept", *DROPS, "return", "jump", "goto"):
                    yield kind, what["target"] if kind in ("jump", "goto") else ""

    def _looked_up(self, vmap: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
        pairs = self._sets.get(vmap["data"], []) if isinstance(vmap["data"], str) else vmap["data"].get("set", [])
        value = self._field(vmap["key"])
        for key, verdict in (pair for pair in pairs if isinstance(pair, list)):
            if value is not None and self._is(value, key):
                yield from self._verdicts([verdict])

    def _matches(self, match: Mapping[str, Any]) -> bool:
        value = self._field(match["left"])
        if value is None or match["op"] not in ("==", "!=", "in"):
            return False
        return self._is(value, match["right"]) is (match["op"] != "!=")

    def _field(self, left: Any) -> Any:
        for kind, what in left.items() if isinstance(left, dict) else ():
            if kind in ("meta", "ct"):
                return self._packet.fields.get(f"{kind} {what['key']}")
            if kind == "payload" and "protocol" in what:
                return self._packet.fields.get(f"{what['protocol']} {what['field']}")
        return None

    def _is(self, value: Any, wanted: Any) -> bool:
        if isinstance(wanted, dict):
            if "set" in wanted:
                return any(self._is(value, each) for each in wanted["set"])
            if "prefix" in wanted:
                return _within(value, f"{wanted['prefix']['addr']}/{wanted['prefix']['len']}")
            if "range" in wanted:
                low, high = wanted["range"]
                return type(value) is type(low) is type(high) is int and low <= value <= high
            return "elem" in wanted and self._is(value, wanted["elem"].get("val"))
        if isinstance(wanted, list):
            return any(self._is(value, each) for each in wanted)
        if isinstance(wanted, str) and wanted.startswith("@"):
            return any(self._is(value, each) for each in self._sets.get(wanted, ()))
        if isinstance(wanted, str) and wanted.endswith("*"):
            return str(value).startswith(wanted[:-1])
        return str(value) == str(wanted)


def _within(address: Any, prefix: str) -> bool:
    try:
        return ipaddress.ip_address(address) in ipaddress.ip_network(prefix, strict=False)
    except ValueError:
        return False
