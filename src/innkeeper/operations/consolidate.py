"""Layers that nobody needs any more are merged or dropped, on a VM that runs as well as on one that does not.

A merge copies in whichever direction is less. What it begins is in the journal (`ctx.data["merge"]`), and the store
changes only after all data is where it belongs; until then the chain as the store has it reads right, whoever dies.
The QEMU of a VM that runs works on the layers that it has open; all others are opened by one without a machine.
"""

from __future__ import annotations

import asyncio
from contextlib import suppress
from pathlib import Path
from typing import Any

from innkeeper.base.errors import Conflict, InnkeeperError, QmpFailed
from innkeeper.machine.machine import Machine
from innkeeper.operations.chains import chain, layer_path
from innkeeper.operations.engine import Context
from innkeeper.operations.snapshots import all_layers, hold, release
from innkeeper.plan.chain import Chain, node_name
from innkeeper.plan.snapshot import Drop, Join, lineage, unneeded
from innkeeper.qemu import blocks
from innkeeper.qemu.offline import opened
from innkeeper.storage.formats.qcow2 import CLUSTER
from innkeeper.storage.room import reserve
from innkeeper.store.contract import Value

LAST_WORDS = 3.0
"""Seconds after a failed job in which it shows whether QEMU itself has ended."""


async def consolidate(ctx: Context, without: str | None = None) -> None:
    """Until each layer of the VM is needed, by others than `without`, a VM that is being deleted. Raises `QmpFailed`,
    `QemuFailed`; what was not merged stays and works."""
    await _go_on(ctx)
    while (action := await _next(ctx, without)) is not None:
        if isinstance(action, Drop):
            ctx.data |= {"begun": True, "merge": {"gone": action.layer, "join": None, "live": False}}
            await ctx.save()
            await _settle(ctx, ctx.data["merge"])
            continue
        merge = await _plan(ctx, action)
        ctx.data |= {"begun": True, "merge": merge}
        await ctx.save()
        await _merge(ctx, merge)


async def abandon(ctx: Context) -> None:
    """Undo of `consolidate`: end the merge at hand; both of its layers stay, unless it was quicker."""
    merge = ctx.data.get("merge")
    machine = ctx.world.machines.get(ctx.target["id"])
    if merge and merge["live"] and machine is not None:
        if await blocks.abandon(machine.monitor, _job_id(merge)) == "done":
            await _settle(ctx, merge)
        ctx.data["merge"] = None
        await ctx.save()
    await release(ctx)


async def _next(ctx: Context, without: str | None) -> Drop | Join | None:
    world = ctx.world
    vm = await world.find("vm", ctx.target["id"])
    layers = {key: layer for key, layer in (await all_layers(world)).items() if layer["vm"] != without}
    snapshots = [d.value for d in await world.store.list("snapshot/") if d.value["vm"] != without]
    return unneeded(vm, layers, snapshots)


async def _go_on(ctx: Context) -> None:
    """With the merge that a daemon before this one began in a QEMU that is still there. Any other begins anew."""
    merge = ctx.data.get("merge")
    if merge:
        if await ctx.world.store.get(f"layer/{merge['gone']}") is None:
            await _settle(ctx, merge)
        elif merge["live"] and ctx.world.machines.get(ctx.target["id"]) is not None:
            await _merge(ctx, merge)
        ctx.data["merge"] = None
    await release(ctx)


async def _plan(ctx: Context, join: Join) -> dict[str, Any]:
    """What there is to do, as the journal keeps it."""
    world, layers = ctx.world, await all_layers(ctx.world)
    vm = await world.find("vm", ctx.target["id"])
    upper, lower = layers[join.upper], layers[join.lower]
    down = _stored(ctx, upper) <= _stored(ctx, lower)
    open_now = {layer for top in vm["disks"] for layer in lineage(layers, top)}
    live = world.machines.get(vm["id"]) is not None and join.upper in open_now
    return {
        "join": [join.upper, join.lower], "down": down, "live": live, "gone": join.upper if down else join.lower,
        "top": vm["disks"][upper["disk"]] if live else join.upper,
    }  # fmt: skip


def _stored(ctx: Context, layer: Value) -> int:
    """Bytes that a layer takes on the host's disk."""
    return layer_path(ctx.world, layer).stat().st_blocks * 512


async def _merge(ctx: Context, merge: dict[str, Any]) -> None:
    """The work itself, in whichever QEMU. One that ends in the middle, as guests do, leaves things as they were: the
    next attempt plans anew."""
    machine = ctx.world.machines.get(ctx.target["id"]) if merge["live"] else None
    files = await _absolute(ctx, merge["top"])
    job = _job(merge, files)
    if (named := _told_anew(job, files)) is not None:
        # QEMU 7.2 dies when it cannot write that (block/commit.c, commit_abort), and takes the guest with it.
        reserve(named, CLUSTER)
    if machine is not None:
        try:
            await _run(ctx, job, machine)
        except QmpFailed:
            await asyncio.wait({machine.over}, timeout=LAST_WORDS)
            if ctx.world.machines.get(ctx.target["id"]) is not None:
                with suppress(InnkeeperError):
                    await abandon(ctx)
                raise
            ctx.data["merge"] = None
            await release(ctx)
            return
    else:
        world = ctx.world
        vm, host = await world.find("vm", ctx.target["id"]), await world.host_with_qemu()
        assert host.qemu is not None
        async with opened(host.qemu.path, files, vm["identity"]["uid"]) as monitor:
            await blocks.begin(monitor, job)
            await blocks.conclude(monitor, job, _nobody, _reporter(ctx))
    await _settle(ctx, merge)


async def _run(ctx: Context, job: blocks.Merge, machine: Machine) -> None:
    async def still() -> None:
        await hold(ctx, machine)

    await blocks.begin(machine.monitor, job)
    await blocks.conclude(machine.monitor, job, still, _reporter(ctx))


async def _nobody() -> None:
    """No guest writes to layers that no VM has open."""


def _reporter(ctx: Context) -> blocks.Progress:
    return lambda fraction: ctx.report(fraction, "merging layers")


async def _absolute(ctx: Context, top: str) -> Chain:
    return await chain(ctx.world, ctx.target["id"], top, absolute=True)


def _job_id(merge: dict[str, Any]) -> str:
    return f"merge-{merge['gone']}"


def _job(merge: dict[str, Any], files: Chain) -> blocks.Merge:
    """The merge in terms of nodes. `files` is the whole chain, base first."""
    upper_id, lower_id = merge["join"]
    names = [layer.node for layer in files]
    upper = next(i for i, name in enumerate(names) if name.endswith(f"-{upper_id}"))
    lower = next(i for i, name in enumerate(names) if name.endswith(f"-{lower_id}"))
    below = lower - 1
    backing = files[lower].path if merge["down"] else files[below].path if below >= 0 else ""
    return blocks.Merge(
        job=_job_id(merge),
        top=names[-1],
        upper=names[upper],
        lower=names[lower],
        below=names[below] if below >= 0 else None,
        down=merge["down"],
        backing=backing,
    )


def _told_anew(job: blocks.Merge, files: Chain) -> Path | None:
    """The file in whose head the job writes what it stands on from now on."""
    if job.active or not job.backing:
        return None
    names = [layer.node for layer in files]
    return Path(files[names.index(job.upper) + (1 if job.down else 0)].path)


async def _settle(ctx: Context, merge: dict[str, Any]) -> None:
    """The layer that goes has no document, then no node, then no file; what stood on it stands on the other."""
    world, vm_id = ctx.world, ctx.target["id"]
    layer = await world.store.get(f"layer/{merge['gone']}")
    if layer is not None:
        ctx.data["gone"] = layer.value  # its file is to be removed, should this daemon die now
        await ctx.save()
        while not await _rewrite(ctx, merge):
            continue
    await release(ctx)
    gone = ctx.data["gone"]
    machine = world.machines.get(vm_id)
    if merge["live"] and machine is not None:
        await blocks.dismiss(machine.monitor, _job_id(merge))
        await blocks.let_go(machine.monitor, [node_name(gone)])
    layer_path(world, gone).unlink(missing_ok=True)
    ctx.data["merge"] = None
    await ctx.save()


async def _rewrite(ctx: Context, merge: dict[str, Any]) -> bool:
    """All documents that speak of the layer that goes, in one transaction; False when one was changed meanwhile."""
    store, gone = ctx.world.store, merge["gone"]
    vm = await store.get(f"vm/{ctx.target['id']}")
    assert vm is not None  # this operation holds it
    writes: dict[str, Value | None] = {f"layer/{gone}": None}
    checks = {vm.key: vm.revision}
    layers = {layer.value["id"]: layer for layer in await store.list("layer/")}
    upper, lower = merge["join"] or (None, None)
    below = {field: layers[gone].value[field] for field in ("parent", "image")}
    onto = {"parent": lower} if gone == upper else below
    writes |= {layer.key: layer.value | onto for layer in layers.values() if layer.value["parent"] == gone}
    for document in (vm, *await store.list("snapshot/")):
        if gone == upper and gone in document.value["disks"]:
            disks = [lower if each == gone else each for each in document.value["disks"]]
            writes[document.key] = document.value | {"disks": disks}
            checks[document.key] = document.revision
    try:
        await store.transact(writes, checks)
    except Conflict:
        return False
    return True
