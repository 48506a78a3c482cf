"""Change a VM's NICs or the ports that lead to them, while it runs or not.

The documents are written first, with what they claim; then the running QEMU and the host are brought to what they say.
Undoing is the same with the old documents.
"""

from __future__ import annotations

import asyncio
import os
from contextlib import suppress
from typing import Any

from pydantic import TypeAdapter

from innkeeper.base.errors import ActionRefused, AgentFailed, AgentUnavailable, QemuGone, UnplugRefused
from innkeeper.machine.machine import Machine
from innkeeper.machine.states import LIVE
from innkeeper.network import macvtap, sriov
from innkeeper.operations import host_cards
from innkeeper.operations.engine import Context, Step, Verb
from innkeeper.operations.networks import confine, follow, open_taps
from innkeeper.operations.vm_update import rewrite, unwrite
from innkeeper.operations.world import World
from innkeeper.plan.devices import card, lockable, of_qemu, taps, user_forwards, user_netdev
from innkeeper.plan.identity import Identity
from innkeeper.plan.rebirth import ASK_AGAIN
from innkeeper.plan.wiring import changed, check_live, replugged
from innkeeper.qemu import cards
from innkeeper.qemu.agent_exec import capture
from innkeeper.qemu.process import let_lock
from innkeeper.spec.vm import VMSpec
from innkeeper.spec.wiring import AddNic, Change, RemoveNic, SetNic
from innkeeper.store.contract import Value, update

CHANGE: TypeAdapter[Change] = TypeAdapter(Change)
ASKS = 10.0
"""Seconds that a guest gets to ask DHCP again."""
LET_GO, LET_GO_AGAIN = 30.0, 2.0
"""Seconds that the guest has to let go of a card; where adding it is undone."""
UNPLUGGED = 1.0
"""Seconds for which a guest sees the cable out of a card that comes into another network: it takes no notice of what
is over before it has looked."""


def _check_passt(vm: Value, spec: VMSpec) -> None:
    """passt takes its ports when it starts. Raises `ActionRefused`."""
    before = VMSpec.model_validate(vm["spec"]).nics
    for old, new in zip(before, spec.nics, strict=False):
        if vm["state"] in LIVE and new.backend == old.backend == "passt" and old.publish != new.publish:
            raise ActionRefused(
                f"the card of {vm['name']} has passt, which takes its ports when the VM starts",
                hint=f"inn stop {vm['name']}, then try again; QEMU's own NAT (--nic user) changes them at any time",
            )


def check(vm: Value, change: Change) -> None:
    """What can be known to be wrong. Raises what `plan.wiring.changed` does, and `ActionRefused`."""
    if vm["state"] in LIVE and vm["pending"]:
        raise ActionRefused(
            f"{vm['name']} runs with other settings than it has", hint=f"inn restart {vm['name']}, then try again"
        )
    if vm["state"] == "paused" and isinstance(change, RemoveNic):
        raise ActionRefused(f"{vm['name']} is paused, so its guest lets go of nothing", hint=f"inn resume {vm['name']}")
    spec, identity = VMSpec.model_validate(vm["spec"]), Identity.model_validate(vm["identity"])
    new, _ = changed(spec, identity, change)
    _check_passt(vm, new)
    if vm["state"] in LIVE and isinstance(change, SetNic):
        check_live(spec, identity, change)


async def write(ctx: Context) -> None:
    """The documents, with what they claim."""
    vm = await ctx.world.find("vm", ctx.target["id"])
    old, change = ctx.data.get("old", vm), CHANGE.validate_python(ctx.args["change"])
    if "old" not in ctx.data:
        check(vm, change)  # it may have been started meanwhile
    spec, identity = changed(VMSpec.model_validate(old["spec"]), Identity.model_validate(old["identity"]), change)
    await rewrite(ctx, spec, {"cards": identity.cards}, pending=old["pending"])
    if isinstance(change, AddNic) and (said := await host_cards.remarks([change.nic])):
        ctx.result["warnings"] = said


async def bring(ctx: Context) -> None:
    """The host and the running QEMU have what the documents say."""
    await _bring(ctx, LET_GO)


async def take_back(ctx: Context) -> None:
    """Undo of `write`, and so of `bring`. What a guest does not let go of then, it keeps until its next start."""
    await unwrite(ctx)
    try:
        with suppress(QemuGone):
            await _bring(ctx, LET_GO_AGAIN)
    except UnplugRefused:
        await update(ctx.world.store, f"vm/{ctx.target['id']}", lambda vm: vm | {"pending": True})


async def _bring(ctx: Context, seconds: float) -> None:
    world, vm_id = ctx.world, ctx.target["id"]
    vm = await world.find("vm", vm_id)
    machine = world.machines.get(vm_id)
    if machine is None or vm["state"] not in ("running", "paused"):
        await follow(world, vm_id)
        return
    spec, identity = VMSpec.model_validate(vm["spec"]), Identity.model_validate(vm["identity"])
    wanted = {index for index, nic in enumerate(spec.nics) if nic.mode != "absent"}
    there = await cards.present(machine.monitor)
    again = await _replugged(ctx)
    if vm["forked"] and vm["state"] == "running" and (again or there != wanted):
        await _have_it_ask(machine)
    for index in sorted(there - wanted):
        await cards.unplug(machine.monitor, index, seconds)
    kept = [tap.name for tap in taps(spec, identity) if tap.index in there]
    await macvtap.leave_only(vm_id, kept, world.home.networks)
    await sriov.leave_only(vm_id, there & wanted, world.home.networks)
    if again:
        for index in again:
            await cards.set_link(machine.monitor, index, up=False)
        await asyncio.sleep(UNPLUGGED)
    await follow(world, vm_id)  # its rules are in force before its first packet
    for index in sorted(wanted - there):
        await _plug(world, machine, spec, identity, index)
    for index, nic in enumerate(spec.nics):
        if of_qemu(nic):
            await cards.forward(machine.monitor, f"net{index}", user_forwards(index, nic, identity))
        if nic.mode in ("user", "network", "macvtap"):
            await cards.set_link(machine.monitor, index, up=nic.link == "up")


async def _have_it_ask(machine: Machine) -> None:
    """A fork's guest may know its place without DHCP, which is wrong where a card leads elsewhere now."""
    with suppress(AgentUnavailable, AgentFailed):
        async with machine.agent() as agent:
            await capture(agent, ["/bin/sh", "-s"], stdin=ASK_AGAIN.encode(), timeout=ASKS)


async def _replugged(ctx: Context) -> list[int]:
    """Cards for which what the VM has been told before is different, whichever way it is brought."""
    if "old" not in ctx.data:
        return []
    change = CHANGE.validate_python(ctx.args["change"])
    old = VMSpec.model_validate(ctx.data["old"]["spec"])
    new, _ = changed(old, Identity.model_validate(ctx.data["old"]["identity"]), change)
    return replugged(old, new)


async def _plug(world: World, machine: Machine, spec: VMSpec, identity: Identity, index: int) -> None:
    nic = spec.nics[index]
    if nic.mode == "sriov":
        let_lock(machine.process.pid.number, lockable(spec))
        function = await sriov.take(host_cards.wanted(index, nic, identity), world.home.networks)
        await cards.plug(machine.monitor, card(index, nic, identity, function), None)
        return
    device, netdev = card(index, nic, identity), None
    if of_qemu(nic):
        netdev = user_netdev(index, nic, identity)
    tap = next((tap for tap in taps(spec, identity) if tap.index == index), None)
    if tap is None:
        await cards.plug(machine.monitor, device, netdev)
        return
    (fd,) = await open_taps(world, identity.id, [tap])
    try:
        await machine.monitor.give(tap.name, fd)
    finally:
        os.close(fd)
    await cards.plug(machine.monitor, device, tap.given(tap.name))
    await confine(world, identity.id, [tap])


STEPS = (Step("write", write, take_back), Step("bring", bring))
VERB = Verb("vm-nics", STEPS)


def arguments(change: Change, by: str) -> dict[str, Any]:
    """What the journal keeps of a request."""
    return {"change": change.model_dump(mode="json"), "by": by}
