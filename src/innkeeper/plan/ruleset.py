"""The firewall as nftables' JSON (libnftables-json(5)): networks and NICs in, commands out.

Two tables, `bridge innkeeper` and `inet innkeeper`, and nothing outside them. No packet walks a list of VMs: verdict
maps lead from a tap's name, or a published port, to the chain of that NIC. What has our names and is in no map is
dropped. A NIC's rules change in one transaction that names only its own objects.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable
from typing import Any

from innkeeper.plan.network import BRIDGE, METADATA, METADATA_PORT, TAP, Network, Nic

Command = dict[str, Any]
Expression = dict[str, Any]
NAME = "innkeeper"
B: Command = {"family": "bridge", "table": NAME}
I: Command = {"family": "inet", "table": NAME}  # noqa: E741 - as B
TABLES = (("bridge", NAME), ("inet", NAME))
COUNTS = "-n"
"""Ends the name of the chain that counts what comes for a NIC's published ports."""
DROP: Expression = {"drop": None}
ACCEPT: Expression = {"accept": None}
IIF: Expression = {"meta": {"key": "iifname"}}
OIF: Expression = {"meta": {"key": "oifname"}}
PROTOCOL: Expression = {"meta": {"key": "l4proto"}}
LOOPBACK = {"prefix": {"addr": "127.0.0.0", "len": 8}}
TARGET: Expression = {"payload": {"base": "th", "offset": 64, "len": 128}}
"""The address that a neighbour solicitation or advertisement is about (RFC 4861, 4.3 and 4.4)."""
ETHERTYPE: Expression = {"payload": {"base": "ll", "offset": 96, "len": 16}}
"""As it came: `ether type` is what is inside a tag that the kernel has taken off."""
BEHIND_FRAGMENT: Expression = {"exthdr": {"name": "frag", "field": "nexthdr"}}
DISCOVERY = {
    "set": ["nd-router-solicit", "nd-router-advert", "nd-neighbor-solicit", "nd-neighbor-advert", "nd-redirect"]
}
UPPER_LAYERS = {"set": [6, 17, 50, 58, 132, 136]}
"""TCP, UDP, ESP, ICMPv6, SCTP, UDP-Lite: what may follow an IPv6 fragment header."""
MEMBERSHIP = {"set": ["mld-listener-report", "mld2-listener-report"]}
ON_THE_OUTSIDE = 0x10000000
"""A bit of the mark of packets from guests in bridged networks: only the bridge sees which tap they come from."""
NEIGHBOURS = {"set": ["nd-neighbor-solicit", "nd-neighbor-advert", "nd-router-solicit", *MEMBERSHIP["set"]]}


def clear() -> list[Command]:
    """Both tables away, whether they are there or not."""
    tables = [{"table": {"family": family, "name": name}} for family, name in TABLES]
    return [command for table in tables for command in ({"add": table}, {"delete": table})]


def everything(networks: Iterable[Network], nics: Iterable[Nic]) -> list[Command]:
    """Both tables anew and whole: one transaction, in which no packet finds them absent."""
    networks = list(networks)
    commands = clear() + [{"add": {"table": {"family": family, "name": name}}} for family, name in TABLES]
    commands += [*_bridge(), *_sets(), *_host(), *_between(), *_translation()]
    for network in networks:
        commands += network_added(network)
    for nic in nics:
        commands += nic_added(nic)
    return commands


def network_added(network: Network) -> list[Command]:
    """The elements of one network. A bridge of somebody else's is left alone."""
    if network.subnet is None:
        if network.onto_bridge:
            return []
        return [
            _element("bridged", network.bridge),
            _element("loops", {"concat": [network.bridge, network.bridge]}),
        ]
    commands = [
        _element("gateways4", {"concat": [network.bridge, network.gateway]}),
        _element("loops", {"concat": [network.bridge, network.bridge]}),
    ]
    if network.gateway6:
        commands.append(_element("gateways6", {"concat": [network.bridge, network.gateway6]}))
    if network.mode == "internal":
        commands.append(_element("internal", network.bridge))
    if network.mode == "nat":
        commands.append(_element("nat", network.bridge))
        commands.append(_element("nat4", _prefix(network.subnet)))
        if network.prefix:
            commands.append(_element("nat6", _prefix(network.prefix)))
    return commands


def network_removed(network: Network) -> list[Command]:
    """The same elements away."""
    return [{"delete": command["add"]} for command in network_added(network)]


def nic_added(nic: Nic) -> list[Command]:
    """The chains of one NIC, made or made anew, and the way to them."""
    chain = {"family": "bridge", "table": NAME, "name": nic.tap}
    return [
        {"add": {"counter": chain}},
        {"add": {"chain": chain}},
        {"flush": {"chain": chain}},
        *(_rule(B, nic.tap, *rule) for rule in _own_packets(nic)),
        {"add": {"element": B | {"name": "nics", "elem": [[nic.tap, {"jump": {"target": nic.tap}}]]}}},
        *metadata_added(nic),
        *publish_added(nic),
    ]


def nic_removed(nic: Nic) -> list[Command]:
    """All of that away."""
    chain = {"family": "bridge", "table": NAME, "name": nic.tap}
    return [
        {"delete": {"element": B | {"name": "nics", "elem": [[nic.tap, {"jump": {"target": nic.tap}}]]}}},
        {"flush": {"chain": chain}},
        {"delete": {"chain": chain}},
        {"delete": {"counter": chain}},
        *metadata_removed(nic),
        *publish_removed(nic),
    ]


def metadata_added(nic: Nic) -> list[Command]:
    """It may ask the metadata service, if its VM wants that."""
    return [_element("metadata", {"concat": [nic.bridge, nic.address]})] if nic.metadata else []


def metadata_removed(nic: Nic) -> list[Command]:
    """It may no more."""
    return [{"delete": command["add"]} for command in metadata_added(nic)]


def publish_added(nic: Nic) -> list[Command]:
    """What leads from outside to the published ports of one NIC."""
    chain = I | {"name": nic.tap}
    rules = []
    for forward in nic.publish:
        if forward.address == "0.0.0.0":
            where = _match({"fib": {"result": "type", "flags": ["daddr"]}}, "local")
        else:
            where = _match(_field("ip", "daddr"), forward.address)
        to = {"dnat": {"family": "ip", "addr": nic.address, "port": forward.guest}}
        rules.append(_rule(I, nic.tap, where, _match(_field(forward.protocol, "dport"), forward.host), to))
    return [{"add": {"chain": chain}}, {"flush": {"chain": chain}}, *rules, *_published(nic, "add"), *_counted(nic)]


def publish_removed(nic: Nic) -> list[Command]:
    """The same away."""
    chain = {"chain": I | {"name": nic.tap}}
    return [*_published(nic, "delete"), {"flush": chain}, {"delete": chain}, *_counted_no_more(nic)]


def publish_changed(old: Nic, new: Nic) -> list[Command]:
    """Other published ports of a NIC that stays as it is."""
    return [*_published(old, "delete"), *_counted_no_more(old), *publish_added(new)]


def counts(listed: Iterable[Command]) -> dict[tuple[str, str, int], tuple[int, int]]:
    """(tap, protocol, host port) → (packets, bytes) that came for a published port, in what `nft -j list` says."""
    found = {}
    for command in listed:
        rule = command.get("rule", {})
        if str(rule.get("chain", "")).endswith(COUNTS):
            protocol, port, counter = rule["expr"]
            key = rule["chain"].removesuffix(COUNTS), protocol["match"]["right"], int(port["match"]["right"])
            found[key] = int(counter["counter"]["packets"]), int(counter["counter"]["bytes"])
    return found


def objects(commands: Iterable[Command]) -> set[str]:
    """What must be there after these commands, as words to compare: tables, chains with the number of their rules,
    elements. The same of what `nft -j list` says tells what somebody has taken away."""
    found: set[str] = set()
    rules: dict[str, int] = {}
    for command in commands:
        for kind, what in command.get("add", command).items():
            where = f"{what.get('family')} {what.get('table', '')} {what.get('chain') or what.get('name')}"
            if kind == "rule":
                rules[where] = rules.get(where, 0) + 1
            elif kind in ("table", "chain", "map", "set", "counter"):
                found.add(f"{kind} {where}")
            if kind in ("element", "map", "set"):
                found |= {f"element {where} {_word(element)}" for element in what.get("elem", ())}
    return found | {f"rules {where}: {number}" for where, number in rules.items()}


def _word(element: Any) -> str:
    if isinstance(element, list):  # of a map
        return f"{_word(element[0])} → {element[1]['jump']['target']}"
    if isinstance(element, dict) and "concat" in element:
        return " . ".join(map(str, element["concat"]))
    return f"{element['prefix']['addr']}/{element['prefix']['len']}" if isinstance(element, dict) else str(element)


def _bridge() -> list[Command]:
    """What guests send is looked at before the bridge sees it."""
    return [
        {"add": {"map": B | {"name": "nics", "type": "ifname", "map": "verdict"}}},
        _chain(B, "from-guests", "filter", "prerouting", -300),
        _rule(B, "from-guests", _match(IIF, f"{TAP}*"), {"vmap": {"key": IIF, "data": "@nics"}}),
        _rule(B, "from-guests", _match(IIF, f"{TAP}*"), DROP),
    ]


def _own_packets(nic: Nic) -> list[list[Expression]]:
    """Only from its own MAC and addresses, only IPv4, IPv6 and ARP, and nothing that only a router or a DHCP server
    says. The rest is dropped and counted."""
    drop: list[Expression] = [{"counter": nic.tap}, DROP]
    if nic.address is None:
        return _own_packets_outside(nic, drop)
    addresses = [nic.link_local, *([nic.address6] if nic.address6 else [])]
    targets = {"set": ["0x" + ipaddress.IPv6Address(address).packed.hex() for address in addresses]}
    kind = _field("icmpv6", "type")
    nobody = _match(_field("ip6", "saddr"), "::")
    return [
        *_nobodys(nic.mac, drop),
        [_match(_field("ip", "saddr"), nic.address), ACCEPT],
        [
            _match(_field("arp", "saddr ether"), nic.mac),
            _match(_field("arp", "saddr ip"), {"set": [nic.address, "0.0.0.0"]}),
            ACCEPT,
        ],
        [
            _match(_field("ip", "saddr"), "0.0.0.0"),
            _match(_field("ip", "daddr"), "255.255.255.255"),
            _match(_field("udp", "sport"), 68),
            _match(_field("udp", "dport"), 67),
            ACCEPT,
        ],
        [_match(kind, {"set": ["nd-router-advert", "nd-redirect"]}), *drop],
        [_match(kind, "nd-neighbor-advert"), _match(TARGET, targets, "!="), *drop],
        [_match(_field("ip6", "saddr"), {"set": addresses}), ACCEPT],
        [nobody, _match(kind, "nd-neighbor-solicit"), _match(TARGET, targets), ACCEPT],
        [nobody, _match(kind, MEMBERSHIP), ACCEPT],
        drop,
    ]


def _own_packets_outside(nic: Nic, drop: list[Expression]) -> list[list[Expression]]:
    """The same where the network outside says who has which address."""
    mark: Expression = {"meta": {"key": "mark"}}
    marked: Expression = {"mangle": {"key": mark, "value": {"|": [mark, ON_THE_OUTSIDE]}}}
    return [*nobodys_outside(nic.mac, drop), [marked, ACCEPT]]


def nobodys_outside(mac: str, drop: list[Expression]) -> list[list[Expression]]:
    """What no guest sends that is on a network outside, whatever its address there."""
    return [
        *_nobodys(mac, drop),
        [_match(_field("icmpv6", "type"), {"set": ["nd-router-advert", "nd-redirect"]}), *drop],
        [_match(_field("arp", "saddr ether"), mac, "!="), *drop],
    ]


def _nobodys(mac: str, drop: list[Expression]) -> list[list[Expression]]:
    """What no guest sends: from another card, another protocol, in a VLAN of any kind, as a DHCP server, or such that
    nobody sees what it is before it is put together (RFC 7112, 6980)."""
    return [
        [_match(_field("ether", "saddr"), mac, "!="), *drop],
        [_match(ETHERTYPE, {"set": [0x0800, 0x0806, 0x86DD]}, "!="), *drop],
        [_match(_field("udp", "sport"), {"set": [67, 547]}), *drop],
        [_match(BEHIND_FRAGMENT, UPPER_LAYERS, "!="), *drop],
        [_match(BEHIND_FRAGMENT, 58), _match(_field("icmpv6", "type"), DISCOVERY), *drop],
    ]


def _sets() -> list[Command]:
    types: dict[str, str | list[str]] = {
        "gateways4": ["ifname", "ipv4_addr"], "gateways6": ["ifname", "ipv6_addr"], "loops": ["ifname", "ifname"],
        "metadata": ["ifname", "ipv4_addr"], "internal": "ifname", "nat": "ifname", "bridged": "ifname",
    }  # fmt: skip
    ranges = {"nat4": "ipv4_addr", "nat6": "ipv6_addr"}
    return [
        *({"add": {"set": I | {"name": name, "type": kind}}} for name, kind in types.items()),
        *({"add": {"set": I | {"name": name, "type": kind, "flags": ["interval"]}}} for name, kind in ranges.items()),
        {"add": {"map": I | {"name": "published", "type": ["inet_proto", "inet_service"], "map": "verdict"}}},
        {"add": {"map": I | {"name": "counted", "type": "ipv4_addr", "map": "verdict"}}},
    ]


def _host() -> list[Command]:
    """Guests reach of the host only DHCP, DNS and the ping of their own gateway, those that are bridged by us its ping;
    the host reaches all but internal networks."""
    from_bridge, to_internal = _match(IIF, f"{BRIDGE}*"), _match(OIF, "@internal")
    gateway4 = _match({"concat": [IIF, _field("ip", "daddr")]}, "@gateways4")
    gateway6 = _match({"concat": [IIF, _field("ip6", "daddr")]}, "@gateways6")
    established = _match({"ct": {"key": "state"}}, ["established", "related"], "in")
    dns = [_match(PROTOCOL, {"set": ["tcp", "udp"]}), _match(_field("th", "dport"), 53), ACCEPT]
    return [
        {"add": {"chain": I | {"name": "to-host"}}},
        _rule(I, "to-host", established, ACCEPT),
        _rule(I, "to-host", gateway4, *dns),
        _rule(I, "to-host", gateway6, *dns),
        _rule(I, "to-host", gateway4, _match(_field("icmp", "type"), "echo-request"), ACCEPT),
        _rule(I, "to-host", gateway6, _match(_field("icmpv6", "type"), "echo-request"), ACCEPT),
        _rule(I, "to-host", ASKS, _match(_field("tcp", "dport"), METADATA_PORT), REDIRECTED, ACCEPT),
        _rule(I, "to-host", _match(_field("udp", "dport"), {"set": [67, 547]}), ACCEPT),
        _rule(I, "to-host", _match(_field("icmpv6", "type"), NEIGHBOURS), ACCEPT),
        _rule(I, "to-host", DROP),
        _chain(I, "input", "filter", "input", 0),
        _rule(I, "input", from_bridge, {"jump": {"target": "to-host"}}),
        {"add": {"chain": I | {"name": "to-host-outside"}}},
        _rule(I, "to-host-outside", established, ACCEPT),
        _rule(I, "to-host-outside", _match(_field("icmp", "type"), "echo-request"), ACCEPT),
        _rule(I, "to-host-outside", _match(_field("icmpv6", "type"), "echo-request"), ACCEPT),
        _rule(I, "to-host-outside", _match(_field("icmpv6", "type"), NEIGHBOURS), ACCEPT),
        _rule(I, "to-host-outside", DROP),
        _rule(I, "input", *_bridged_by_us(), {"jump": {"target": "to-host-outside"}}),
        {"add": {"chain": I | {"name": "to-internal"}}},
        _rule(I, "to-internal", _match(PROTOCOL, "ipv6-icmp"), ACCEPT),
        _rule(I, "to-internal", _match(_field("icmp", "type"), "echo-reply"), ACCEPT),
        _rule(
            I, "to-internal", _match(PROTOCOL, {"set": ["tcp", "udp"]}),
            _match(_field("th", "sport"), {"set": [53, 67, 547]}), ACCEPT,
        ),
        _rule(
            I, "to-internal", _match(_field("tcp", "sport"), METADATA_PORT), REDIRECTED,
            _match({"ct": {"key": "direction"}}, "reply"), ACCEPT,
        ),
        _rule(I, "to-internal", DROP),
        _chain(I, "output", "filter", "output", 0),
        _rule(I, "output", to_internal, {"jump": {"target": "to-internal"}}),
    ]  # fmt: skip


def _between() -> list[Command]:
    """From one network to another nothing; out from nat networks only; in what answers, or was published."""
    from_bridge, to_bridge = _match(IIF, f"{BRIDGE}*"), _match(OIF, f"{BRIDGE}*")
    within = _match({"concat": [IIF, OIF]}, "@loops")  # seen here only where br_netfilter is loaded
    return [
        {"add": {"chain": I | {"name": "leaving"}}},
        # Nobody routes link-local addresses; the metadata service of the cloud that the host runs in has such a one.
        _rule(I, "leaving", _match(_field("ip", "daddr"), LINK_LOCAL), DROP),
        _rule(I, "leaving", _match(_field("ip6", "daddr"), "fd00:ec2::254"), DROP),
        _rule(I, "leaving", to_bridge, DROP),
        _rule(I, "leaving", _match(IIF, "@nat"), ACCEPT),
        _rule(I, "leaving", DROP),
        {"add": {"chain": I | {"name": "entering"}}},
        _rule(I, "entering", _match({"ct": {"key": "state"}}, ["established", "related"], "in"), ACCEPT),
        _rule(I, "entering", _match({"ct": {"key": "status"}}, "dnat", "in"), ACCEPT),
        _rule(I, "entering", DROP),
        _chain(I, "forward", "filter", "forward", 0),
        _rule(I, "forward", within, ACCEPT),
        # The host is no router for them; what they answer to a guest behind its NAT goes on.
        _rule(
            I,
            "forward",
            *_bridged_by_us(),
            _match({"ct": {"key": "state"}}, {"set": ["established", "related"]}, "!="),
            DROP,
        ),
        _rule(I, "forward", from_bridge, {"jump": {"target": "leaving"}}),
        _rule(I, "forward", to_bridge, {"jump": {"target": "entering"}}),
    ]


def _translation() -> list[Command]:
    """What leaves a nat network bears the host's address; what comes for a published port goes to its guest. Guests
    do not come in by published ports: they have names for each other."""
    away = _match(OIF, f"{BRIDGE}*", "!=")
    where = {"vmap": {"key": {"concat": [PROTOCOL, _field("th", "dport")]}, "data": "@published"}}
    return [
        _chain(I, "published-in", "nat", "prerouting", -100),
        _rule(
            I, "published-in", ASKS, _match(_field("ip", "daddr"), METADATA), _match(_field("tcp", "dport"), 80),
            # what systems send with: one less has been through a router or a container's bridge in the guest
            _match(_field("ip", "ttl"), {"set": [64, 128, 255]}), {"redirect": {"port": METADATA_PORT}},
        ),
        _rule(I, "published-in", _match(IIF, f"{BRIDGE}*"), ACCEPT),
        _rule(I, "published-in", where),
        _chain(I, "published-out", "nat", "output", -100),
        _rule(I, "published-out", where),
        _chain(I, "counting", "filter", "postrouting", 0),
        _rule(
            I, "counting", _match(OIF, f"{BRIDGE}*"), _match({"ct": {"key": "status"}}, "dnat", "in"),
            {"vmap": {"key": _field("ip", "daddr"), "data": "@counted"}},
        ),
        _chain(I, "masquerade", "nat", "postrouting", 100),
        _rule(I, "masquerade", _match(_field("ip", "saddr"), "@nat4"), away, {"masquerade": None}),
        _rule(I, "masquerade", _match(_field("ip6", "saddr"), "@nat6"), away, {"masquerade": None}),
        # the host's loopback, for ports that are published there only
        _rule(
            I, "masquerade", _match(_field("ip", "saddr"), LOOPBACK), _match(OIF, f"{BRIDGE}*"), {"masquerade": None}
        ),
    ]  # fmt: skip


def _bridged_by_us() -> list[Expression]:
    """From a guest, not from another machine of that network."""
    marked: Expression = {"&": [{"meta": {"key": "mark"}}, ON_THE_OUTSIDE]}
    return [_match(IIF, "@bridged"), _match(marked, ON_THE_OUTSIDE)]


def _published(nic: Nic, verb: str) -> list[Command]:
    jump = {"jump": {"target": nic.tap}}
    elements: list[Any] = [[{"concat": [protocol, port]}, jump] for protocol, port in _ports(nic)]
    return [{verb: {"element": I | {"name": "published", "elem": elements}}}] if elements else []


def _counted(nic: Nic) -> list[Command]:
    """The packets to its published ports are counted, on their way into the bridge. nft 1.0.6 takes the port that was
    asked for (`ct original`) in no map's key, so the way here is by the guest's address."""
    if not nic.publish:
        return []
    name = nic.tap + COUNTS
    chain = {"chain": I | {"name": name}}
    rules = [
        _rule(
            I, name, _match(PROTOCOL, protocol), _match({"ct": {"key": "proto-dst", "dir": "original"}}, port),
            {"counter": {"packets": 0, "bytes": 0}},
        )
        for protocol, port in _ports(nic)
    ]  # fmt: skip
    return [{"add": chain}, {"flush": chain}, *rules, _element("counted", [nic.address, {"jump": {"target": name}}])]


def _counted_no_more(nic: Nic) -> list[Command]:
    if not nic.publish:
        return []
    chain = {"chain": I | {"name": nic.tap + COUNTS}}
    way = {"name": "counted", "elem": [[nic.address, {"jump": {"target": nic.tap + COUNTS}}]]}
    return [{"delete": {"element": I | way}}, {"flush": chain}, {"delete": chain}]


def _ports(nic: Nic) -> list[tuple[str, int]]:
    return sorted({(forward.protocol, forward.host) for forward in nic.publish})


def _chain(table: Command, name: str, kind: str, hook: str, priority: int) -> Command:
    return {"add": {"chain": table | {"name": name, "type": kind, "hook": hook, "prio": priority, "policy": "accept"}}}


def _rule(table: Command, chain: str, *expressions: Expression) -> Command:
    return {"add": {"rule": table | {"chain": chain, "expr": list(expressions)}}}


def _element(name: str, element: Any) -> Command:
    return {"add": {"element": I | {"name": name, "elem": [element]}}}


def _match(left: Expression, right: Any, op: str = "==") -> Expression:
    return {"match": {"op": op, "left": left, "right": right}}


def _field(protocol: str, field: str) -> Expression:
    return {"payload": {"protocol": protocol, "field": field}}


def _prefix(network: ipaddress.IPv4Network | ipaddress.IPv6Network) -> Expression:
    return {"prefix": {"addr": str(network.network_address), "len": network.prefixlen}}


LINK_LOCAL = _prefix(ipaddress.IPv4Network("169.254.0.0/16"))
ASKS = _match({"concat": [IIF, _field("ip", "saddr")]}, "@metadata")
REDIRECTED = _match({"ct": {"key": "status"}}, "dnat", "in")
