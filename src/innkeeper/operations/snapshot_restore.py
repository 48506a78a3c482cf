"""Go back to a snapshot: new, empty layers on its own become the disks; what was there becomes a snapshot by itself.

So nothing is lost by going back to the wrong one. With --no-keep the present is removed, at the very end. Where memory
is part of the snapshot, `vm-start` goes on from that instead of booting.
"""

from __future__ import annotations

from innkeeper.base.clock import now
from innkeeper.base.errors import ActionRefused, Conflict
from innkeeper.base.ids import new_id
from innkeeper.operations import snapshot_delete, vm_start
from innkeeper.operations.consolidate import abandon, consolidate
from innkeeper.operations.engine import Context, Step, Verb
from innkeeper.operations.networks import claim_checks
from innkeeper.operations.rebirth import at_first_start
from innkeeper.operations.snapshot_memory import catch_up, check_fits, give_back, set_back
from innkeeper.operations.snapshots import (
    add_layers,
    drop_layers,
    drop_nvram,
    free_name,
    keep_nvram,
    name_key,
    put_nvram,
)
from innkeeper.plan.snapshot import snapshot_record
from innkeeper.store.contract import Value

AUTOMATIC = "auto"
"""Names of the snapshots that keep a present begin so."""
OF_THE_DISKS = ("disc", "identity_due")
"""Fields of the VM's document that say how far the guest on its disks has come: they go back with the disks."""


async def stop(ctx: Context) -> None:
    """End its QEMU, as pulling the plug would; whoever asked has passed admission."""
    machine = ctx.world.machines.get(ctx.target["id"])
    if machine is not None:
        await machine.quit()


async def prepare(ctx: Context) -> None:
    """New layers on those of the snapshot."""
    vm, snapshot = await _vm(ctx), await _snapshot(ctx)
    if snapshot["state"] != "whole":
        raise ActionRefused(f"snapshot {snapshot['name']} is being removed")
    if "layers" not in ctx.data:
        ctx.data |= {"automatic": new_id(), "layers": [new_id() for _ in vm["disks"]], "old": vm["disks"]}
        ctx.data["before"] = {field: vm.get(field) for field in (*OF_THE_DISKS, "at", "spec", "identity", "pending")}
        if ctx.args["memory"]:
            await check_fits(ctx.world, snapshot)
            ctx.data["memory"] = snapshot["memory"] | {"snapshot": snapshot["id"]}
        await ctx.save()
    await add_layers(ctx, vm, ctx.data["layers"], snapshot["disks"])
    ctx.data["nvram"] = keep_nvram(ctx.world, vm, ctx.data["automatic"])


async def unprepare(ctx: Context) -> None:
    """The new layers are gone again."""
    await drop_layers(ctx, ctx.target["id"], ctx.data.get("layers", []))
    if "automatic" in ctx.data:
        drop_nvram(ctx.world, ctx.target["id"], ctx.data["automatic"])


async def switch(ctx: Context) -> None:
    """The VM stands on the snapshot, and its present is one."""
    while (await _vm(ctx))["disks"] != ctx.data["layers"]:
        await _switch(ctx)
    put_nvram(ctx.world, await _vm(ctx), await _snapshot(ctx))
    ctx.result["snapshot"] = ctx.args["name"]


async def _switch(ctx: Context) -> None:
    store, automatic = ctx.world.store, ctx.data["automatic"]
    snapshot = await _snapshot(ctx)
    document = await store.get(f"vm/{ctx.target['id']}")
    assert document is not None  # this operation holds it
    vm = document.value
    name = await free_name(ctx.world, vm["id"], AUTOMATIC)
    present = snapshot_record(
        automatic, vm, name, now(), note=f"what there was before going back to {snapshot['name']}",
        expires=ctx.args["expires"], automatic=True, state="whole" if ctx.args["keep"] else "deleting",
        nvram=ctx.data["nvram"],
    )  # fmt: skip
    key = name_key(vm["id"], name)
    machine, claims = await set_back(ctx, vm, snapshot) if ctx.args["memory"] else ({}, {})
    here = {field: snapshot.get(field) for field in OF_THE_DISKS} | {"disks": ctx.data["layers"], "at": snapshot["id"]}
    writes: dict[str, Value | None] = {
        document.key: vm | here | machine,
        f"snapshot/{automatic}": present,
        key: {"id": automatic},
        **claims,
    }
    if claims:
        await ctx.save()  # should all of this be undone, they are given back
    try:
        await store.transact(writes, {document.key: document.revision, **await claim_checks(ctx.world, (key, *claims))})
    except Conflict:
        return
    ctx.result["kept"] = name if ctx.args["keep"] else None


async def unswitch(ctx: Context) -> None:
    """The present is the present again."""
    store = ctx.world.store
    while (present := await store.get(f"snapshot/{ctx.data['automatic']}")) is not None:
        document = await store.get(f"vm/{ctx.target['id']}")
        assert document is not None
        before = {"disks": ctx.data["old"], **ctx.data["before"]}
        put_nvram(ctx.world, document.value, present.value)
        writes: dict[str, Value | None] = {
            document.key: document.value | before,
            present.key: None,
            name_key(ctx.target["id"], present.value["name"]): None,
            **dict.fromkeys(ctx.data.get("new_claims", [])),
        }
        try:
            await store.transact(writes, {document.key: document.revision})
        except Conflict:
            continue
    ctx.result.clear()


async def tell(ctx: Context) -> None:
    """What happened, as an event."""
    await give_back(ctx)
    if ctx.args["memory"]:
        ctx.result["went_on"] = "paused" if ctx.args["paused"] else "running"
    if not ctx.data.get("told"):
        ctx.data["told"] = True
        kept = f"; what was there before is snapshot {name}" if (name := ctx.result.get("kept")) else ""
        text = f"{ctx.target['name']} went back to snapshot {ctx.args['name']}{kept}"
        await ctx.world.events.append("snapshot.restored", text, target=dict(ctx.target))


async def drop_present(ctx: Context) -> None:
    """With --no-keep: the layers that held the present."""
    if not ctx.args["keep"]:
        await consolidate(ctx)


async def forget_present(ctx: Context) -> None:
    """With --no-keep: the snapshot that it was for the time of the restore."""
    if not ctx.args["keep"]:
        ctx.data["snapshots"] = [ctx.data["automatic"]]
        await snapshot_delete.forget(ctx)


async def first_start(ctx: Context) -> None:
    """Of a clone, to the disks that it had before it was a machine of its own."""
    if ctx.args["start"] and not ctx.args["paused"]:
        await at_first_start(ctx)


async def _vm(ctx: Context) -> Value:
    return await ctx.world.find("vm", ctx.target["id"])


async def _snapshot(ctx: Context) -> Value:
    return await ctx.world.find("snapshot", ctx.args["snapshot"])


def _and_start(step: Step) -> Step:
    """A step of `vm-start`, done where that was asked for."""

    async def do(ctx: Context) -> None:
        if ctx.args["start"]:
            await step.do(ctx)

    async def undo(ctx: Context) -> None:
        if ctx.args["start"]:
            await step.undo(ctx)

    return Step(f"start: {step.name}", do, undo)


STEPS = (
    Step("stop", stop),
    Step("prepare", prepare, unprepare),
    Step("switch", switch, unswitch),
    *(_and_start(step) for step in vm_start.STEPS),
    Step("catch-up", catch_up),
    Step("tell", tell, keep=True),
    Step("drop-present", drop_present, abandon, keep=True),
    Step("forget-present", forget_present, keep=True),
    Step("first-start", first_start, keep=True),
)
# Not cancellable: once the present is being dropped there is nothing to go back to, and all of it is short.
VERB = Verb("snapshot-restore", STEPS, cancellable=False)
