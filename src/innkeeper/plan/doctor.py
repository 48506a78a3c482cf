"""What is wrong with a host's network, for the networks of ours on it: `CHECKS` is the list, each a pure look at a
`Survey`. docs/networks-doctor.md has the same list; a test compares them.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal, NamedTuple

from innkeeper.plan.network import SUBNETS, Network
from innkeeper.plan.rivals import Drop, drops, packet
from innkeeper.plan.survey import Ours, Survey

Level = Literal["error", "warning", "note"]
OUTSIDE = {4: "198.51.100.1", 6: "2001:db8::1"}
"""Addresses that stand for all of the internet (RFC 5737, RFC 3849)."""
HEAL = "inn network doctor --fix"
FULL = 0.9
"""Of addresses, of connections: from here on it is said."""
TUNNELS = ("tun", "wireguard", "ppp", "ipip", "gre", "vti", "xfrm")


class Said(NamedTuple):
    """What one check says of one network: a sentence, the very lines or values that show it, commands that end it."""

    what: str
    evidence: tuple[str, ...]
    fix: tuple[str, ...]


ELSEWHERE = ipaddress.IPv4Network("192.0.2.0/24")
"""Stands for the addresses of a network outside (RFC 5737)."""
Look = Callable[[Network, Ours, Survey], Iterator[Said]]


class Check(NamedTuple):
    """One kind of finding. `safe`: `--fix` does it; `quick`: cheap enough to be looked at before each boot."""

    code: str
    level: Level
    look: Look
    means: str
    safe: bool = False
    quick: bool = True


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong, and for which networks."""

    code: str
    level: Level
    networks: tuple[str, ...]
    what: str
    evidence: tuple[str, ...]
    consequence: str
    fix: tuple[str, ...]
    fixable: bool
    fixed: bool = False

    def document(self) -> dict[str, Any]:
        """As JSON data."""
        return asdict(self)


def diagnose(ours: Ours, survey: Survey, networks: Iterable[Network], *, quick: bool = False) -> list[Finding]:
    """All that is wrong for these networks, the worst first. The same of several networks is one finding."""
    found: dict[tuple[str, Said], Finding] = {}
    for network in networks:
        for check in CHECKS:
            if quick and not check.quick:
                continue
            for said in check.look(network, ours, survey):
                finding = found.get((check.code, said)) or Finding(
                    check.code, check.level, (), said.what, said.evidence, check.means, said.fix, check.safe
                )
                names = tuple(dict.fromkeys((*finding.networks, network.name)))
                found[check.code, said] = replace(finding, networks=names)
    order = ("error", "warning", "note")
    return sorted(found.values(), key=lambda finding: order.index(finding.level))


# --- what Innkeeper itself keeps up ---


def _rules_gone(network: Network, ours: Ours, survey: Survey) -> Iterator[Said]:
    if not ours.rules_whole:
        lines = ("nft list table inet innkeeper, nft list table bridge innkeeper: not as they were made",)
        yield Said("another program has changed or removed Innkeeper's firewall rules", lines, (HEAL,))


def _no_resolver(network: Network, ours: Ours, survey: Survey) -> Iterator[Said]:
    if network.id in ours.without_resolver:
        evidence = (f"no process dnsmasq has INNKEEPER_NETWORK={network.id} in its environment",)
        yield Said(f"the dnsmasq of network {network.name} does not run", evidence, (HEAL,))


def _no_bridge(network: Network, ours: Ours, survey: Survey) -> Iterator[Said]:
    link = survey.links.get(network.bridge)
    if link is None or not link.up:
        evidence = f"ip link show {network.bridge}: {'down' if link else 'no such device'}"
        yield Said(f"the bridge of network {network.name} is {'down' if link else 'gone'}", (evidence,), (HEAL,))


def _forwarding(network: Network, ours: Ours, survey: Survey) -> Iterator[Said]:
    if network.mode != "nat":
        return
    names = ["ipv4/ip_forward", *(["ipv6/conf/all/forwarding"] if network.prefix else [])]
    if off := [name for name in names if survey.sysctls.get(name) == "0"]:
        evidence = tuple(f"{_dotted(name)} = 0" for name in off)
        yield Said("this host does not forward packets between its networks", evidence, (HEAL,))


# --- others on this host ---


def _rivals(network: Network, ours: Ours, survey: Survey) -> Iterator[Said]:
    seen: set[Drop] = set()
    for words, tried in _packets(network, ours, survey):
        for drop in drops(survey.rules, tried):
            if drop not in seen:
                seen.add(drop)
                yield _accused(network, survey, words, drop)


def _packets(network: Network, ours: Ours, survey: Survey) -> Iterator[tuple[str, Any]]:
    """What has to pass: (words for it, an example)."""
    if network.subnet is None:
        return  # addresses and names are those of the network outside
    guest = str(network.subnet[2])
    yield (
        "DHCP requests of its guests",
        packet(4, "udp", 67, iifname=network.bridge, saddr="0.0.0.0", daddr="255.255.255.255"),
    )
    yield "DNS queries of its guests", packet(4, "udp", 53, iifname=network.bridge, saddr=guest, daddr=network.gateway)
    if network.mode != "nat":
        return
    uplink = next(iter(survey.uplinks()), "uplink")
    yield (
        "what its guests send out",
        packet(4, "tcp", 443, iifname=network.bridge, oifname=uplink, saddr=guest, daddr=OUTSIDE[4]),
    )
    if network.prefix and (uplink6 := next(iter(survey.uplinks("::/0")), None)):
        yield (
            "what its guests send out over IPv6",
            packet(
                6, "tcp", 443, iifname=network.bridge, oifname=uplink6, saddr=str(network.prefix[2]), daddr=OUTSIDE[6]
            ),
        )
    for nic in ours.nics:
        for forward in nic.publish if nic.network == network.id else ():
            for version, address in ((4, nic.address), (6, nic.address6)):
                if address and version in forward.families:
                    yield f"what comes for the published port {forward.host} of {nic.name}", packet(
                        version, forward.protocol, forward.guest, iifname=uplink, oifname=network.bridge,
                        saddr=OUTSIDE[version], daddr=address,
                    )  # fmt: skip


def _accused(network: Network, survey: Survey, words: str, drop: Drop) -> Said:
    where = f"table {drop.family} {drop.table}, chain {drop.chain}"
    if drop.handle is None:
        line = f"{where}: type filter hook {drop.hook}; policy drop"
    else:
        text = survey.lines.get((drop.family, drop.table, drop.handle), "drop")
        line = f"{where}: {text} (handle {drop.handle})"
    said = f"another firewall drops {words} of network {network.name}: {where}"
    return Said(said, (line,), let_through(survey, drop, network.bridge))


def let_through(survey: Survey, drop: Drop, bridge: str) -> tuple[str, ...]:
    """The least that makes a foreign chain let our packets pass; what comes in is still looked at by our own rules."""
    forwarded = drop.hook in ("forward", "postrouting")
    names = {entry["chain"]["name"] for entry in survey.rules if _in(entry, drop)}
    if drop.table == "filter" and drop.base == drop.base.upper() and drop.family in ("ip", "ip6"):  # iptables'
        tool = "iptables" if drop.family == "ip" else "ip6tables"
        chain = "DOCKER-USER" if "DOCKER-USER" in names and drop.base == "FORWARD" else drop.base
        if forwarded:
            return tuple(f"{tool} -I {chain} {way} {bridge} -j ACCEPT" for way in ("-i", "-o"))
        return (
            f"{tool} -I {chain} -i {bridge} -p udp -m multiport --dports 53,67,547 -j ACCEPT",
            f"{tool} -I {chain} -i {bridge} -p tcp --dport 53 -j ACCEPT",
        )
    into = f"nft insert rule {drop.family} {drop.table} {drop.base}"
    if forwarded:
        return (f'{into} iifname "{bridge}" accept', f'{into} oifname "{bridge}" accept')
    if drop.hook == "prerouting":
        return (f'{into} iifname "{bridge}" accept',)
    return (
        f'{into} iifname "{bridge}" udp dport {{ 53, 67, 547 }} accept',
        f'{into} iifname "{bridge}" tcp dport 53 accept',
    )


def _in(entry: Any, drop: Drop) -> bool:
    chain = entry.get("chain", {})
    return (chain.get("family"), chain.get("table")) == (drop.family, drop.table)


def _bridged_frames(network: Network, ours: Ours, survey: Survey) -> Iterator[Said]:
    if survey.sysctls.get("bridge/bridge-nf-call-iptables") != "1":
        return
    subnet = network.subnet or ELSEWHERE
    guests = [str(subnet[at]) for at in (2, 3)]
    within = packet(4, "tcp", 80, iifname=network.bridge, oifname=network.bridge, saddr=guests[0], daddr=guests[1])
    for drop in drops(survey.rules, within):
        where = f"table {drop.family} {drop.table}, chain {drop.chain}"
        yield Said(
            f"another firewall sees and drops frames between the guests of network {network.name}: {where}",
            ("net.bridge.bridge-nf-call-iptables = 1",),
            ("sysctl -w net.bridge.bridge-nf-call-iptables=0", *let_through(survey, drop, network.bridge)[:1]),
        )


def _port_taken(network: Network, ours: Ours, survey: Survey) -> Iterator[Said]:
    for nic in ours.nics:
        for forward in nic.publish if nic.network == network.id else ():
            if holder := survey.holders.get((forward.protocol, forward.host)):
                port = f"{forward.host}/{forward.protocol}"
                yield Said(
                    f"{holder} listens on host port {port}, which is published for {nic.name}",
                    (f"{holder} on {forward.protocol} port {forward.host}",),
                    (f"ss -lnp 'sport = :{forward.host}'   # then end that program, or publish another port",),
                )


def _overlap(network: Network, ours: Ours, survey: Survey) -> Iterator[Said]:
    for route in survey.routes:
        to = ipaddress.ip_network(route.to)
        mine = network.subnet if to.version == 4 else network.prefix
        if mine is None or route.device == network.bridge or not to.prefixlen or not to.overlaps(mine):
            continue
        device = survey.links.get(route.device)
        what = "a VPN" if device and device.kind in TUNNELS else "a route of this host"
        via = f" via {route.gateway}" if route.gateway else ""
        yield Said(
            f"subnet {mine} of network {network.name} is also that of {what}, through {route.device}",
            (f"{route.to}{via} dev {route.device}",),
            (
                f"ip route del {route.to} dev {route.device}   # or, with the VMs of {network.name} moved:",
                f"inn network create {network.name}-2 --mode {network.mode} --subnet {_other_subnet(ours, survey)}",
            ),
        )


def _other_subnet(ours: Ours, survey: Survey) -> str:
    taken = [network.subnet for network in ours.networks if network.subnet]
    taken += [
        ipaddress.IPv4Network(route.to) for route in survey.routes if ":" not in route.to and route.to[:2] != "0."
    ]
    others = ipaddress.IPv4Network("192.168.0.0/16").subnets(new_prefix=24)
    return next(
        (str(subnet) for subnet in (*SUBNETS, *others) if not any(subnet.overlaps(each) for each in taken)), "SUBNET"
    )


def _duplicate_mac(network: Network, ours: Ours, survey: Survey) -> Iterator[Said]:
    cards = [nic for nic in ours.nics if nic.network == network.id]
    for at, nic in enumerate(cards):
        for other in cards[at + 1 :]:
            if nic.mac == other.mac:
                evidence = tuple(f"{card.name}, NIC {card.index}: {card.mac}" for card in (nic, other))
                yield Said(
                    f"{nic.name} and {other.name} have the same MAC address", evidence, (_other_mac(other.name),)
                )
        for bridge, port, mac in survey.learned:
            if bridge == network.bridge and mac == nic.mac and port != nic.tap:
                evidence = (f"bridge fdb show br {bridge}: {mac} dev {port}",)
                yield Said(
                    f"somebody behind {port} has the MAC address of {nic.name}", evidence, (_other_mac(nic.name),)
                )


def _other_mac(vm: str) -> str:
    return f"inn export {vm} > {vm}.yaml   # then with another mac, or none: inn rm {vm}; inn apply -f {vm}.yaml"


# --- the way out ---


def _wireless(network: Network, ours: Ours, survey: Survey) -> Iterator[Said]:
    ports = {name for name, link in survey.links.items() if link.master == network.bridge}
    for name in sorted({*ports, *filter(None, (network.parent,))}):
        if name in survey.links and survey.links[name].wireless:
            yield Said(
                f"network {network.name} is bridged onto {name}, which is Wi-Fi",
                (f"/sys/class/net/{name}/wireless",),
                (f"inn network create {network.name}-nat --mode nat",),
            )


def _no_uplink(network: Network, ours: Ours, survey: Survey) -> Iterator[Said]:
    if network.mode == "nat" and not survey.uplinks():
        yield Said(
            "this host has no default route",
            ("ip -4 route show default: nothing",),
            ("ip route add default via GATEWAY",),
        )


def _no_uplink6(network: Network, ours: Ours, survey: Survey) -> Iterator[Said]:
    if network.mode == "nat" and network.prefix and not survey.uplinks("::/0"):
        fix = ("inn network create NAME --no-ipv6   # one without, where the pauses disturb",)
        yield Said("this host has no default route for IPv6", ("ip -6 route show default: nothing",), fix)


def _mtu(network: Network, ours: Ours, survey: Survey) -> Iterator[Said]:
    bridge = survey.links.get(network.bridge)
    if bridge is None:
        return
    uplink = next(iter(survey.uplinks()), None) if network.mode == "nat" else None
    others = [(name, survey.links[name]) for name in (uplink,) if name and name in survey.links]
    others += [(name, link) for name, link in sorted(survey.links.items()) if link.master == network.bridge]
    for name, link in others:
        if link.mtu < bridge.mtu:
            yield Said(
                f"guests of network {network.name} send packets of {bridge.mtu} bytes, and {name} takes {link.mtu}",
                (f"{network.bridge}: mtu {bridge.mtu}", f"{name}: mtu {link.mtu}"),
                (f"ip link set {network.bridge} mtu {link.mtu}   # and in guests: ip link set eth0 mtu {link.mtu}",),
            )


def _strict_source(network: Network, ours: Ours, survey: Survey) -> Iterator[Said]:
    uplinks = survey.uplinks()
    if network.mode != "nat" or len(uplinks) < 2:
        return
    everywhere = survey.sysctls.get("ipv4/conf/all/rp_filter", "0")
    for name in uplinks:
        # the kernel takes the larger of the two (Documentation/networking/ip-sysctl.rst)
        strict = max(everywhere, survey.sysctls.get(f"ipv4/conf/{name}/rp_filter", "0")) == "1"
        if strict and name != uplinks[0]:
            sysctl = f"net.ipv4.conf.{name}.rp_filter"
            yield Said(
                f"{name} takes only what the host would answer through it, and the way out is {uplinks[0]}",
                (f"{sysctl} = 1", f"default routes: {', '.join(uplinks)}"),
                (f"sysctl -w {sysctl}=2",),
            )


def _advertisements(network: Network, ours: Ours, survey: Survey) -> Iterator[Said]:
    if network.mode != "nat" or survey.sysctls.get("ipv6/conf/all/forwarding") != "1":
        return
    for name in dict.fromkeys((*survey.uplinks("::/0"), *survey.uplinks())):
        if survey.sysctls.get(f"ipv6/conf/{name}/accept_ra") == "1":
            sysctl = f"net.ipv6.conf.{name}.accept_ra"
            evidence = (f"{sysctl} = 1", "net.ipv6.conf.all.forwarding = 1")
            yield Said(
                f"{name} ignores router advertisements, since this host forwards", evidence, (f"sysctl -w {sysctl}=2",)
            )


# --- names and numbers ---


def _dns_loop(network: Network, ours: Ours, survey: Survey) -> Iterator[Said]:
    if network.mode != "nat":
        return
    own = {gateway: each.name for each in ours.networks for gateway in (each.gateway, each.gateway6) if gateway}
    for server in survey.nameservers:
        line = (f"/etc/resolv.conf: nameserver {server}",)
        fix = ("sed -n /nameserver/p /etc/resolv.conf   # name the resolver of your provider, or a public one",)
        if server in own:
            yield Said(
                f"this host asks the dnsmasq of network {own[server]} for names, which asks this host", line, fix
            )
        elif server in survey.silent:
            yield Said(f"this host asks {server} for names, where nobody listens", line, fix)


def _addresses(network: Network, ours: Ours, survey: Survey) -> Iterator[Said]:
    if network.subnet is None:
        return
    taken, room = ours.taken.get(network.id, 0), network.subnet.num_addresses - 3
    if taken >= FULL * room:
        yield Said(
            f"network {network.name} has {room - taken} of {room} addresses left",
            (f"{taken} cards in {network.subnet}",),
            (
                "inn ls   # remove VMs that nobody needs, or:",
                f"inn network create {network.name}-2 --subnet {_larger(network.subnet)}",
            ),
        )


def _larger(subnet: ipaddress.IPv4Network) -> str:
    return f"172.20.0.0/{max(16, subnet.prefixlen - 4)}"


def _connections(network: Network, ours: Ours, survey: Survey) -> Iterator[Said]:
    count, most = survey.connections
    if network.mode == "nat" and most and count >= FULL * most:
        yield Said(
            f"the kernel keeps track of {count} connections and has room for {most}",
            (f"net.netfilter.nf_conntrack_count = {count}", f"net.netfilter.nf_conntrack_max = {most}"),
            (f"sysctl -w net.netfilter.nf_conntrack_max={2 * most}",),
        )


def _dotted(path: str) -> str:
    return "net." + path.replace("/", ".")


CHECKS: Sequence[Check] = (
    Check(
        "rules-gone",
        "error",
        _rules_gone,
        "guests are not protected, and reach nothing outside",
        safe=True,
        quick=False,
    ),
    Check("bridge-gone", "error", _no_bridge, "its guests reach nobody", safe=True),
    Check("dnsmasq-dead", "error", _no_resolver, "its guests get neither an address nor names", safe=True, quick=False),
    Check("forwarding-off", "error", _forwarding, "guests reach their host and nothing beyond", safe=True),
    Check("foreign-firewall", "error", _rivals, "those packets vanish, whatever Innkeeper's rules allow"),
    Check("bridge-netfilter", "error", _bridged_frames, "guests of one network do not reach each other"),
    Check("wireless-parent", "error", _wireless, "an access point drops frames of MAC addresses that did not log in"),
    Check("subnet-overlap", "error", _overlap, "of two places with the same addresses, guests or the host miss one"),
    Check("duplicate-mac", "error", _duplicate_mac, "both lose packets, at random", quick=False),
    Check("port-taken", "warning", _port_taken, "from outside the guest answers, and that program never", quick=False),
    Check("no-uplink", "warning", _no_uplink, "guests reach nothing beyond the networks of this host"),
    Check("mtu-mismatch", "warning", _mtu, "connections open, and large answers never arrive where ICMP is filtered"),
    Check("strict-rp-filter", "warning", _strict_source, "answers that come in there are dropped without a word"),
    Check("ra-ignored", "warning", _advertisements, "the host's own IPv6 ends when its routes expire"),
    Check("dns-loop", "warning", _dns_loop, "guests find each other by name, and nobody outside"),
    Check("addresses-low", "warning", _addresses, "soon no VM can join it"),
    Check("conntrack-full", "warning", _connections, "new connections are dropped: `table full` in dmesg"),
    Check("no-ipv6-uplink", "note", _no_uplink6, "guests have IPv6 among themselves; outside they fall back to IPv4"),
)
