"""Take a snapshot: from one point in time on, all disks are written to new layers, and those before are frozen.

An empty layer reads as what lies below, so putting one on top never changes what a disk holds. What must never be
lost is what QEMU wrote to a new layer after it changed over: such a layer stays, even if the snapshot is undone.
"""

from __future__ import annotations

import asyncio

from innkeeper.base.clock import now
from innkeeper.base.errors import ActionRefused, AgentFailed, AgentUnavailable, Conflict, NameTaken, QmpFailed
from innkeeper.base.ids import new_id
from innkeeper.machine.machine import Machine
from innkeeper.operations.chains import chain
from innkeeper.operations.engine import Action, Context, Step, Verb
from innkeeper.operations.snapshot_memory import capture, check_memory, drop_memory, remarks
from innkeeper.operations.snapshots import (
    add_layers,
    check_new,
    drop_layers,
    drop_nvram,
    free_name,
    hold,
    keep_nvram,
    name_key,
    release,
)
from innkeeper.plan.chain import Layer
from innkeeper.plan.snapshot import snapshot_record
from innkeeper.qemu import blocks
from innkeeper.store.contract import Value, update

FREEZE_ALLOWED = 15.0
"""Seconds that a guest gets to freeze its file systems: everybody in it who writes waits meanwhile."""
THAW_ALLOWED, THAW_ATTEMPTS, THAW_PAUSE = 20.0, 3, 1.0
"""Seconds for one attempt at thawing, how many, and seconds between them."""


async def prepare(ctx: Context) -> None:
    """New layers beside the disks."""
    vm = await _vm(ctx)
    if "layers" not in ctx.data:
        await check_new(ctx.world, vm, ctx.args["name"], memory=ctx.args["memory"])
        if ctx.args["memory"]:
            await check_memory(ctx.world, vm, quiesce=ctx.args["quiesce"])
        ctx.data |= decide(vm)
        await ctx.save()
    await add_layers(ctx, vm, ctx.data["layers"], ctx.data["old"])


def decide(vm: Value) -> Value:
    """For the journal: the ids of all that will be new, and what there was before."""
    return {"snapshot": new_id(), "layers": [new_id() for _ in vm["disks"]], "old": vm["disks"], "at": vm.get("at")}


async def unprepare(ctx: Context) -> None:
    """The layers are gone again, but for those that are in use."""
    await drop_layers(ctx, ctx.target["id"], ctx.data.get("layers", []))


async def freeze(ctx: Context) -> None:
    """With --quiesce: the guest writes out what it holds in memory, and writes nothing until `thaw`."""
    if not ctx.args["quiesce"]:
        return
    machine = ctx.world.machines.get(ctx.target["id"])
    if machine is None or machine.status.state != "running":
        raise ActionRefused(
            f"{ctx.target['name']} does not run, so there is nothing to quiesce", hint="leave --quiesce out"
        )
    async with machine.agent() as agent:
        if await agent.call("guest-fsfreeze-status", timeout=FREEZE_ALLOWED) == "frozen":
            if not ctx.data.get("frozen"):
                raise ActionRefused(f"the file systems of {ctx.target['name']} are frozen by somebody else")
            return
        ctx.data["frozen"] = True  # before it is: whoever comes next thaws
        await ctx.save()
        await agent.call("guest-fsfreeze-freeze", timeout=FREEZE_ALLOWED)


async def thaw(ctx: Context) -> None:
    """The guest writes again, whatever has become of the snapshot. A guest that is gone has nothing frozen."""
    if not ctx.data.get("frozen"):
        return
    attempt = 1
    while (machine := ctx.world.machines.get(ctx.target["id"])) is not None:
        try:
            async with machine.agent() as agent:
                ctx.data["thawed"] = await agent.call("guest-fsfreeze-thaw", timeout=THAW_ALLOWED)
            break
        except (AgentUnavailable, AgentFailed) as error:
            if attempt == THAW_ATTEMPTS:
                text = f"{ctx.target['name']} may be frozen still: {error.detail}"
                await ctx.world.events.append("vm.frozen", text, target=dict(ctx.target), level="error")
                raise
            attempt += 1
            await asyncio.sleep(THAW_PAUSE)
    ctx.data["frozen"] = False
    await ctx.save()


async def switch(ctx: Context) -> None:
    """The point in time: what is written from here on goes to the new layers."""
    await change_over(ctx, _record)
    ctx.result["snapshot"] = (await ctx.world.find("snapshot", ctx.data["snapshot"]))["name"]


async def change_over(ctx: Context, record: Action) -> None:
    """From one moment on the VM writes to the layers of `prepare`; then `record` it. Also where it did so already."""
    vm = await _vm(ctx)
    machine = ctx.world.machines.get(vm["id"])
    if vm["disks"] != ctx.data["layers"] or not vm["disks"]:
        if ctx.args.get("memory"):
            await _with_memory(ctx, vm)
        elif machine is not None:
            await _switch_running(ctx, vm, machine)
        elif "nvram" not in ctx.data:
            ctx.data["nvram"] = keep_nvram(ctx.world, vm, ctx.data["snapshot"])
        await record(ctx)
    await release(ctx)


async def _switch_running(ctx: Context, vm: Value, machine: Machine) -> None:
    if not ctx.data.get("switching"):
        ctx.data["switching"] = True
        await ctx.save()
    if await _switched(ctx, machine):
        return  # a daemon before this one came that far
    if vm["spec"]["firmware"] == "uefi":  # its variables are a file that it writes to whenever it likes
        await hold(ctx, machine)
    pairs = await _pairs(ctx)
    await blocks.open_above(machine.monitor, pairs)
    await _freeze(ctx, vm, machine, pairs)


async def _with_memory(ctx: Context, vm: Value) -> None:
    """The same, and the guest's memory of that point in time."""
    machine = ctx.world.machines.get(vm["id"])
    if machine is None:
        raise ActionRefused(f"{vm['name']} ended before its memory was saved", hint=f"inn start {vm['name']}")

    if "memory" in ctx.data:
        return
    if await _switched(ctx, machine):
        raise QmpFailed("the guest's memory was not saved: the daemon ended in the middle of it")
    pairs = await _pairs(ctx)

    async def ready() -> None:
        await blocks.open_above(machine.monitor, pairs)
        for top, _ in pairs:  # so that little is left to flush while it stands still
            await blocks.flush(machine.monitor, top)

    async def freeze() -> None:
        await _freeze(ctx, vm, machine, pairs)

    await capture(ctx, vm, machine, ready, freeze)


async def _switched(ctx: Context, machine: Machine) -> bool:
    pairs = await _pairs(ctx)
    return bool(pairs) and {overlay.node for _, overlay in pairs} <= await blocks.tops(machine.monitor)


async def _freeze(ctx: Context, vm: Value, machine: Machine, pairs: list[tuple[str, Layer]]) -> None:
    ctx.data["nvram"] = keep_nvram(ctx.world, vm, ctx.data["snapshot"])
    if ctx.data["nvram"]:
        await ctx.save()
    if pairs:
        await blocks.put_on_top(machine.monitor, pairs)


async def _pairs(ctx: Context) -> list[tuple[str, Layer]]:
    """(top node, new layer above it) of each disk."""
    vm_id = ctx.target["id"]
    chains = [await chain(ctx.world, vm_id, layer) for layer in ctx.data["layers"]]
    return [(each[-2].node, each[-1]) for each in chains]


async def _record(ctx: Context) -> None:
    """The snapshot, and the new layers as the VM's, in one transaction."""
    store, args, snapshot_id = ctx.world.store, ctx.args, ctx.data["snapshot"]
    while await store.get(f"snapshot/{snapshot_id}") is None:
        document = await store.get(f"vm/{ctx.target['id']}")
        assert document is not None  # this operation holds it
        vm = document.value
        name = args["name"] or await free_name(ctx.world, vm["id"], "fork" if args["passing"] else "snap")
        snapshot = snapshot_record(
            snapshot_id, vm, name, now(), note=args["note"], expires=args["expires"], quiesced=args["quiesce"],
            nvram=bool(ctx.data.get("nvram")), memory=ctx.data.get("memory"),
            passing=ctx.operation if args["passing"] else "",
        )  # fmt: skip
        key = name_key(vm["id"], name)
        writes: dict[str, Value | None] = {
            document.key: vm | {"disks": ctx.data["layers"], "at": vm["at"] if args["passing"] else snapshot_id},
            f"snapshot/{snapshot_id}": snapshot,
            key: {"id": snapshot_id},
        }
        try:
            await store.transact(writes, {document.key: document.revision, key: 0})
        except Conflict as conflict:
            if conflict.facts["key"] == key and args["name"]:
                raise NameTaken(f"{vm['name']} has a snapshot named {name!r} already", name=name) from None


async def unswitch(ctx: Context) -> None:
    """No snapshot. The new layers stay the VM's if they may have been written to."""
    if ctx.args.get("memory"):
        drop_memory(ctx.world, ctx.target["id"], ctx.data["snapshot"])
    store, machine = ctx.world.store, ctx.world.machines.get(ctx.target["id"])
    switched = bool(ctx.data.get("switching"))
    if machine is not None and switched:
        switched = await _switched(ctx, machine)
    disks = ctx.data["layers"] if switched else ctx.data["old"]
    while True:
        document = await store.get(f"vm/{ctx.target['id']}")
        assert document is not None
        writes: dict[str, Value | None] = {document.key: document.value | {"disks": disks, "at": ctx.data["at"]}}
        if (snapshot := await store.get(f"snapshot/{ctx.data['snapshot']}")) is not None:
            writes |= {snapshot.key: None, name_key(ctx.target["id"], snapshot.value["name"]): None}
        try:
            await store.transact(writes, {document.key: document.revision})
            break
        except Conflict:
            continue
    drop_nvram(ctx.world, ctx.target["id"], ctx.data["snapshot"])
    await release(ctx)


async def tell(ctx: Context) -> None:
    """What came of it."""
    name, target = ctx.result["snapshot"], dict(ctx.target)
    warnings = []
    if ctx.args["quiesce"] and not ctx.data.get("thawed"):
        warnings.append("the guest had no file system frozen: what it had not written out yet is not in the snapshot")
        await update(ctx.world.store, f"snapshot/{ctx.data['snapshot']}", lambda s: s | {"quiesced": False})
    if found := ctx.data.get("memory"):
        warnings += remarks(target["name"], found)
        ctx.result["memory"] = found
    if ctx.args["expires"] is None:
        warnings.append(f"{name} never expires: its layer grows for as long as nobody removes it")
    ctx.result["warnings"] = warnings
    if not ctx.data.get("told") and not ctx.args["passing"]:
        ctx.data["told"] = True
        await ctx.world.events.append(
            "snapshot.created", f"snapshot {name} of {target['name']} was taken", target=target
        )


async def _vm(ctx: Context) -> Value:
    return await ctx.world.find("vm", ctx.target["id"])


STEPS = (
    Step("prepare", prepare, unprepare),
    Step("freeze", freeze, thaw),
    Step("switch", switch, unswitch),
    Step("thaw", thaw),
    Step("tell", tell, keep=True),
)
VERB = Verb("snapshot-create", STEPS)


def arguments(
    *, name: str | None = None, note: str = "", expires: str | None, quiesce: bool = False, memory: bool = False,
    passing: bool = False,
) -> Value:  # fmt: skip
    """What the journal keeps of a request."""
    return {
        "name": name, "note": note, "expires": expires, "quiesce": quiesce, "memory": memory, "passing": passing,
    }  # fmt: skip
