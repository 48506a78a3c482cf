"""What a VM's rules let in and out of a card in a network, as nftables' JSON.

Between guests of one network packets pass a bridge, where many kernels track no connections. So what answers is told
by itself there: TCP by its flags, ICMP by its kind, UDP by a set of who has been spoken to. Judged is only what opens
something. The rules are in chains of their card in the bridge's table, which nobody else's packets pass. Where a rule
opens what the network's mode keeps shut (a nat network's guest for those elsewhere, the host for a guest), the routed
packets meet it a second time, in the table `inet`.

A change of one card's rules must not cost more where there are many: nft reads all chains and sets of a table before it
changes anything, and the kernel finds a set by walking them. So a card has as few chains as it can, and no sets.
"""

from __future__ import annotations

import hashlib
import ipaddress
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

from innkeeper.plan.nft import (
    ACCEPT,
    COUNTER,
    DROP,
    ETHERTYPE,
    IIF,
    OIF,
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
IN, OUT, FROM_ELSEWHERE, TO_HOST = "-in", "-out", "-from", "-host"
"""What the names of a card's chains end with; the last two are in `inet`."""
BOTH: tuple[Direction, ...] = ("in", "out")
IPS = (("ip", 4), ("ip6", 6))
SPOKEN, DENIED = "spoken", "denied"
"""Sets, with direction and IP version behind: who spoke UDP with whom of late, and what was denied."""
DENIALS = tuple(f"{DENIED}-{way}{version}" for way in BOTH for version in (4, 6))
OF_PACKETS = (f"{SPOKEN}4", f"{SPOKEN}6", *DENIALS, f"new-{SPOKEN}", f"new-{DENIED}")
"""All of them: their elements come and go with the guests' packets."""
SPOKEN_FOR, DENIED_FOR = 180, 24 * 3600
"""Seconds for which silence may last between two who speak UDP, as conntrack has it, and for which a denial is told."""
MOST = 1 << 17
"""Elements of such a set, over all cards."""
NEW: dict[str, tuple[int, str, int]] = {SPOKEN: (200, "second", 2000), DENIED: (6, "minute", 100)}
"""What one card may add: so many for each time, so many at once. So none fills a set that is everybody's."""
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

    @cached_property
    def vms(self) -> frozenset[str]:
        """The VMs that the rules name, as `vm:NAME`."""
        return self._named("vm:")

    @cached_property
    def tags(self) -> frozenset[str]:
        """The tags that they name, as `tag:NAME`."""
        return self._named("tag:")

    def _named(self, kind: str) -> frozenset[str]:
        peers = (peer for each in self.rules for peer in each.peers or ())
        return frozenset(peer for peer in peers if isinstance(peer, str) and peer.startswith(kind))


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


def with_addresses(nic: Nic, who: Mapping[str, frozenset[str]]) -> Nic:
    """The card with the VMs that its rules name known by their addresses; `who` by `vm:NAME`."""
    if nic.filter is None or not nic.filter.vms:
        return nic
    rules = []
    for each in nic.filter.rules:
        peers: list[Prefix | str] = []
        for peer in each.peers or ():
            known = isinstance(peer, str) and peer.startswith("vm:")
            peers += map(ipaddress.ip_network, sorted(who.get(str(peer), ()))) if known else [peer]
        rules.append(replace(each, peers=None if each.peers is None else tuple(peers)))
    return replace(nic, filter=replace(nic.filter, rules=tuple(rules)))


def tagged(nics: Iterable[Nic]) -> dict[str, frozenset[str]]:
    """The addresses of those that have the tags that rules name, by name of the tag's set."""
    nics = list(nics)
    wanted = frozenset[str]().union(*(nic.filter.tags for nic in nics if nic.filter))
    members: dict[str, set[str]] = {set_name(peer, version): set() for peer in wanted for version in (4, 6)}
    for nic in nics:
        for peer in wanted & {f"tag:{tag}" for tag in nic.tags} if nic.tags else ():
            for address in nic.addresses:
                members[set_name(peer, 6 if ":" in address else 4)].add(address)
    return {name: frozenset(addresses) for name, addresses in members.items()}


def tags_changed(
    old: Mapping[str, frozenset[str]], new: Mapping[str, frozenset[str]]
) -> tuple[list[Command], list[Command]]:
    """What comes before the rules that need them, and what after those that did."""
    first: list[Command] = []
    for name in sorted(new):
        before = old.get(name, frozenset())
        if name not in old:
            kind = "ipv6_addr" if name.startswith("tag6") else "ipv4_addr"
            first += [{"add": {"set": table | {"name": name, "type": kind}}} for table in (B, I)]
        for verb, addresses in (("delete", before - new[name]), ("add", new[name] - before)):
            if addresses:
                first += [{verb: {"element": table | {"name": name, "elem": sorted(addresses)}}} for table in (B, I)]
    gone = [{"delete": {"set": table | {"name": name}}} for name in sorted(old.keys() - new.keys()) for table in (B, I)]
    return first, gone


def set_name(peer: str, version: int) -> str:
    """Of the set of those who have a tag."""
    return f"tag{version}-{hashlib.sha256(peer.encode()).hexdigest()[:16]}"


# --- what all cards share ---


def shared() -> list[Command]:
    """The sets, the maps to the chains of cards that have rules, and what is done with packets that they lead to."""
    way = {"map": "verdict"}
    return [
        *({"add": {"set": made}} for made in _sets()),
        {"add": {"map": B | {"name": "rules-in", "type": "ifname"} | way}},
        {"add": {"map": B | {"name": "rules-out", "type": "ifname"} | way}},
        {"add": {"map": I | {"name": "from-elsewhere4", "type": "ipv4_addr"} | way}},
        {"add": {"map": I | {"name": "from-elsewhere6", "type": "ipv6_addr"} | way}},
        {"add": {"map": I | {"name": "to-host4", "type": ["ifname", "ipv4_addr"]} | way}},
        {"add": {"map": I | {"name": "to-host6", "type": ["ifname", "ipv6_addr"]} | way}},
        *({"add": {"chain": B | {"name": f"{kind}-{way}"}}} for way in BOTH for kind in ("yes", "no", "answers")),
        *(made for direction in BOTH for made in (*_yes(direction), *_no(direction), *_answers(direction))),
    ]


def _sets() -> list[dict[str, Any]]:
    found = [B | {"name": f"new-{kind}", "type": "ifname", "flags": ["timeout"], "timeout": 600} for kind in NEW]
    for version in (4, 6):
        address = f"ipv{version}_addr"
        spoken = ["ifname", address, "inet_service", "inet_service"]
        denied = ["ifname", "inet_proto", address, address, "inet_service"]
        kinds = [(f"{SPOKEN}{version}", spoken, SPOKEN_FOR)]
        kinds += [(f"{DENIED}-{direction}{version}", denied, DENIED_FOR) for direction in BOTH]
        found += [
            B | {"name": name, "type": key, "flags": ["timeout"], "timeout": seconds, "size": MOST}
            for name, key, seconds in kinds
        ]
    return found


def _new(kind: str, card: Expression) -> Expression:
    """The rest of a rule is done as long as the card has not made too many new ones."""
    rate, per, burst = NEW[kind]
    limit = {"limit": {"rate": rate, "per": per, "burst": burst}}
    return {"set": {"op": "update", "elem": card, "set": f"@new-{kind}", "stmt": [limit]}}


def _yes(direction: Direction) -> list[Command]:
    """It passes, and makes known who speaks UDP with whom: (card, peer, its port, own port), whichever way it goes."""
    card, peer, its, own = _ends(direction)
    made = []
    for ip, version in IPS:
        key = concat(card, field(ip, peer), field("udp", its), field("udp", own))
        kept: Expression = {"set": {"op": "update", "elem": key, "set": f"@{SPOKEN}{version}"}}
        made += [
            rule(B, f"yes-{direction}", match(key, f"@{SPOKEN}{version}"), kept, ACCEPT),
            rule(B, f"yes-{direction}", match(PROTOCOL, "udp"), _new(SPOKEN, card), kept),
        ]
    return [*made, rule(B, f"yes-{direction}", ACCEPT)]


def _no(direction: Direction) -> list[Command]:
    """It is written down and dropped. Of what has no ports the first two bytes are written: of ICMP, type and code."""
    card, chain = _ends(direction)[0], f"no-{direction}"
    made = []
    for ip, version in IPS:
        for op, port in (("==", "dport"), ("!=", "sport")):
            name = f"@{DENIED}-{direction}{version}"
            key = concat(card, PROTOCOL, field(ip, "saddr"), field(ip, "daddr"), field("th", port))
            kept: Expression = {"set": {"op": "update", "elem": key, "set": name, "stmt": [{"counter": None}]}}
            what = match(PROTOCOL, {"set": ["tcp", "udp"]}, op)
            made += [
                rule(B, chain, what, match(key, name), kept, DROP),
                rule(B, chain, what, _new(DENIED, card), kept),
            ]
    return [*made, rule(B, chain, DROP)]


def _answers(direction: Direction) -> list[Command]:
    """What needs no rule: what answers, what a link lives on, the rest of a packet that was judged by its beginning.
    What is neither IPv4, IPv6 nor ARP comes to nobody who has rules."""
    card, peer, its, own = _ends(direction)
    passing: list[list[Expression]] = [
        [match(ETHERTYPE, 0x0806), ACCEPT],
        [match(ETHERTYPE, {"set": [0x0800, 0x86DD]}, "!="), DROP],
        [match({"&": [field("tcp", "flags"), ["syn", "ack"]]}, "syn", "!="), ACCEPT],
        *(
            [
                match(concat(card, field(ip, peer), field("udp", its), field("udp", own)), f"@{SPOKEN}{version}"),
                goto(f"yes-{direction}"),
            ]
            for ip, version in IPS
        ),
        [match(field("icmp", "type"), ANSWERS4), ACCEPT],
        [match(field("icmpv6", "type"), ANSWERS6), ACCEPT],
        [match({"&": [field("ip", "frag-off"), 0x1FFF]}, 0, "!="), ACCEPT],
        [match({"exthdr": {"name": "frag", "field": "frag-off"}}, 0, "!="), ACCEPT],
        *([match(field("udp", its), at), match(field("udp", own), by), ACCEPT] for at, by in ((67, 68), (547, 546))),
    ]
    return [rule(B, f"answers-{direction}", *expressions) for expressions in passing]


def _ends(direction: Direction) -> tuple[Expression, str, str, str]:
    """The card, and the fields of a packet with the peer's address, its port, and the own port."""
    return (OIF, "saddr", "sport", "dport") if direction == "in" else (IIF, "daddr", "dport", "sport")


# --- one card ---


def filter_added(nic: Nic) -> list[Command]:
    """The chains of one card's rules, and the ways to them. A direction without rules only remembers who is spoken
    to."""
    if nic.filter is None:
        return []
    made: list[Command] = []
    for direction in BOTH:
        if _has_rules(nic, nic.filter, direction):
            made += [{"add": chain} for chain in _chain(nic, direction)]
            made += _judged(nic, nic.filter, direction)
        made.append({"add": _way(nic, nic.filter, direction)})
    return [*made, *_routed_added(nic, nic.filter)]


def filter_removed(nic: Nic) -> list[Command]:
    """All of that away."""
    if nic.filter is None:
        return []
    gone = _routed_removed(nic, nic.filter)
    for direction in BOTH:
        gone.append({"delete": _way(nic, nic.filter, direction)})
        if _has_rules(nic, nic.filter, direction):
            gone += [{verb: chain} for verb in ("flush", "delete") for chain in _chain(nic, direction)]
    return gone


def filter_changed(old: Nic, new: Nic) -> list[Command]:
    """From the rules of a card to other rules of it."""
    if (old.filter, old.publish, old.addresses) == (new.filter, new.publish, new.addresses):
        return []
    return [*filter_removed(old), *filter_added(new)]


def _has_rules(nic: Nic, found: Filter, direction: Direction) -> bool:
    default = found.inbound if direction == "in" else found.outbound
    return default == "deny" or any(each.direction == direction for each in found.rules)


def _chain(nic: Nic, direction: Direction) -> list[dict[str, Any]]:
    return [{"chain": B | {"name": f"{nic.tap}-{direction}"}}]


def _way(nic: Nic, found: Filter, direction: Direction) -> dict[str, Any]:
    target = f"{nic.tap}-{direction}" if _has_rules(nic, found, direction) else f"yes-{direction}"
    return _element(B, f"rules-{direction}", [nic.tap, goto(target)])


def _judged(nic: Nic, found: Filter, direction: Direction) -> list[Command]:
    """The chain of one direction: what answers, the rules, what is published, the default."""
    chain, inward = f"{nic.tap}-{direction}", direction == "in"
    verdicts = {"allow": goto(f"yes-{direction}"), "deny": goto(f"no-{direction}")}
    made = [rule(B, chain, jump(f"answers-{direction}"))]
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
    """The packets that a rule fits: one list of conditions for each nftables rule that it takes. No sets of their own:
    of those the kernel has one list for each table, which it walks."""
    what: list[list[Expression]] = [[]]
    if wanted.ports:
        ports: list[Any] = [first if first == last else {"range": [first, last]} for first, last in wanted.ports]
        what = [[match(field(wanted.protocol, "dport"), port)] for port in ports]
    elif wanted.protocol in ("tcp", "udp"):
        what = [[match(PROTOCOL, wanted.protocol)]]
    elif wanted.protocol == "icmp":
        what = [[match(PROTOCOL, name)] for name in ("icmp", "ipv6-icmp")]
    side = "saddr" if wanted.direction == "in" else "daddr"
    whom: list[list[Expression]] = []
    for peer in wanted.peers or ():
        if isinstance(peer, str):
            whom += [[match(field(ip, side), f"@{set_name(peer, version)}")] for ip, version in IPS]
        else:
            whom.append([match(field("ip" if peer.version == 4 else "ip6", side), _address(peer))])
    return [[*one, *other] for one in ([[]] if wanted.peers is None else whom) for other in what]


def _address(peer: Prefix) -> Any:
    return str(peer.network_address) if peer.prefixlen == peer.max_prefixlen else prefix(peer)


# --- what is routed ---


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
