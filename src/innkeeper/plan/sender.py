"""What a guest may send, as nftables' JSON: only from its own MAC and addresses, only IPv4, IPv6 and ARP, and nothing
that only a router or a DHCP server says. The rest is dropped, and counted by card.

The rules are one list for all cards, which looks up in sets what each may claim to be. Only who it may say to be in
neighbour discovery is in a chain of its card: nft 1.0.6 takes that field in no key of a set.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from innkeeper.plan.nft import (
    ACCEPT,
    DROP,
    ETHERTYPE,
    IIF,
    B,
    Command,
    Expression,
    concat,
    field,
    goto,
    jump,
    match,
    rule,
)  # fmt: skip

if TYPE_CHECKING:
    from innkeeper.plan.network import Nic

REFUSED = "refused"
"""The set that counts, and the chain that drops."""
REFUSED_FOR = 24 * 3600
"""Seconds since the last for which refused packets are told."""
MOST = 1 << 16
LIMIT = "-limit"
"""Ends the name of a card's chain that drops what it sends above its limit."""
SMALLEST_BURST = 128 * 1024
"""Bytes of a limit's token bucket."""
TARGET: Expression = {"payload": {"base": "th", "offset": 64, "len": 128}}
"""The address that a neighbour solicitation or advertisement is about (RFC 4861, 4.3 and 4.4)."""
BEHIND_FRAGMENT: Expression = {"exthdr": {"name": "frag", "field": "nexthdr"}}
DISCOVERY = {
    "set": ["nd-router-solicit", "nd-router-advert", "nd-neighbor-solicit", "nd-neighbor-advert", "nd-redirect"]
}
UPPER_LAYERS = {"set": [6, 17, 50, 58, 132, 136]}
"""TCP, UDP, ESP, ICMPv6, SCTP, UDP-Lite: what may follow an IPv6 fragment header."""
MEMBERSHIP = {"set": ["mld-listener-report", "mld2-listener-report"]}
ON_THE_OUTSIDE = 0x10000000
"""A bit of the mark of packets from guests in bridged networks: only the bridge sees which tap they come from."""


def shared(judged: Expression) -> list[Command]:
    """Sets and rules; `judged` is what becomes of an IP packet that may be sent. The chain `sent` is the way in."""
    sets: dict[str, str | list[str]] = {
        "macs": ["ifname", "ether_addr"], "own4": ["ifname", "ipv4_addr"], "own6": ["ifname", "ipv6_addr"],
        "outside": "ifname",
    }  # fmt: skip
    counting = {"name": REFUSED, "type": "ifname", "flags": ["timeout"], "timeout": REFUSED_FOR, "size": MOST}
    return [
        *({"add": {"set": B | {"name": name, "type": kind}}} for name, kind in sets.items()),
        {"add": {"set": B | counting}},
        *(
            {"add": {"map": B | {"name": name, "type": "ifname", "map": "verdict"}}}
            for name in ("neighbours", "limits")
        ),
        *({"add": {"chain": B | {"name": name}}} for name in (REFUSED, "sent-outside", "sent")),
        rule(B, REFUSED, {"set": {"op": "update", "elem": IIF, "set": f"@{REFUSED}", "stmt": [{"counter": None}]}}),
        rule(B, REFUSED, DROP),
        *(rule(B, "sent-outside", *expressions) for expressions in _outside(judged)),
        *(rule(B, "sent", *expressions) for expressions in _sent(judged)),
    ]


def _sent(judged: Expression) -> list[list[Expression]]:
    refused, kind = goto(REFUSED), field("icmpv6", "type")
    from_nobody = match(field("ip6", "saddr"), "::")
    own_arp = _own("macs", field("arp", "saddr ether"))
    neighbour: Expression = {"vmap": {"key": IIF, "data": "@neighbours"}}
    return [
        [_own("macs", field("ether", "saddr"), "!="), refused],
        # in a VLAN of any kind, or such that nobody sees what it is before it is put together (RFC 7112, 6980)
        [match(ETHERTYPE, {"set": [0x0800, 0x0806, 0x86DD]}, "!="), refused],
        [match(field("udp", "sport"), {"set": [67, 547]}), refused],
        [match(BEHIND_FRAGMENT, UPPER_LAYERS, "!="), refused],
        [match(BEHIND_FRAGMENT, 58), match(kind, DISCOVERY), refused],
        [match(kind, {"set": ["nd-router-advert", "nd-redirect"]}), refused],
        [match(IIF, "@outside"), goto("sent-outside")],
        [_own("own4", field("ip", "saddr")), judged],
        [own_arp, _own("own4", field("arp", "saddr ip")), ACCEPT],
        [own_arp, match(field("arp", "saddr ip"), "0.0.0.0"), ACCEPT],
        [
            match(field("ip", "saddr"), "0.0.0.0"),
            match(field("ip", "daddr"), "255.255.255.255"),
            match(field("udp", "sport"), 68),
            match(field("udp", "dport"), 67),
            ACCEPT,
        ],
        [match(kind, "nd-neighbor-advert"), _own("own6", field("ip6", "saddr")), neighbour],
        [_own("own6", field("ip6", "saddr")), judged],
        [from_nobody, match(kind, "nd-neighbor-solicit"), neighbour],
        [from_nobody, match(kind, MEMBERSHIP), ACCEPT],
        [refused],
    ]


def _outside(judged: Expression) -> list[list[Expression]]:
    """Where the network outside says who has which address."""
    mark: Expression = {"meta": {"key": "mark"}}
    return [
        [_own("macs", field("arp", "saddr ether"), "!="), goto(REFUSED)],
        [{"mangle": {"key": mark, "value": {"|": [mark, ON_THE_OUTSIDE]}}}, judged],
    ]


def _own(name: str, what: Expression, op: str = "==") -> Expression:
    return match(concat(IIF, what), f"@{name}", op)


def sender_added(nic: Nic) -> list[Command]:
    """One card and who it is."""
    return [
        *({"add": chain} for chain in _chain(nic)),
        *(rule(B, nic.tap, match(TARGET, "0x" + address.packed.hex()), ACCEPT) for address in _six(nic)),
        *([rule(B, nic.tap, goto(REFUSED))] if nic.address else []),
        *_limited(nic),
        *({"add": element} for element in _elements(nic)),
    ]


def sender_removed(nic: Nic) -> list[Command]:
    """The same away."""
    return [
        *({"delete": element} for element in _elements(nic)),
        *({verb: chain} for verb in ("flush", "delete") for chain in _chain(nic)),
    ]


def sender_changed(old: Nic, new: Nic) -> list[Command]:
    """From what a card may be to something else."""
    if (old.mac, old.addresses, old.limit) == (new.mac, new.addresses, new.limit):
        return []
    return [*sender_removed(old), *sender_added(new)]


def _limited(nic: Nic) -> list[Command]:
    """What it sends above its limit is dropped. nftables' bucket has room for what the limit lets through in a second
    (net/netfilter/nft_limit.c), so what TCP does not send while it waits for what was lost (200 ms), it may send then;
    and for the burst, or no packet that a guest hands over in one piece (64 KiB) passed a low limit."""
    if nic.limit is None:
        return []
    bucket = {"rate": nic.limit // 8, "rate_unit": "bytes", "burst": SMALLEST_BURST, "burst_unit": "bytes"}
    return [rule(B, nic.tap + LIMIT, {"limit": bucket | {"per": "second", "inv": True}}, DROP)]


def _chain(nic: Nic) -> list[Command]:
    names = [*([nic.tap] if nic.address else []), *([nic.tap + LIMIT] if nic.limit else [])]
    return [{"chain": B | {"name": name}} for name in names]


def _six(nic: Nic) -> list[ipaddress.IPv6Address]:
    return [ipaddress.IPv6Address(address) for address in nic.addresses if ":" in address]


def _elements(nic: Nic) -> list[Command]:
    found: list[tuple[str, Any]] = [("macs", concat(nic.tap, nic.mac))]
    if nic.address is None:
        found.append(("outside", nic.tap))
    else:
        found += [("own6" if ":" in address else "own4", concat(nic.tap, address)) for address in nic.addresses]
        found.append(("neighbours", [nic.tap, goto(nic.tap)]))
    if nic.limit:
        found.append(("limits", [nic.tap, jump(nic.tap + LIMIT)]))
    return [{"element": B | {"name": name, "elem": [element]}} for name, element in found]


def refused(listed: Iterable[Command]) -> dict[str, int]:
    """Packets that each card had no right to send, by tap, from what `nft -j list set` says of `REFUSED`."""
    elements = [element["elem"] for command in listed for element in command.get("set", {}).get("elem", ())]
    return {str(element["val"]): int(element["counter"]["packets"]) for element in elements}
