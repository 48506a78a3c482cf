"""Remove snapshots: mark them, merge or drop the layers that nobody needs then, forget them.

From the moment a merge begins there is no way back to the snapshot; it stays listed as being removed until all is done,
and whoever removes it again, or prunes the VM, goes on.
"""

from __future__ import annotations

from innkeeper.base.errors import Conflict, NotFound
from innkeeper.operations.consolidate import abandon, consolidate
from innkeeper.operations.engine import Context, Step, Verb
from innkeeper.operations.snapshot_memory import drop_memory
from innkeeper.operations.snapshots import drop_nvram, name_key, snapshots_of
from innkeeper.store.contract import Value, update


async def mark(ctx: Context) -> None:
    """They are being removed. `args["snapshots"]` are their ids; those whose removal was not finished before go too."""
    found = await snapshots_of(ctx.world, ctx.target["id"])
    if "snapshots" not in ctx.data:
        left = [snapshot["id"] for snapshot in found if snapshot["state"] == "deleting"]
        ctx.data["snapshots"] = list(dict.fromkeys([*ctx.args["snapshots"], *left]))
        ctx.data["marked"] = [each for each in ctx.data["snapshots"] if each not in left]
        await ctx.save()
    for snapshot in ctx.data["snapshots"]:
        await _state(ctx, snapshot, "deleting")


async def unmark(ctx: Context) -> None:
    """As long as no layer was touched, they are whole again."""
    if not ctx.data.get("begun"):
        for snapshot in ctx.data.get("marked", []):
            await _state(ctx, snapshot, "whole")


async def _state(ctx: Context, snapshot_id: str, state: str) -> None:
    try:
        await update(ctx.world.store, f"snapshot/{snapshot_id}", lambda snapshot: snapshot | {"state": state})
    except NotFound:
        return  # the daemon died after it was forgotten


async def forget(ctx: Context) -> None:
    """Documents and copies of UEFI variables; what was taken on top of them was taken on top of what is before them."""
    names = []
    for snapshot_id in ctx.data["snapshots"]:
        while (gone := await ctx.world.store.get(f"snapshot/{snapshot_id}")) is not None:
            if await _forget(ctx, gone.value) and not gone.value["passing"]:
                names.append(gone.value["name"])
        drop_nvram(ctx.world, ctx.target["id"], snapshot_id)
        drop_memory(ctx.world, ctx.target["id"], snapshot_id)
    if names:
        ctx.result["removed"] = names
        text = f"{ctx.target['name']}: snapshot {', '.join(names)} removed"
        await ctx.world.events.append("snapshot.deleted", text, target=dict(ctx.target))


async def _forget(ctx: Context, gone: Value) -> bool:
    store = ctx.world.store
    vm = await store.get(f"vm/{gone['vm']}")
    assert vm is not None  # this operation holds it
    writes: dict[str, Value | None] = {f"snapshot/{gone['id']}": None, name_key(gone["vm"], gone["name"]): None}
    checks = {vm.key: vm.revision}
    if vm.value.get("at") == gone["id"]:
        writes[vm.key] = vm.value | {"at": gone["parent"]}
    for document in await store.list("snapshot/"):
        if document.value["parent"] == gone["id"]:
            writes[document.key] = document.value | {"parent": gone["parent"]}
            checks[document.key] = document.revision
    try:
        await store.transact(writes, checks)
    except Conflict:
        return False
    return True


STEPS = (
    Step("mark", mark, unmark, keep=True),
    Step("merge", consolidate, abandon, keep=True),
    Step("forget", forget, keep=True),
)
VERB = Verb("snapshot-delete", STEPS)
