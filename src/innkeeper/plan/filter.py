"""What a VM's rules let in and out of a card in a network, as nftables' JSON.

Between guests of one network packets pass a bridge, where many kernels track no connections. So what answers is told
by itself there: TCP by its flags, ICMP by its kind, UDP by a set of who has been spoken to, which each card has for
itself. Judged is only what opens something. All of it is in chains of that card in the bridge's table, which nobody
else's packets pass. Where a rule opens what the network's mode keeps shut (a nat network's guest for those elsewhere,
the host for a guest), the routed packets meet the same rule a second time, in the table `inet`.
"""

from __future__ import annotations

import hashlib
import ipaddress
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from innkeeper.plan.nft import (
    ACCEPT,
    COUNTER,
    DROP,
    ETHERTYPE,
    PROTOCOL,
    B,
    Command,
    Expression,
    I,
    concat,
    field,
    goto,
    jump,
    match,
    prefix,
    rule,
)  # fmt: skip
from innkeeper.spec.firewall import Action, Direction, FirewallSpec, port_range

if TYPE_CHECKING:
    from innkeeper.plan.network import Network, Nic

Prefix = ipaddress.IPv4Network | ipaddress.IPv6Network
Version = Literal[4, 6]
LOCAL = ipaddress.IPv6Network("fe80::/64")
YES, NO = "-yes", "-no"
FROM_ELSEWHERE, TO_HOST = "-from", "-host"
"""What the names of a card's chains end with: `-in`, `-in-yes`, `-in-no`, the same for `-out`; and in `inet` these."""
SPOKEN, DENIED = "-spoken", "-denied"
"""Of its sets, before the IP version: UDP peers of late, and what was denied, by direction."""
BOTH: tuple[Direction, ...] = ("in", "out")
DENIALS = tuple(f"-{direction}{DENIED}{version}" for direction in BOTH for version in (4, 6))
OF_PACKETS = (f"{SPOKEN}4", f"{SPOKEN}6", *DENIALS)
"""All of them: their elements come and go with the guest's packets."""
IPS = (("ip", 4), ("ip6", 6))
SPOKEN_FOR, MOST_SPOKEN = 180, 4096
"""Seconds for which silence may last between two who speak UDP, as conntrack has it; peers of one card at a time."""
DENIED_FOR, MOST_DENIED = 24 * 3600, 512
"""Seconds for which a denied attempt is remembered; different ones of one card at a time."""
AT_ONCE, A_SECOND = 50, 10
"""Denied packets that are written down: so many at once, and per second."""
COUNTED_AS = "rule "
"""A comment that begins so says which of the VM's rules, from 1, an nftables rule is."""
DEFAULTS: dict[Direction, str] = {"in": "default in", "out": "default out"}
ANSWERS4 = {"set": ["echo-reply", "destination-unreachable", "time-exceeded", "parameter-problem"]}
ANSWERS6 = {
    "set": [
        "echo-reply", "destination-unreachable", "packet-too-big", "time-exceeded", "parameter-problem",
        "nd-router-solicit", "nd-router-advert", "nd-neighbor-solicit", "nd-neighbor-advert", "nd-redirect",
        "mld-listener-query", "mld-listener-report", "mld2-listener-report",
    ]
}  # fmt: skip
"""And what a link lives on."""


@dataclass(frozen=True)
class Rule:
    """One rule, with everybody known by address or by group. `peers` is None for everybody, `host` says that they are
    this host's addresses in the card's network."""

    direction: Direction
    action: Action
    protocol: str
    ports: tuple[tuple[int, int], ...]
    peers: tuple[Prefix | str, ...] | None
    host: bool = False


@dataclass(frozen=True)
class Filter:
    """All rules of a VM, as they are for a card. `routed`: its network is one of which packets are routed elsewhere."""

    inbound: Action
    outbound: Action
    rules: tuple[Rule, ...]
    routed: bool


@dataclass(frozen=True)
class Attempt:
    """What was denied: `direction` as the guest sees it, `peer` the other end, `port` the receiver's; of ICMP there is
    none. `seconds` since the last of so many `packets`."""

    direction: Direction
    protocol: str
    peer: str
    port: int | None
    packets: int
    seconds: float


def filter_of(spec: FirewallSpec, network: Network, networks: Mapping[str, Network]) -> Filter | None:
    """A VM's rules for a card in `network`; None where it has none. `networks` by name."""
    if spec == FirewallSpec():
        return None
    rules = []
    for wanted in spec.rules:
        peers = _peers(wanted.peer, network, networks)
        ports = tuple(port_range(text) for text in wanted.ports)
        rules.append(Rule(wanted.direction, wanted.action, wanted.protocol, ports, peers, wanted.peer == "host"))
    return Filter(spec.inbound, spec.outbound, tuple(rules), network.mode == "nat")


def _peers(peer: str, network: Network, networks: Mapping[str, Network]) -> tuple[Prefix | str, ...] | None:
    if peer == "any":
        return None
    if peer == "host":
        return tuple(ipaddress.ip_network(own) for own in (network.gateway, network.gateway6) if own)
    kind, _, name = peer.partition(":")
    if kind in ("vm", "tag"):
        return (peer,)
    if kind == "network":
        other = networks.get(name)
        found = [one for one in (other.subnet, other.prefix) if one] if other else []
        return tuple([*found, LOCAL] if other == network and network.prefix else found)
    return (ipaddress.ip_network(peer),)


def groups(nics: Iterable[Nic]) -> dict[str, frozenset[str]]:
    """The addresses of the VMs and tags that rules name, by name of their set."""
    nics = list(nics)
    named = {
        peer
        for nic in nics
        if nic.filter
        for each in nic.filter.rules
        for peer in each.peers or ()
        if isinstance(peer, str)
    }
    members: dict[str, set[str]] = {_set_name(peer, version): set() for peer in named for version in (4, 6)}
    for nic in nics:
        if nic.address is None:  # in a bridged network: what it says of its address need not be true
            continue
        for peer in named & {f"vm:{nic.name}", *(f"tag:{tag}" for tag in nic.tags)}:
            members[_set_name(peer, 4)].add(nic.address)
            members[_set_name(peer, 6)] |= {nic.link_local, *([nic.address6] if nic.address6 else [])}
    return {name: frozenset(addresses) for name, addresses in members.items()}


def groups_changed(
    old: Mapping[str, frozenset[str]], new: Mapping[str, frozenset[str]]
) -> tuple[list[Command], list[Command]]:
    """What comes before the rules that need them, and what after those that did."""
    first: list[Command] = []
    for name in sorted(new):
        if name not in old:
            first += [{"add": {"set": table | _group(name)}} for table in (B, I)]
        for verb, addresses in (
            ("delete", old.get(name, frozenset()) - new[name]),
            ("add", new[name] - old.get(name, frozenset())),
        ):
            if addresses:
                first += [{verb: {"element": table | {"name": name, "elem": sorted(addresses)}}} for table in (B, I)]
    gone = [{"delete": {"set": table | {"name": name}}} for name in sorted(old.keys() - new.keys()) for table in (B, I)]
    return first, gone


def _group(name: str) -> dict[str, Any]:
    return {"name": name, "type": "ipv6_addr" if name.startswith("group6") else "ipv4_addr"}


def _set_name(peer: str, version: int) -> str:
    return f"group{version}-{hashlib.sha256(peer.encode()).hexdigest()[:16]}"


def filter_added(nic: Nic) -> list[Command]:
    """The chains and sets of one card's rules. They come before the card's own chain, which leads to them."""
    if nic.filter is None:
        return []
    return [*({"add": {"set": made}} for made in _sets(nic.tap)), *_filled(nic, nic.filter)]


def _filled(nic: Nic, found: Filter) -> list[Command]:
    chains = _chains(nic)
    return [
        *({"add": made} for made in chains),
        *({"flush": made} for made in chains),
        *(made for direction in BOTH for made in _spoken(nic.tap, direction)),
        *(made for direction in BOTH for made in _denied(nic.tap, direction)),
        *(made for direction in BOTH for made in _judged(nic, found, direction)),
        {"add": _element(B, "filtered", [nic.tap, jump(f"{nic.tap}-in")])},
        *_routed_added(nic, found),
    ]


def filter_removed(nic: Nic) -> list[Command]:
    """All of that away. It comes after the card's own chain has gone, or leads there no more."""
    if nic.filter is None:
        return []
    chains = _chains(nic)
    return [
        *_routed_removed(nic, nic.filter),
        {"delete": _element(B, "filtered", [nic.tap, jump(f"{nic.tap}-in")])},
        *({"flush": gone} for gone in chains),
        *({"delete": gone} for gone in chains),
        *({"delete": {"set": B | {"name": nic.tap + end}}} for end in OF_PACKETS),
    ]


def filter_changed(old: Nic, new: Nic) -> tuple[list[Command], list[Command]]:
    """From the rules of a card to other rules of it: what comes before and after its own chain. Whom it has spoken to
    and what was denied stays (and nft 1.0.6 refuses to add a set that packets change to one that is there)."""
    if old.filter is None or new.filter is None:
        return filter_added(new), filter_removed(old)
    return [*_routed_removed(old, old.filter), *_filled(new, new.filter)], []


def _chains(nic: Nic) -> list[dict[str, Any]]:
    """Those that lead to others first."""
    ends = [f"-{direction}{kind}" for kind in ("", YES, NO) for direction in BOTH]
    return [{"chain": B | {"name": nic.tap + end}} for end in ends]


def _sets(tap: str) -> list[dict[str, Any]]:
    kinds: list[tuple[str, list[str], dict[str, int]]] = [
        (SPOKEN, ["address", "inet_service", "inet_service"], {"timeout": SPOKEN_FOR, "size": MOST_SPOKEN})
    ]
    for direction in BOTH:
        key = ["inet_proto", "address", "address", "inet_service"]
        kinds.append((f"-{direction}{DENIED}", key, {"timeout": DENIED_FOR, "size": MOST_DENIED}))
    return [
        B | {"name": f"{tap}{name}{version}", "flags": ["timeout"]} | limits
        | {"type": [f"ipv{version}_addr" if part == "address" else part for part in key]}
        for name, key, limits in kinds
        for _, version in IPS
    ]  # fmt: skip


def _spoken(tap: str, direction: Direction) -> list[Command]:
    """Whom a packet that passes makes known: (peer, its port, own port), however the packet goes."""
    peer, its, own = _ends(direction)
    made = []
    for ip, version in IPS:
        key = concat(field(ip, peer), field("udp", its), field("udp", own))
        kept = {"set": {"op": "update", "elem": key, "set": f"@{tap}{SPOKEN}{version}"}}
        made.append(rule(B, f"{tap}-{direction}{YES}", kept))
    return [*made, rule(B, f"{tap}-{direction}{YES}", ACCEPT)]


def _denied(tap: str, direction: Direction) -> list[Command]:
    """Written down, at a bounded rate, and dropped. Of what has no ports the first two bytes are: of ICMP, its type and
    code."""
    limit: Expression = {"limit": {"rate": A_SECOND, "per": "second", "burst": AT_ONCE}}
    made = []
    for ip, version in IPS:
        for op, port in (("==", "dport"), ("!=", "sport")):
            key = concat(PROTOCOL, field(ip, "saddr"), field(ip, "daddr"), field("th", port))
            where = f"@{tap}-{direction}{DENIED}{version}"
            kept: Expression = {"op": "update", "elem": key, "set": where, "stmt": [{"counter": None}]}
            what = match(PROTOCOL, {"set": ["tcp", "udp"]}, op)
            made.append(rule(B, f"{tap}-{direction}{NO}", what, limit, {"set": kept}))
    return [*made, rule(B, f"{tap}-{direction}{NO}", DROP)]


def _ends(direction: Direction) -> tuple[str, str, str]:
    """The fields of a packet with the peer's address, its port, and the own port."""
    return ("saddr", "sport", "dport") if direction == "in" else ("daddr", "dport", "sport")


def _judged(nic: Nic, found: Filter, direction: Direction) -> list[Command]:
    """The chain of one direction: what answers, the rules, what is published, the default."""
    chain, inward = f"{nic.tap}-{direction}", direction == "in"
    verdicts = {"allow": goto(chain + YES), "deny": goto(chain + NO)}
    peer, its, own = _ends(direction)
    answers: list[list[Expression]] = [
        [match(ETHERTYPE, 0x0806), ACCEPT],
        [match(ETHERTYPE, {"set": [0x0800, 0x86DD]}, "!="), DROP],
        [match({"&": [field("tcp", "flags"), ["syn", "ack"]]}, "syn", "!="), ACCEPT],
        *(
            [
                match(concat(field(ip, peer), field("udp", its), field("udp", own)), f"@{nic.tap}{SPOKEN}{version}"),
                verdicts["allow"],
            ]
            for ip, version in IPS
        ),
        [match(field("icmp", "type"), ANSWERS4), ACCEPT],
        [match(field("icmpv6", "type"), ANSWERS6), ACCEPT],
        # the rest of a packet that was judged by its beginning
        [match({"&": [field("ip", "frag-off"), 0x1FFF]}, 0, "!="), ACCEPT],
        [match({"exthdr": {"name": "frag", "field": "frag-off"}}, 0, "!="), ACCEPT],
        *([match(field("udp", its), at), match(field("udp", own), by), ACCEPT] for at, by in ((67, 68), (547, 546))),
    ]
    made = [rule(B, chain, *expressions) for expressions in answers]
    for number, each in enumerate(found.rules, 1):
        if each.direction == direction:
            made += [
                rule(B, chain, *expressions, COUNTER, verdicts[each.action], comment=f"{COUNTED_AS}{number}")
                for expressions in _matches(each)
            ]
    if inward:
        for forward in nic.publish:
            made.append(rule(B, chain, match(field(forward.protocol, "dport"), forward.guest), verdicts["allow"]))
    last = verdicts[found.inbound if inward else found.outbound]
    return [*made, rule(B, chain, COUNTER, last, comment=DEFAULTS[direction])]


def _matches(wanted: Rule) -> list[list[Expression]]:
    """The packets that a rule fits: one list of conditions for each nftables rule that it takes."""
    what: list[Expression] = []
    if wanted.ports:
        ports = [first if first == last else {"range": [first, last]} for first, last in wanted.ports]
        what = [match(field(wanted.protocol, "dport"), {"set": ports})]
    elif wanted.protocol in ("tcp", "udp"):
        what = [match(PROTOCOL, wanted.protocol)]
    elif wanted.protocol == "icmp":
        what = [match(PROTOCOL, {"set": ["icmp", "ipv6-icmp"]})]
    if wanted.peers is None:
        return [what]
    side = "saddr" if wanted.direction == "in" else "daddr"
    found = []
    for peer in wanted.peers:
        if isinstance(peer, str):
            found += [[match(field(ip, side), f"@{_set_name(peer, version)}"), *what] for ip, version in IPS]
        else:
            found.append([match(field("ip" if peer.version == 4 else "ip6", side), _address(peer)), *what])
    return found


def _address(peer: Prefix) -> Any:
    return str(peer.network_address) if peer.prefixlen == peer.max_prefixlen else prefix(peer)


# --- what is routed ---


def filter_maps() -> list[Command]:
    """The ways to the chains of cards that have rules."""
    way = {"map": "verdict"}
    return [
        {"add": {"map": B | {"name": "filtered", "type": "ifname"} | way}},
        {"add": {"map": I | {"name": "from-elsewhere4", "type": "ipv4_addr"} | way}},
        {"add": {"map": I | {"name": "from-elsewhere6", "type": "ipv6_addr"} | way}},
        {"add": {"map": I | {"name": "to-host4", "type": ["ifname", "ipv4_addr"]} | way}},
        {"add": {"map": I | {"name": "to-host6", "type": ["ifname", "ipv6_addr"]} | way}},
    ]


def from_elsewhere(chain: str) -> list[Command]:
    """Those of another network, or from outside, come in where a rule of the guest's lets them."""
    return [
        rule(I, chain, {"vmap": {"key": field(ip, "daddr"), "data": f"@from-elsewhere{version}"}})
        for ip, version in IPS
    ]


def to_host(chain: str, iif: Expression) -> list[Command]:
    """Guests reach of the host what a rule of theirs names it for."""
    return [
        rule(I, chain, {"vmap": {"key": concat(iif, field(ip, "saddr")), "data": f"@to-host{version}"}})
        for ip, version in IPS
    ]


def _routed_chains(nic: Nic, found: Filter) -> dict[str, tuple[list[Rule], list[Command]]]:
    """By the end of their names: the rules in it, and the ways to it."""
    inward = [each for each in found.rules if each.direction == "in"]
    hostward = [each for each in found.rules if each.direction == "out" and each.host]
    chains = {}
    if found.routed and nic.address and any(each.action == "allow" for each in inward):
        ways = [(4, nic.address), *([(6, nic.address6)] if nic.address6 else [])]
        name = nic.tap + FROM_ELSEWHERE
        elements = [_element(I, f"from-elsewhere{version}", [address, jump(name)]) for version, address in ways]
        chains[FROM_ELSEWHERE] = (inward, elements)
    if nic.address and any(each.action == "allow" for each in hostward):
        six = [nic.link_local, *([nic.address6] if nic.address6 else [])]
        ways = [(4, nic.address), *((6, address) for address in six)]
        name = nic.tap + TO_HOST
        elements = [
            _element(I, f"to-host{version}", [concat(nic.bridge, address), jump(name)]) for version, address in ways
        ]
        chains[TO_HOST] = (hostward, elements)
    return chains


def _routed_added(nic: Nic, found: Filter) -> list[Command]:
    made: list[Command] = []
    for end, (rules, ways) in _routed_chains(nic, found).items():
        name = nic.tap + end
        chain = {"chain": I | {"name": name}}
        made += [{"add": chain}, {"flush": chain}]
        for each in rules:
            verdict = ACCEPT if each.action == "allow" else DROP
            made += [rule(I, name, *expressions, verdict) for expressions in _matches(each)]
        made += [{"add": way} for way in ways]
    return made


def _routed_removed(nic: Nic, found: Filter) -> list[Command]:
    gone: list[Command] = []
    for end, (_, ways) in _routed_chains(nic, found).items():
        chain = {"chain": I | {"name": nic.tap + end}}
        gone += [*({"delete": way} for way in ways), {"flush": chain}, {"delete": chain}]
    return gone


def _element(table: Command, name: str, element: Any) -> dict[str, Any]:
    return {"element": table | {"name": name, "elem": [element]}}


# --- what has been counted and denied ---


def counted(listed: Iterable[Command]) -> dict[str, tuple[int, int]]:
    """Comment → (packets, bytes) of the rules in a card's chains, from what `nft -j list chain` says."""
    found: dict[str, tuple[int, int]] = {}
    for command in listed:
        said = command.get("rule", {})
        counter = next((each["counter"] for each in said.get("expr", ()) if "counter" in each), None)
        if said.get("comment") and counter:
            packets, octets = found.get(said["comment"], (0, 0))
            found[said["comment"]] = packets + int(counter["packets"]), octets + int(counter["bytes"])
    return found


def attempts(listed: Iterable[Command]) -> list[Attempt]:
    """What a card's sets say was denied, the latest first, from what `nft -j list set` says."""
    found = []
    for command in listed:
        name = str(command.get("set", {}).get("name", ""))
        direction: Direction = "in" if f"-in{DENIED}" in name else "out"
        for said in (each["elem"] for each in command.get("set", {}).get("elem", ())):
            protocol, source, target, port = said["val"]["concat"]
            found.append(
                Attempt(
                    direction, str(protocol), str(source if direction == "in" else target),
                    int(port) if protocol in ("tcp", "udp") else None, int(said["counter"]["packets"]),
                    float(said["timeout"]) - float(said["expires"]),
                )
            )  # fmt: skip
    return sorted(found, key=lambda attempt: attempt.seconds)


def reason(found: Filter, members: Mapping[str, frozenset[str]], attempt: Attempt) -> int | None:
    """The number of the rule that denies it, as the rules are now; None for the default."""
    for number, each in enumerate(found.rules, 1):
        if each.direction == attempt.direction and _fits(each, members, attempt):
            return number if each.action == "deny" else None
    return None


def _fits(wanted: Rule, members: Mapping[str, frozenset[str]], attempt: Attempt) -> bool:
    protocol = {"ipv6-icmp": "icmp"}.get(attempt.protocol, attempt.protocol)
    if wanted.protocol not in ("any", protocol):
        return False
    if wanted.ports and not any(first <= (attempt.port or 0) <= last for first, last in wanted.ports):
        return False
    if wanted.peers is None:
        return True
    address = ipaddress.ip_address(attempt.peer)
    for peer in wanted.peers:
        if isinstance(peer, str):
            if attempt.peer in members.get(_set_name(peer, address.version), ()):
                return True
        elif address in peer:
            return True
    return False
