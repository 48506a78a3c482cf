"""Cards on interfaces of the host, with no network of ours between: what is refused, what their owner should know."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager

from innkeeper.base.errors import ActionRefused, Unsupported
from innkeeper.network import macvtap, passt, sriov
from innkeeper.operations.world import World
from innkeeper.plan.identity import Identity
from innkeeper.plan.sriov import Wanted
from innkeeper.spec.nic import NicSpec
from innkeeper.spec.vm import VMSpec
from innkeeper.store.contract import Value


async def check(world: World, nics: Iterable[NicSpec]) -> None:
    """Raises `InvalidInput`, `Unsupported`, `ToolMissing` where a card cannot be what it is asked to be."""
    for nic in nics:
        if nic.mode == "macvtap":
            await macvtap.check_parent(str(nic.parent))
        if nic.mode == "sriov":
            sriov.check_parent(str(nic.parent))
        if nic.backend == "passt":
            passt.need_passt()
            if "netdev-stream" not in (await world.host_with_qemu()).qemu.features:  # type: ignore[union-attr]
                raise Unsupported("this QEMU cannot be connected to passt", hint="QEMU 7.2 or later can")


def check_saved(spec: VMSpec | Value, name: str, what: str) -> None:
    """Raises `ActionRefused` where a card has state that only the hardware has."""
    nics = VMSpec.model_validate(spec).nics if isinstance(spec, dict) else spec.nics
    if parent := next((nic.parent for nic in nics if nic.mode == "sriov"), None):
        raise ActionRefused(
            f"{name} has a virtual function of {parent}, whose state cannot be read, so {what}",
            hint=f"inn nic rm {name} CARD takes it away; a VM with a card of another kind can be saved",
        )


def wanted(index: int, nic: NicSpec, identity: Identity) -> Wanted:
    """The function that a card gets."""
    return Wanted(identity.id, index, str(nic.parent), identity.macs[index], nic.vlan, identity.uid)


@asynccontextmanager
async def functions(world: World, vm: Value) -> AsyncIterator[dict[int, str]]:
    """PCI addresses of the functions of a VM that is about to start, by card."""
    spec, identity = VMSpec.model_validate(vm["spec"]), Identity.model_validate(vm["identity"])
    records = world.home.networks
    cards = [wanted(index, nic, identity) for index, nic in enumerate(spec.nics) if nic.mode == "sriov"]
    try:
        yield {card.index: await sriov.take(card, records) for card in cards}
    except BaseException:
        if cards:
            await asyncio.shield(sriov.leave_only(vm["id"], (), records))
        raise


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
        if nic.mode == "sriov":
            kept = "its MAC address and VLAN" if nic.vlan else "its MAC address"
            said.append(f"{nic.parent} itself keeps the guest to {kept}; no firewall of this host sees what it sends")
    return [*dict.fromkeys(filter(None, said))]
