"""The way of a probe from a guest to its target, hop by hop, told from what was seen of it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any, Literal

from innkeeper.plan.network import Network, Nic

Outcome = Literal["open", "refused", "silence", "unreachable", "unknown"]
TRACE = re.compile(r"trace id \w+ (?P<table>\S+ \S+) (?P<chain>\S+) (?P<what>.*)")


@dataclass(frozen=True)
class Way:
    """How the host sends to an address: next hop, own address on the way. `failed`: that hop does not answer ARP or
    neighbour discovery. `local`: it is the host's own address."""

    device: str
    hop: str
    source: str
    failed: bool = False
    local: bool = False


@dataclass(frozen=True)
class Seen:
    """All that was seen of one probe."""

    nic: Nic
    network: Network
    wanted: str
    port: int
    protocol: str
    agent: str | None = None
    """Why the guest could not be asked; None where it was."""
    cards: tuple[tuple[str, str, tuple[str, ...]], ...] = ()
    """(name, MAC, addresses) of the guest's own interfaces."""
    target: str | None = None
    """The address that the name `wanted` has for the guest."""
    resolving: str = ""
    """What the guest's resolver said where it has none."""
    route: str = ""
    """The guest's, as `ip route get` says."""
    outcome: Outcome = "unknown"
    said: str = ""
    """What the guest's program said."""
    frames: int | None = None
    """That came from the guest meanwhile; None where there is no tap."""
    master: str | None = None
    """What the tap is plugged into."""
    bridge_up: bool = False
    trace: tuple[str, ...] = ()
    way: Way | None = None
    connection: str = ""
    """What the kernel keeps of it, as conntrack(8) writes it."""
    from_host: Outcome = "unknown"
    """The same asked by the host itself."""


@dataclass(frozen=True)
class Hop:
    """One part of the way. `passed` is None where nobody could tell."""

    name: str
    passed: bool | None
    text: str
    evidence: tuple[str, ...] = ()

    def document(self) -> dict[str, Any]:
        """As JSON data."""
        return asdict(self)


def hops(seen: Seen) -> tuple[Hop, ...]:
    """The way as far as it goes: the last hop is the one at which it ends, for good or ill."""
    found = []
    for hop in _all(seen):
        found.append(hop)
        if hop.passed is False:
            break
    return tuple(found)


def dropped(trace: tuple[str, ...]) -> str | None:
    """The line of nft's trace that ended a packet."""
    return next((line for line in trace if line.endswith(("(verdict drop)", "policy drop"))), None)


def _all(seen: Seen) -> Iterator[Hop]:
    yield from _guest(seen)
    yield _tap(seen)
    yield _bridge(seen)
    yield _firewall(seen)
    within = seen.target is not None and _is_within(seen, seen.target)
    if not within:
        yield _route(seen)
        if seen.way is not None and not seen.way.local:
            yield _neighbour(seen, seen.way)
            if seen.network.mode == "nat":
                yield _translation(seen)
    yield _target(seen)


def _is_within(seen: Seen, target: str) -> bool:
    import ipaddress

    address = ipaddress.ip_address(target)
    here = seen.network.subnet if address.version == 4 else seen.network.prefix
    return here is not None and address in here and target not in (seen.network.gateway, seen.network.gateway6)


def _guest(seen: Seen) -> Iterator[Hop]:
    if seen.agent is not None:
        yield Hop("guest", None, "could not be asked, so nothing was sent", (seen.agent,))
        return
    card = next((card for card in seen.cards if card[1] == seen.nic.mac), None)
    if card is None:
        yield Hop("guest", False, f"has no card with MAC {seen.nic.mac}", tuple(f"{c[0]}: {c[1]}" for c in seen.cards))
        return
    name, _, addresses = card
    has = any(address.partition("/")[0] == seen.nic.address for address in addresses)
    line = (f"{name}: {', '.join(addresses) or 'no address'}",)
    if not has:
        yield Hop("guest", False, f"has not taken its address {seen.nic.address}: does its DHCP client run?", line)
        return
    yield Hop("guest", True, f"has its address {seen.nic.address}", line)
    if seen.target is None:
        yield Hop("name", False, f"the guest finds no address for {seen.wanted}", (seen.resolving,))
        return
    if seen.target != seen.wanted:
        yield Hop("name", True, f"{seen.wanted} is {seen.target} for the guest")
    if seen.route:
        lost = "unreachable" in seen.route.lower()
        yield Hop("guest's route", not lost, "there is none" if lost else "leads into its card", (seen.route,))


def _tap(seen: Seen) -> Hop:
    if seen.frames is None:
        return Hop("tap", False, f"there is no {seen.nic.tap}: QEMU has no such card", ())
    if seen.agent is None and seen.frames == 0:
        return Hop(
            "tap", False, "the guest sent nothing into its card", (f"{seen.nic.tap}: 0 frames during the probe",)
        )
    return Hop(
        "tap", True if seen.agent is None else None, f"{seen.frames} frames came from the guest", (seen.nic.tap,)
    )


def _bridge(seen: Seen) -> Hop:
    if seen.master != seen.network.bridge or not seen.bridge_up:
        where = f"{seen.nic.tap} is plugged into {seen.master or 'nothing'}"
        return Hop("bridge", False, f"the card is not connected with {seen.network.bridge}", (where,))
    return Hop("bridge", True, f"{seen.nic.tap} is plugged into {seen.network.bridge}, which is up")


def _firewall(seen: Seen) -> Hop:
    if line := dropped(seen.trace):
        found = TRACE.match(line)
        where = f"table {found['table']}, chain {found['chain']}" if found else "nftables"
        whose = _whose(seen.nic, found["chain"]) if " innkeeper" in where and found else "another firewall drops it"
        return Hop("firewall", False, f"{whose}: {where}", (found["what"] if found else line,))
    if not seen.trace:
        if seen.agent is not None:
            return Hop("firewall", None, "nothing was sent to follow")
        if seen.outcome in ("open", "refused"):
            return Hop("firewall", True, "an answer came, so it passed")
        return Hop("firewall", False, f"no packet for {seen.target} came to it: nobody answers the guest's ARP, or a "
                   "firewall of its own stops it")  # fmt: skip
    tables = dict.fromkeys(found["table"] for found in map(TRACE.match, seen.trace) if found)
    return Hop(
        "firewall",
        True,
        "every chain lets it pass",
        tuple(f"table {table}" for table in tables if "check" not in table),
    )


def _whose(nic: Nic, chain: str) -> str:
    """Whose rules drop it: those of a VM, which has chains of its own (plan/filter.py), or those that all have."""
    if chain == "no-out":
        return f"the firewall rules of {nic.name} deny it (inn firewall ls {nic.name})"
    if chain == "no-in":
        return "the firewall rules of the VM that it is for deny it (inn firewall ls)"
    return "Innkeeper's own rules drop it"


def _route(seen: Seen) -> Hop:
    if seen.way is None:
        return Hop("route", False, f"this host has no route to {seen.target}", ())
    if seen.way.local:
        return Hop("route", True, f"{seen.target} is this host itself")
    via = f" via {seen.way.hop}" if seen.way.hop != seen.target else ""
    return Hop("route", True, f"this host sends it out through {seen.way.device}{via}")


def _neighbour(seen: Seen, way: Way) -> Hop:
    if way.failed:
        return Hop(
            "next hop", False, f"{way.hop} does not answer on {way.device}", (f"ip neigh show {way.hop}: FAILED",)
        )
    return Hop("next hop", True, f"{way.hop} is there on {way.device}")


def _translation(seen: Seen) -> Hop:
    ways = re.findall(r"src=(\S+) dst=(\S+)", seen.connection)
    if len(ways) < 2:
        if seen.outcome in ("open", "refused"):  # after a refusal the kernel forgets at once
            return Hop("NAT", True, "an answer came back")
        return Hop("NAT", None, "the kernel keeps nothing of this connection")
    new = ways[1][1]
    if new == seen.nic.address:
        return Hop(
            "NAT", False, f"it leaves with the guest's own address {new}, to which nobody answers", (seen.connection,)
        )
    return Hop("NAT", True, f"it leaves with the address {new}", (seen.connection,))


def _target(seen: Seen) -> Hop:
    name = f"{seen.target or seen.wanted}:{seen.port}"
    if seen.outcome == "open" or (seen.protocol == "udp" and _replied(seen)):
        return Hop("target", True, f"{name} answers")
    if seen.outcome == "refused":
        return Hop(
            "target", False, f"{name} refuses: nothing listens there, or it does not want this guest", (seen.said,)
        )
    if seen.protocol == "tcp" and _replied(seen):
        text = "came back to this host and was dropped on its way to the guest: inn network doctor says by whom"
        return Hop("answer", False, text, (seen.connection,))
    compared = {
        "open": (f"this host itself reaches {name}, the guest does not",),
        "refused": (f"{name} refuses this host too",),
        "silence": (f"this host gets no answer from {name} either",),
        "unreachable": (f"this host cannot reach {name} either",),
    }.get(seen.from_host, ())
    if seen.agent is not None:
        return Hop("target", None, f"nobody asked {name} from the guest", compared)
    if seen.protocol == "udp":
        return Hop("target", None, f"{name} sent nothing back, which over UDP need not mean anything", compared)
    return Hop("target", False, f"{name} does not answer", (*filter(None, (seen.said,)), *compared))


def _replied(seen: Seen) -> bool:
    return bool(seen.connection) and "[UNREPLIED]" not in seen.connection
