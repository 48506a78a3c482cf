"""The part of a snapshot that is a running guest's memory: saved while it runs, of the moment at which its disks are
frozen, and gone on from by a restore.

QEMU writes it to a staged file; that gets its name once all of it is on the host's disk, and is in the store after.
"""

from __future__ import annotations

import asyncio
import os
import time
import uuid
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from innkeeper.base.errors import ActionRefused, AgentFailed, AgentUnavailable, InvalidInput, QmpFailed, Unsupported
from innkeeper.machine.machine import Machine
from innkeeper.operations.engine import Context
from innkeeper.operations.snapshots import hold, release
from innkeeper.operations.vm_create import check_room, claim_ports
from innkeeper.operations.vm_start import resident
from innkeeper.operations.world import World
from innkeeper.plan.identity import misfit
from innkeeper.plan.snapshot import machine_then, memory_name
from innkeeper.qemu import memory
from innkeeper.spec.vm import VMSpec
from innkeeper.store.contract import Value

WRITE_OUT = 0.1
"""Seconds between two times at which what was saved is written out."""
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


async def capture(
    ctx: Context, vm: Value, machine: Machine, switched: Callable[[], Awaitable[bool]], freeze: Deed
) -> None:
    """Save the guest, with `freeze` done at that very moment; it runs on then. `switched` tells whether `freeze` came
    to pass, in this daemon or in one before it."""
    path = memory_path(ctx.world, vm["id"], ctx.data["snapshot"])
    if "memory" in ctx.data:
        return
    staged = path.with_name(f"{path.name}.new")
    if not path.exists():
        if await switched():
            await _finish(machine, staged)
        else:
            await memory.abandon(machine.monitor)
            await release(ctx)
            check_room(ctx, resident(ctx, vm["id"]))
            await _save(ctx, vm, machine, staged, freeze)
        await release(ctx)
        await asyncio.to_thread(_publish, staged, path)
    live = await ctx.world.store.get(f"live/{vm['id']}")
    argv = live.value["argv"] if live else []
    ctx.data["memory"] = {
        "size": path.stat().st_blocks * 512,
        "how": ctx.data["how"],
        "pause": round(machine.stood_still, 4),
        "agent": machine.status.agent,
        "as_fork": any('"free-page-reporting":false' in word for word in argv),
    }
    await ctx.save()


async def _save(ctx: Context, vm: Value, machine: Machine, staged: Path, freeze: Deed) -> None:
    def report(fraction: float | None) -> None:
        ctx.report(fraction, "saving memory")

    staged.unlink(missing_ok=True)
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    fd = os.open(staged, flags, 0o600)  # QEMU gets it from us: its user could not open it
    try:
        ctx.data |= {"how": await _way(vm, machine), "switching": True, "held": True}
        await ctx.save()
        if ctx.data["how"] != "rounds":
            if resident(ctx, machine.id) < vm["spec"]["memory"]:
                machine.hold_when_stopped()
                await memory.touch(machine.monitor)
                await machine.goes_on()
            await hold(ctx, machine)
            await freeze()
        if ctx.data["how"] == "stopped":
            await memory.save_stopped(machine.monitor, fd, report)
            return
        if ctx.data["how"] == "background":
            await memory.behind_its_back(machine.monitor)
            await memory.save_behind(machine.monitor, fd, report)
            await machine.goes_on()
            ctx.data["held"] = False
            return

        async def at_rest() -> None:
            await machine.held_still()
            await freeze()

        machine.hold_when_stopped()
        writing = asyncio.create_task(_write_out(fd))
        try:
            await memory.save_rounds(machine.monitor, fd, at_rest, report)
        finally:
            writing.cancel()
            await asyncio.wait({writing})
    finally:
        os.close(fd)


async def _way(vm: Value, machine: Machine) -> str:
    """`background`, `rounds` or `stopped` (qemu/memory.py)."""
    if await memory.behind_its_back(machine.monitor) is None:
        return "background"
    return memory.otherwise(vm["identity"]["accelerator"])


async def _write_out(fd: int) -> None:
    """Have the file on the host's disk as it grows: what QEMU flushes when the guest stops would wait for all of it."""
    while True:
        await asyncio.to_thread(os.fdatasync, fd)
        await asyncio.sleep(WRITE_OUT)


async def _finish(machine: Machine, staged: Path) -> None:
    """The disks were frozen by a daemon that died then. QEMU has been given the file, or never will be."""
    if not staged.exists() or staged.stat().st_size == 0:
        raise QmpFailed("the guest's memory was not saved: the daemon ended in the middle of it")
    await memory.finish(machine.monitor)


def _publish(staged: Path, path: Path) -> None:
    fd = os.open(staged, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
    staged.rename(path)


async def abandon(ctx: Context) -> None:
    """Undo of `capture`: nobody saves any more, and there is no file."""
    machine = ctx.world.machines.get(ctx.target["id"])
    if machine is not None and ctx.data.get("how"):
        await memory.abandon(machine.monitor)
    drop_memory(ctx.world, ctx.target["id"], ctx.data["snapshot"])


def memory_path(world: World, vm_id: str, snapshot_id: str) -> Path:
    """The file of a snapshot's memory."""
    return world.home.vm(vm_id) / memory_name(snapshot_id)


def drop_memory(world: World, vm_id: str, snapshot_id: str) -> None:
    """Remove what a snapshot has of memory, whole or half-made."""
    path = memory_path(world, vm_id, snapshot_id)
    for each in (path, path.with_name(f"{path.name}.new")):
        each.unlink(missing_ok=True)


def remarks(name: str, found: Value) -> list[str]:
    """What is worth saying of a saved memory."""
    if found["pause"] > LONG:
        why = "" if found["how"] == "stopped" else ", since it changed its memory faster than it could be saved"
        return [f"{name} stood still for {found['pause']:.1f} s{why}; inn host tells how memory is saved here, and why"]
    return []


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
    path = memory_path(world, snapshot["vm"], snapshot["id"])
    if not path.is_file() or path.is_symlink():
        raise ActionRefused(f"the memory of snapshot {snapshot['name']} is gone: {path.name}", hint=hint)


async def set_back(ctx: Context, vm: Value, snapshot: Value) -> tuple[Value, dict[str, Value | None]]:
    """(fields of the VM's document, ports that it has to claim): the machine that the memory fits, reborn, so that the
    guest's kernel knows to reseed. What the VM has claimed and does not need any more, `give_back` gives back."""
    fields, changed = machine_then(vm, snapshot)
    fields["identity"]["vmgenid"] = str(uuid.uuid4())
    spec, owner = VMSpec.model_validate(fields["spec"]), {"id": vm["id"], "name": vm["name"]}
    claims, ssh_port = await claim_ports(ctx, spec, owner, vm["identity"]["slot"], vm["identity"]["ssh_port"])
    fields["identity"]["ssh_port"] = ssh_port
    had = {d.key for d in await ctx.world.store.list("port/") if d.value["id"] == vm["id"]}
    ctx.data |= {"ports": sorted(claims), "new_ports": sorted(claims.keys() - had)}
    if changed:
        text = f"the machine is again as it was when its memory was saved: {', '.join(changed)}"
        ctx.result["warnings"] = [text]
    return fields, {key: owner for key in claims.keys() - had}


async def give_back(ctx: Context) -> None:
    """Host ports of NICs that the VM had and has no more."""
    store, wanted = ctx.world.store, ctx.data.get("ports")
    if wanted is not None:
        mine = [d.key for d in await store.list("port/") if d.value["id"] == ctx.target["id"]]
        await store.transact({key: None for key in mine if key not in wanted})


async def set_clock(ctx: Context) -> None:
    """The guest's clock stands at the moment of the snapshot; its agent sets it, where it has one."""
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
            return
        except (AgentUnavailable, AgentFailed) as error:
            why = error.detail
    text = f"the guest's clock is that of the snapshot until the guest sets it: {why}"
    if text not in (warnings := ctx.result.setdefault("warnings", [])):
        warnings.append(text)
