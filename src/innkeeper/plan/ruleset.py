"""The firewall as nftables' JSON (libnftables-json(5)): networks and NICs in, commands out.

Two tables, `bridge innkeeper` and `inet innkeeper`, and nothing outside them. No packet walks a list of VMs: sets say
which tap may send what (plan/sender.py), and verdict maps lead from a tap's name, or a published port, to the chain of
that NIC (plan/filter.py). What has our names and is in no set is dropped. A NIC's rules change in one transaction that
names only its own objects.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable
from typing import Any

from innkeeper.plan import filter, sender
from innkeeper.plan.filter import from_elsewhere, to_host
from innkeeper.plan.network import BRIDGE, METADATA, METADATA_PORT, TAP, Network, Nic
from innkeeper.plan.nft import (
    ACCEPT,
    DROP,
    IIF,
    NAME,
    OIF,
    PROTOCOL,
    B,
    Command,
    Expression,
    I,
    chain,
    field,
    goto,
    match,
    prefix,
    rule,
)  # fmt: skip

TABLES = (("bridge", NAME), ("inet", NAME))
COUNTS = "-n"
"""Ends the name of the chain that counts what comes for a NIC's published ports."""
LOOPBACK = {"prefix": {"addr": "127.0.0.0", "len": 8}}
OF_PACKETS = {*filter.OF_PACKETS, sender.REFUSED}
"""Sets whose elements come and go with the guests' packets."""
NEIGHBOURS = {"set": ["nd-neighbor-solicit", "nd-neighbor-advert", "nd-router-solicit", *sender.MEMBERSHIP["set"]]}


def clear() -> list[Command]:
    """Both tables away, whether they are there or not."""
    tables = [{"table": {"family": family, "name": name}} for family, name in TABLES]
    return [command for table in tables for command in ({"add": table}, {"delete": table})]


def everything(networks: Iterable[Network], nics: Iterable[Nic]) -> list[Command]:
    """Both tables anew and whole: one transaction, in which no packet finds them absent."""
    networks, nics = list(networks), list(nics)
    commands = clear() + [{"add": {"table": {"family": family, "name": name}}} for family, name in TABLES]
    commands += [*_sets(), *_bridge(), *_host(), *_between(), *_translation()]
    for network in networks:
        commands += network_added(network)
    commands += filter.tags_changed({}, filter.tagged(nics))[0]
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
        _element("inside4", prefix(network.subnet)),
    ]
    if network.prefix:
        commands.append(_element("inside6", prefix(network.prefix)))
    if network.gateway6:
        commands.append(_element("gateways6", {"concat": [network.bridge, network.gateway6]}))
    if network.mode == "internal":
        commands.append(_element("internal", network.bridge))
    if network.mode == "nat":
        commands.append(_element("nat", network.bridge))
        commands.append(_element("nat4", prefix(network.subnet)))
        if network.prefix:
            commands.append(_element("nat6", prefix(network.prefix)))
    return commands


def network_removed(network: Network) -> list[Command]:
    """The same elements away."""
    return [{"delete": command["add"]} for command in network_added(network)]


def nic_added(nic: Nic) -> list[Command]:
    """All that is of one NIC, whose rules name no VM any more but by its addresses."""
    return [*sender.sender_added(nic), *filter.filter_added(nic), *metadata_added(nic), *publish_added(nic)]


def nic_removed(nic: Nic) -> list[Command]:
    """All of that away."""
    return [*sender.sender_removed(nic), *filter.filter_removed(nic), *metadata_removed(nic), *publish_removed(nic)]


def nic_changed(old: Nic, new: Nic) -> list[Command]:
    """From a NIC to the same one with other rules, ports or address: only what is other."""
    commands = [*sender.sender_changed(old, new), *filter.filter_changed(old, new)]
    if metadata_added(old) != metadata_added(new):
        commands += [*metadata_removed(old), *metadata_added(new)]
    if (old.publish, old.addresses) != (new.publish, new.addresses):
        commands += [*publish_removed(old), *publish_added(new)]
    return commands


def metadata_added(nic: Nic) -> list[Command]:
    """It may ask the metadata service, if its VM wants that."""
    return [_element("metadata", {"concat": [nic.bridge, nic.address]})] if nic.metadata else []


def metadata_removed(nic: Nic) -> list[Command]:
    """It may no more."""
    return [{"delete": command["add"]} for command in metadata_added(nic)]


def publish_added(nic: Nic) -> list[Command]:
    """What leads from outside to the published ports of one NIC."""
    if not nic.publish:
        return []
    named = I | {"name": nic.tap}
    rules = []
    for forward in nic.publish:
        for version, ip, address in ((4, "ip", nic.address), (6, "ip6", nic.address6)):
            if version not in forward.families or address is None:
                continue
            where = [match(field(ip, "daddr"), forward.address)]
            if forward.everywhere:
                where = [match({"fib": {"result": "type", "flags": ["daddr"]}}, "local")]
                # The kernel lets no answer come back to ::1 from a network. Who is refused there tries 127.0.0.1.
                where += [match(field(ip, "daddr"), "::1", "!=")] if version == 6 else []
            to = {"dnat": {"family": ip, "addr": address, "port": forward.guest}}
            port = match(field(forward.protocol, "dport"), forward.host)
            rules.append(rule(I, nic.tap, match({"meta": {"key": "nfproto"}}, f"ipv{version}"), *where, port, to))
    return [{"add": {"chain": named}}, {"flush": {"chain": named}}, *rules, *_published(nic, "add"), *_counted(nic)]


def publish_removed(nic: Nic) -> list[Command]:
    """The same away."""
    if not nic.publish:
        return []
    named = {"chain": I | {"name": nic.tap}}
    return [*_published(nic, "delete"), {"flush": named}, {"delete": named}, *_counted_no_more(nic)]


def counts(listed: Iterable[Command]) -> dict[tuple[str, str, int], tuple[int, int]]:
    """(tap, protocol, host port) → (packets, bytes) that came for a published port, in what `nft -j list` says."""
    found = {}
    for command in listed:
        said = command.get("rule", {})
        if str(said.get("chain", "")).endswith(COUNTS):
            protocol, port, counter = said["expr"]
            key = said["chain"].removesuffix(COUNTS), protocol["match"]["right"], int(port["match"]["right"])
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
            if kind in ("element", "map", "set") and what.get("name") not in OF_PACKETS:
                found |= {f"element {where} {_word(element)}" for element in what.get("elem", ())}
    return found | {f"rules {where}: {number}" for where, number in rules.items()}


def _word(element: Any) -> str:
    if isinstance(element, list):  # of a map
        (way,) = element[1].values()
        return f"{_word(element[0])} → {way['target']}"
    if isinstance(element, dict) and "concat" in element:
        return " . ".join(map(str, element["concat"]))
    return f"{element['prefix']['addr']}/{element['prefix']['len']}" if isinstance(element, dict) else str(element)


def _bridge() -> list[Command]:
    """What guests send is looked at before the bridge sees it, what they get when it has."""
    return [
        *filter.shared(),
        {"add": {"chain": B | {"name": "judged"}}},
        rule(B, "judged", {"vmap": {"key": IIF, "data": "@rules-out"}}),
        rule(B, "judged", ACCEPT),
        *sender.shared(goto("judged")),
        chain(B, "from-guests", "filter", "prerouting", -300),
        rule(B, "from-guests", match(IIF, f"{TAP}*"), {"vmap": {"key": IIF, "data": "@limits"}}),
        rule(B, "from-guests", match(IIF, f"{TAP}*"), goto("sent")),
        chain(B, "to-guests", "filter", "postrouting", 0),
        rule(B, "to-guests", match(OIF, f"{TAP}*"), {"vmap": {"key": OIF, "data": "@rules-in"}}),
    ]


def _sets() -> list[Command]:
    types: dict[str, str | list[str]] = {
        "gateways4": ["ifname", "ipv4_addr"], "gateways6": ["ifname", "ipv6_addr"], "loops": ["ifname", "ifname"],
        "metadata": ["ifname", "ipv4_addr"], "internal": "ifname", "nat": "ifname", "bridged": "ifname",
    }  # fmt: skip
    ranges = {"nat4": "ipv4_addr", "nat6": "ipv6_addr", "inside4": "ipv4_addr", "inside6": "ipv6_addr"}
    return [
        *({"add": {"set": I | {"name": name, "type": kind}}} for name, kind in types.items()),
        *({"add": {"set": I | {"name": name, "type": kind, "flags": ["interval"]}}} for name, kind in ranges.items()),
        {"add": {"map": I | {"name": "published", "type": ["inet_proto", "inet_service"], "map": "verdict"}}},
        {"add": {"map": I | {"name": "counted4", "type": "ipv4_addr", "map": "verdict"}}},
        {"add": {"map": I | {"name": "counted6", "type": "ipv6_addr", "map": "verdict"}}},
    ]


def _host() -> list[Command]:
    """Guests reach of the host only DHCP, DNS and the ping of their own gateway, those that are bridged by us its ping;
    the host reaches all but internal networks."""
    from_bridge, to_internal = match(IIF, f"{BRIDGE}*"), match(OIF, "@internal")
    gateway4 = match({"concat": [IIF, field("ip", "daddr")]}, "@gateways4")
    gateway6 = match({"concat": [IIF, field("ip6", "daddr")]}, "@gateways6")
    established = match({"ct": {"key": "state"}}, ["established", "related"], "in")
    dns = [match(PROTOCOL, {"set": ["tcp", "udp"]}), match(field("th", "dport"), 53), ACCEPT]
    return [
        {"add": {"chain": I | {"name": "to-host"}}},
        rule(I, "to-host", established, ACCEPT),
        rule(I, "to-host", gateway4, *dns),
        rule(I, "to-host", gateway6, *dns),
        rule(I, "to-host", gateway4, match(field("icmp", "type"), "echo-request"), ACCEPT),
        rule(I, "to-host", gateway6, match(field("icmpv6", "type"), "echo-request"), ACCEPT),
        rule(I, "to-host", ASKS, match(field("tcp", "dport"), METADATA_PORT), REDIRECTED, ACCEPT),
        rule(I, "to-host", match(field("udp", "dport"), {"set": [67, 547]}), ACCEPT),
        rule(I, "to-host", match(field("icmpv6", "type"), NEIGHBOURS), ACCEPT),
        *to_host("to-host", IIF),
        rule(I, "to-host", DROP),
        chain(I, "input", "filter", "input", 0),
        rule(I, "input", from_bridge, {"jump": {"target": "to-host"}}),
        {"add": {"chain": I | {"name": "to-host-outside"}}},
        rule(I, "to-host-outside", established, ACCEPT),
        rule(I, "to-host-outside", match(field("icmp", "type"), "echo-request"), ACCEPT),
        rule(I, "to-host-outside", match(field("icmpv6", "type"), "echo-request"), ACCEPT),
        rule(I, "to-host-outside", match(field("icmpv6", "type"), NEIGHBOURS), ACCEPT),
        rule(I, "to-host-outside", DROP),
        rule(I, "input", *_bridged_by_us(), {"jump": {"target": "to-host-outside"}}),
        {"add": {"chain": I | {"name": "to-internal"}}},
        rule(I, "to-internal", match(PROTOCOL, "ipv6-icmp"), ACCEPT),
        rule(I, "to-internal", match(field("icmp", "type"), "echo-reply"), ACCEPT),
        rule(
            I, "to-internal", match(PROTOCOL, {"set": ["tcp", "udp"]}),
            match(field("th", "sport"), {"set": [53, 67, 547]}), ACCEPT,
        ),
        rule(
            I, "to-internal", match(field("tcp", "sport"), METADATA_PORT), REDIRECTED,
            match({"ct": {"key": "direction"}}, "reply"), ACCEPT,
        ),
        rule(I, "to-internal", DROP),
        chain(I, "output", "filter", "output", 0),
        rule(I, "output", to_internal, {"jump": {"target": "to-internal"}}),
    ]  # fmt: skip


def _between() -> list[Command]:
    """From one network to another what a rule of the guest there lets in; out from nat networks only; in also what
    answers, or was published."""
    from_bridge, to_bridge = match(IIF, f"{BRIDGE}*"), match(OIF, f"{BRIDGE}*")
    within = match({"concat": [IIF, OIF]}, "@loops")  # seen here only where br_netfilter is loaded
    established = match({"ct": {"key": "state"}}, ["established", "related"], "in")
    return [
        {"add": {"chain": I | {"name": "leaving"}}},
        # Nobody routes link-local addresses; the metadata service of the cloud that the host runs in has such a one.
        rule(I, "leaving", match(field("ip", "daddr"), LINK_LOCAL), DROP),
        rule(I, "leaving", match(field("ip6", "daddr"), "fd00:ec2::254"), DROP),
        rule(I, "leaving", to_bridge, established, ACCEPT),
        rule(I, "leaving", match(IIF, "@nat", "!="), DROP),
        *from_elsewhere("leaving"),
        rule(I, "leaving", to_bridge, DROP),
        rule(I, "leaving", ACCEPT),
        {"add": {"chain": I | {"name": "entering"}}},
        rule(I, "entering", established, ACCEPT),
        rule(I, "entering", match({"ct": {"key": "status"}}, "dnat", "in"), ACCEPT),
        # nobody outside is one of our guests
        rule(I, "entering", match(field("ip", "saddr"), "@inside4"), DROP),
        rule(I, "entering", match(field("ip6", "saddr"), "@inside6"), DROP),
        *from_elsewhere("entering"),
        rule(I, "entering", DROP),
        chain(I, "forward", "filter", "forward", 0),
        rule(I, "forward", within, ACCEPT),
        # The host is no router for them; what they answer to a guest behind its NAT goes on.
        rule(
            I,
            "forward",
            *_bridged_by_us(),
            match({"ct": {"key": "state"}}, {"set": ["established", "related"]}, "!="),
            DROP,
        ),
        rule(I, "forward", from_bridge, {"jump": {"target": "leaving"}}),
        rule(I, "forward", to_bridge, {"jump": {"target": "entering"}}),
    ]


def _translation() -> list[Command]:
    """What leaves a nat network bears the host's address; what comes for a published port goes to its guest. Guests
    do not come in by published ports: they have names for each other."""
    away = match(OIF, f"{BRIDGE}*", "!=")
    where = {"vmap": {"key": {"concat": [PROTOCOL, field("th", "dport")]}, "data": "@published"}}
    return [
        chain(I, "published-in", "nat", "prerouting", -100),
        rule(
            I, "published-in", ASKS, match(field("ip", "daddr"), METADATA), match(field("tcp", "dport"), 80),
            # what systems send with: one less has been through a router or a container's bridge in the guest
            match(field("ip", "ttl"), {"set": [64, 128, 255]}), {"redirect": {"port": METADATA_PORT}},
        ),
        rule(I, "published-in", match(IIF, f"{BRIDGE}*"), ACCEPT),
        rule(I, "published-in", where),
        chain(I, "published-out", "nat", "output", -100),
        rule(I, "published-out", where),
        chain(I, "counting", "filter", "postrouting", 0),
        *(
            rule(
                I, "counting", match(OIF, f"{BRIDGE}*"), match({"ct": {"key": "status"}}, "dnat", "in"),
                {"vmap": {"key": field(ip, "daddr"), "data": f"@counted{version}"}},
            )
            for version, ip in ((4, "ip"), (6, "ip6"))
        ),
        chain(I, "masquerade", "nat", "postrouting", 100),
        rule(I, "masquerade", match(field("ip", "saddr"), "@nat4"), away, {"masquerade": None}),
        rule(I, "masquerade", match(field("ip6", "saddr"), "@nat6"), away, {"masquerade": None}),
        # the host's loopback, for ports that are published there only
        rule(
            I, "masquerade", match(field("ip", "saddr"), LOOPBACK), match(OIF, f"{BRIDGE}*"), {"masquerade": None}
        ),
    ]  # fmt: skip


def _bridged_by_us() -> list[Expression]:
    """From a guest, not from another machine of that network."""
    marked: Expression = {"&": [{"meta": {"key": "mark"}}, sender.ON_THE_OUTSIDE]}
    return [match(IIF, "@bridged"), match(marked, sender.ON_THE_OUTSIDE)]


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
    named = {"chain": I | {"name": name}}
    rules = [
        rule(
            I, name, match(PROTOCOL, protocol), match({"ct": {"key": "proto-dst", "dir": "original"}}, port),
            {"counter": {"packets": 0, "bytes": 0}},
        )
        for protocol, port in _ports(nic)
    ]  # fmt: skip
    return [{"add": named}, {"flush": named}, *rules, *_ways_to_counters(nic)]


def _counted_no_more(nic: Nic) -> list[Command]:
    if not nic.publish:
        return []
    named = {"chain": I | {"name": nic.tap + COUNTS}}
    ways = [{"delete": command["add"]} for command in _ways_to_counters(nic)]
    return [*ways, {"flush": named}, {"delete": named}]


def _ways_to_counters(nic: Nic) -> list[Command]:
    jump, addresses = {"jump": {"target": nic.tap + COUNTS}}, {4: nic.address, 6: nic.address6}
    return [_element(f"counted{version}", [address, jump]) for version, address in addresses.items() if address]


def _ports(nic: Nic) -> list[tuple[str, int]]:
    return sorted({(forward.protocol, forward.host) for forward in nic.publish})


def _element(name: str, element: Any) -> Command:
    return {"add": {"element": I | {"name": name, "elem": [element]}}}


LINK_LOCAL = prefix(ipaddress.IPv4Network("169.254.0.0/16"))
ASKS = match({"concat": [IIF, field("ip", "saddr")]}, "@metadata")
REDIRECTED = match({"ct": {"key": "status"}}, "dnat", "in")
