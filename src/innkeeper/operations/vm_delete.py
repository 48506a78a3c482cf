"""Delete a VM: from every state, and to the end also after a crash. Of VMs that it shared disks with, as a linked clone
does, the layers are merged that were there for its sake."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from time import monotonic

import structlog

from innkeeper.base.clock import now
from innkeeper.base.errors import InnkeeperError, InUse, NotFound
from innkeeper.operations.chains import clones_of, linked_to
from innkeeper.operations.consolidate import abandon, consolidate
from innkeeper.operations.engine import Context, Step, Verb, busy
from innkeeper.operations.vm_create import discard_folder, forget
from innkeeper.operations.world import World
from innkeeper.store.contract import Value, update

log = structlog.get_logger()

PATIENCE = 60.0
"""Seconds that a VM whose layers are to be merged may be busy with something else."""
LOOK_EVERY = 0.1
MERGES = "snapshot-delete"
"""What this is to a VM whose layers are merged: it is not the one that is deleted."""


async def check_alone(world: World, vm: Value) -> None:
    """Linked clones may stand on its disks: then it stays (DESIGN.md 5.11). Raises `InUse`."""
    if clones := await clones_of(world, vm["id"]):
        raise InUse(
            f"the disks of {vm['name']} are those that {', '.join(clones)} stand on",
            hint=f"delete those linked clones first; inn clone {clones[0]} NEW makes one that stands on its own",
            users=clones,
        )


async def mark(ctx: Context) -> None:
    """From here there is no way back."""
    stamp = now()
    vm = await ctx.world.store.get(f"vm/{ctx.target['id']}")
    if vm is not None and vm.value["state"] != "deleting":
        await check_alone(ctx.world, vm.value)
    try:
        await update(
            ctx.world.store,
            f"vm/{ctx.target['id']}",
            lambda vm: None if vm["state"] == "deleting" else vm | {"state": "deleting", "reason": "", "since": stamp},
        )
    except NotFound:
        return  # the daemon died after it was forgotten


async def kill(ctx: Context) -> None:
    """End its QEMU. Whoever asked has passed admission: it was stopped, or --force was given."""
    await ctx.world.machines.discard(ctx.target["id"])


async def delete_files(ctx: Context) -> None:
    """Its disks are gone after this."""
    discard_folder(ctx, ctx.target["id"])


async def merge(ctx: Context) -> None:
    """In each VM that it stood on. Where that is in vain, it is said, and the VM is deleted all the same."""
    store = ctx.world.store
    if "others" not in ctx.data:
        vm = await store.get(f"vm/{ctx.target['id']}")
        ctx.data["others"] = await linked_to(ctx.world, vm.value) if vm else []
    while others := ctx.data["others"]:
        try:
            await _merge_in(ctx, await ctx.world.find("vm", others[0]))
        except InnkeeperError as error:
            text = f"{others[0]} keeps a layer that nobody needs: {error.detail}"
            ctx.result.setdefault("warnings", []).append(f"{text} (inn snapshot prune {others[0]} merges it)")
            log.warning("layers were not merged", vm=others[0], error=str(error))
        others.pop(0)


async def _merge_in(ctx: Context, other: Value) -> None:
    """Hold it, merge, let it go again. Raises `MachineBusy`, `QmpFailed`, `QemuFailed`."""
    key, gone = f"vm/{other['id']}", ctx.target["id"]
    ctx.data["hold"] = [f"vm/{gone}", key]  # of which the end of this operation lets go
    await ctx.save()
    await _hold(ctx, key)
    there = replace(ctx, target={"kind": "vm", "id": other["id"], "name": other["name"]})
    try:
        await consolidate(there, without=gone)
    except InnkeeperError:
        await abandon(there)
        raise
    await update(ctx.world.store, key, lambda vm: vm | {"operation": None} if _ours(ctx, vm) else None)


async def _hold(ctx: Context, key: str) -> None:
    """Wait until nobody else holds the VM. Raises `MachineBusy`."""
    store, holder = ctx.world.store, {"id": ctx.operation, "kind": MERGES}

    def take(vm: Value) -> Value | None:
        return None if vm["operation"] else vm | {"operation": holder}

    deadline = monotonic() + PATIENCE
    while not _ours(ctx, vm := await update(store, key, take)):
        if monotonic() > deadline:
            raise busy(vm["name"], vm["operation"])
        await asyncio.sleep(LOOK_EVERY)


def _ours(ctx: Context, vm: Value) -> bool:
    return bool((vm["operation"] or {}).get("id") == ctx.operation)


async def forget_it(ctx: Context) -> None:
    """Give back its name, number and ports."""
    if await ctx.world.store.get(f"vm/{ctx.target['id']}"):
        await forget(ctx, ctx.target["id"])
        await ctx.world.events.append("vm.deleted", f"{ctx.target['name']} was deleted", target=dict(ctx.target))


STEPS = (
    Step("mark", mark, keep=True),
    Step("kill", kill, keep=True),
    Step("delete-files", delete_files, keep=True),
    Step("merge", merge, keep=True),
    Step("forget", forget_it, keep=True),
)
VERB = Verb("vm-delete", STEPS, cancellable=False)
