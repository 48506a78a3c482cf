"""The part of a snapshot that is a running guest's memory: of the moment at which its disks are frozen; a restore and
forks go on from it.

It is copied into the daemon's memory (qemu/guest_memory.py), after that moment where that can be done; from there into
a file, which gets its name once all of it is on the host's disk. A passing snapshot, for forks that are being made, has
no file. What one daemon copied is lost to the next: then there is no snapshot.
"""

from __future__ import annotations

import asyncio
import os
import secrets
import time
import uuid
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from innkeeper.base.errors import ActionRefused, AgentFailed, AgentUnavailable, InvalidInput, Unsupported
from innkeeper.host.memory import check_memory as check_host_memory
from innkeeper.machine.machine import Machine
from innkeeper.operations.captured import memory_path, seed_of
from innkeeper.operations.engine import Context
from innkeeper.operations.host_cards import check_saved
from innkeeper.operations.networks import claim_addresses
from innkeeper.operations.snapshots import hold, release
from innkeeper.operations.vm_create import check_room, claim_ports
from innkeeper.operations.vm_start import resident
from innkeeper.operations.world import World
from innkeeper.plan.devices import with_nat
from innkeeper.plan.identity import misfit
from innkeeper.plan.rebirth import forms, reseed, understood
from innkeeper.plan.snapshot import machine_then
from innkeeper.qemu.agent_exec import capture as run_in_guest
from innkeeper.qemu.guest_memory import Copy
from innkeeper.qemu.migration import room_for_devices
from innkeeper.spec.vm import VMSpec
from innkeeper.store.contract import Value

LONG = 1.0
"""Seconds of standing still that are remarked upon."""
AGENT_BACK = 10.0
"""Seconds in which a guest's agent opens its port again after a restore."""

Deed = Callable[[], Awaitable[None]]


# --- taking it ---


async def check_memory(world: World, vm: Value, *, quiesce: bool) -> None:
    """Raises `ActionRefused`, `InvalidInput` where a snapshot with memory makes no sense now."""
    machine = world.machines.get(vm["id"])
    if machine is None or vm["state"] != "running":
        hint = "inn resume lets it go on" if vm["state"] == "paused" else "leave --memory out"
        raise ActionRefused(
            f"{vm['name']} is {vm['state']}, and only a guest that runs has its memory saved", hint=hint
        )
    check_saved(vm["spec"], vm["name"], "it cannot be saved with its memory")
    if quiesce:
        raise InvalidInput(
            "memory has what the guest has not written out yet, and would be restored frozen",
            hint="leave --quiesce or --memory out", field="quiesce",
        )  # fmt: skip
    if vm["pending"]:
        raise ActionRefused(
            f"{vm['name']} has been changed since it started, and its memory fits the machine that it started as",
            hint=f"inn restart {vm['name']}, or leave --memory out",
        )
    drives = await machine.monitor.execute("query-block")
    if not vm["disc"] and any(drive.get("qdev") == "cd0" for drive in drives):
        raise ActionRefused(
            f"{vm['name']} still has the drive of the disc that it was installed from",
            hint=f"inn stop {vm['name']} and start it once, or leave --memory out",
        )


async def capture(ctx: Context, vm: Value, machine: Machine, ready: Deed, freeze: Deed) -> None:
    """Save the guest, with `freeze` done at that very moment, and `ready` shortly before; it runs on then."""
    world, snapshot = ctx.world, ctx.data["snapshot"]
    await release(ctx)
    size = vm["spec"]["memory"]
    host = await world.host_with_qemu()
    check_host_memory(size, host.memory, 0)
    if not ctx.args["passing"]:
        check_room(ctx, resident(ctx, vm["id"]))

    def progress(fraction: float | None) -> None:
        ctx.report(fraction, "copying memory")

    copy = await machine.copy_memory(size, progress)
    try:
        async with room_for_devices(machine.monitor) as devices:
            await ready()
            ctx.data["switching"] = True
            await hold(ctx, machine)
            freezing = asyncio.ensure_future(freeze())  # at the same time: the guest waits
            try:
                await machine.save_state(copy, devices)
            finally:
                await freezing
            await release(ctx)
            saved = devices.state(vm["identity"]["machine_type"])
        await copy.finish(progress)
        parts = [size, copy.size - size, len(saved)]
        copy.append(saved)
        ctx.report(None, "looking through its memory")
        uuid_at = await copy.find(forms(vm["identity"]["uuid"]))
        if ctx.args["passing"]:
            world.ram.put(snapshot, copy.seal())
        else:
            ctx.report(None, "writing memory")
            await _write(copy, memory_path(world, vm["id"], snapshot))
        stored = os.fstat(copy.fd).st_blocks * 512
    finally:
        await copy.close()
    live = await world.store.get(f"live/{vm['id']}")
    argv = live.value["argv"] if live else []
    ctx.data["memory"] = {
        "size": stored, "parts": parts, "at": machine.stopped_at, "pause": round(machine.stood_still, 4),
        "agent": machine.status.agent, "uuid_at": uuid_at, "seed": await seed_of(world, vm),
        "as_fork": any('"free-page-reporting":false' in each for each in argv),
        "nat": with_nat(argv),
    }  # fmt: skip
    await ctx.save()


async def _write(copy: Copy, path: Path) -> None:
    staged = path.with_name(f"{path.name}.new")
    staged.unlink(missing_ok=True)
    fd = os.open(staged, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    try:
        await copy.write(fd)
    finally:
        os.close(fd)
    staged.rename(path)


def drop_memory(world: World, vm_id: str, snapshot_id: str) -> None:
    """Remove what a snapshot has of memory, whole or half-made."""
    world.ram.drop(snapshot_id)
    path = memory_path(world, vm_id, snapshot_id)
    for each in (path, path.with_name(f"{path.name}.new")):
        each.unlink(missing_ok=True)


def remarks(name: str, found: Value) -> list[str]:
    """What is worth saying of a saved memory."""
    return [f"{name} stood still for {found['pause']:.1f} s"] if found["pause"] > LONG else []


# --- going on from it ---


async def check_fits(world: World, snapshot: Value) -> None:
    """Raises `Unsupported` where this host cannot go on from a saved memory, `ActionRefused` where it is gone."""
    hint = "--disks-only boots from its disks"
    if found := misfit(snapshot["identity"], await world.host_with_qemu()):
        what, its, ours = found
        raise Unsupported(
            f"the memory in snapshot {snapshot['name']} was saved with {what} {its}, and this host has {ours}",
            hint=hint,
        )
    path, size = memory_path(world, snapshot["vm"], snapshot["id"]), sum(snapshot["memory"]["parts"])
    if not path.is_file() or path.is_symlink() or path.stat().st_size != size:
        raise ActionRefused(f"the memory of snapshot {snapshot['name']} is gone, or not whole: {path.name}", hint=hint)


async def set_back(ctx: Context, vm: Value, snapshot: Value) -> tuple[Value, dict[str, Value | None]]:
    """(fields of the VM's document, ports and addresses that it has to claim): the machine that the memory fits,
    reborn, so that the guest's kernel knows to reseed. What the VM has claimed and does not need any more, `give_back`
    gives back."""
    fields, changed = machine_then(vm, snapshot)
    fields["identity"]["vmgenid"] = str(uuid.uuid4())
    spec, owner = VMSpec.model_validate(fields["spec"]), {"id": vm["id"], "name": vm["name"]}
    claims, ssh_port = await claim_ports(ctx, spec, owner, vm["identity"]["slot"], vm["identity"]["ssh_port"])
    fields["identity"]["ssh_port"] = ssh_port
    claims |= await claim_addresses(ctx.world, spec, owner)
    had = await _claimed(ctx.world, vm["id"])
    ctx.data |= {"claims": sorted(claims), "new_claims": sorted(claims.keys() - had)}
    if changed:
        text = f"the machine is again as it was when its memory was saved: {', '.join(changed)}"
        ctx.result["warnings"] = [text]
    return fields, {key: claims[key] for key in claims.keys() - had}


async def give_back(ctx: Context) -> None:
    """Host ports and addresses of NICs that the VM had and has no more."""
    if (wanted := ctx.data.get("claims")) is not None:
        mine = await _claimed(ctx.world, ctx.target["id"])
        await ctx.world.store.transact(dict.fromkeys(mine.difference(wanted)))


async def _claimed(world: World, vm_id: str) -> set[str]:
    documents = [document for prefix in ("port/", "address/") for document in await world.store.list(prefix)]
    return {document.key for document in documents if document.value["id"] == vm_id}


async def catch_up(ctx: Context) -> None:
    """The guest's clock stands at the moment of the snapshot, and its random numbers come as they did then; its agent
    mends that, where it has one."""
    saved: dict[str, Any] | None = ctx.data.get("memory")
    machine = ctx.world.machines.get(ctx.target["id"])
    if not saved or machine is None or ctx.args.get("paused"):
        return
    why = "it has no agent"
    if saved["agent"]:
        await machine.agent_back(AGENT_BACK)
        try:
            async with machine.agent() as agent:
                await agent.set_time(time.time_ns())
                script = reseed(secrets.token_bytes(64)).encode()
                _, said, _ = await run_in_guest(agent, ["/bin/sh", "-s"], stdin=script, timeout=AGENT_BACK)
            notes, _ = understood(said.decode(errors="replace"))
            ctx.result["warnings"] = [*ctx.result.get("warnings", []), *notes]
            return
        except (AgentUnavailable, AgentFailed) as error:
            why = error.detail
    text = f"the guest's clock is that of the snapshot until the guest sets it, and so may be its random numbers: {why}"
    if text not in (warnings := ctx.result.setdefault("warnings", [])):
        warnings.append(text)
