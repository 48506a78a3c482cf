"""What a VM's rules have judged and denied, read from nftables' JSON, and which rule it was."""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from innkeeper.plan.filter import DENIED, DENIED_FOR, Filter, Rule, set_name
from innkeeper.plan.nft import Command
from innkeeper.spec.firewall import Direction


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


def attempts(listed: Iterable[Command]) -> dict[str, list[Attempt]]:
    """What was denied, by tap, the latest first, from what `nft -j list set` says of the sets that it is in."""
    found: dict[str, list[Attempt]] = {}
    for command in listed:
        name = str(command.get("set", {}).get("name", ""))
        direction: Direction = "in" if name.startswith(f"{DENIED}-in") else "out"
        for said in (each["elem"] for each in command.get("set", {}).get("elem", ())):
            tap, protocol, source, target, port = said["val"]["concat"]
            found.setdefault(tap, []).append(
                Attempt(
                    direction, str(protocol), str(source if direction == "in" else target),
                    int(port) if protocol in ("tcp", "udp") else None, int(said["counter"]["packets"]),
                    float(DENIED_FOR) - float(said["expires"]),
                )
            )  # fmt: skip
    return {tap: sorted(denied, key=lambda attempt: attempt.seconds) for tap, denied in found.items()}


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
            if attempt.peer in members.get(set_name(peer, address.version), ()):
                return True
        elif address in peer:
            return True
    return False
