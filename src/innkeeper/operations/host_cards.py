"""Cards on interfaces of the host, with no network of ours between: what is refused, what their owner should know."""

from __future__ import annotations

from collections.abc import Iterable

from innkeeper.network import macvtap
from innkeeper.spec.nic import NicSpec


async def check(nics: Iterable[NicSpec]) -> None:
    """Raises `InvalidInput`, `Unsupported`, `ToolMissing` where a card cannot be what it is asked to be."""
    for nic in nics:
        if nic.mode == "macvtap":
            await macvtap.check_parent(str(nic.parent))


async def remarks(nics: Iterable[NicSpec]) -> list[str]:
    """What whoever asked for these cards should know of them, in sentences."""
    said = []
    for nic in nics:
        if nic.mode == "macvtap":
            unless = ", unless the switch there sends frames back" if nic.macvtap_mode == "vepa" else ""
            said.append(
                f"by {nic.parent} the guest reaches all that is outside, but not this host, nor this host the guest"
                f"{unless}; in a bridged network they do: inn network create NAME --mode bridged --parent {nic.parent}"
            )
            said.append(await macvtap.check_parent(str(nic.parent)))
    return [*dict.fromkeys(filter(None, said))]
