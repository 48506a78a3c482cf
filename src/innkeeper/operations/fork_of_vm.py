"""The steps of `vm-fork` that are other for a fork of a VM than for one of a warm image: it stands on the layers of a
snapshot, as a linked clone does, and goes on from its memory.

The snapshot may be one that is taken for it, by another operation: many forks wait for the same. The VM stands still
for no longer than that takes (snapshot_memory.py), and goes on in layers of its own.
"""

from __future__ import annotations

import asyncio

from innkeeper.base.clock import now
from innkeeper.base.errors import ActionRefused, Conflict, NameTaken
from innkeeper.base.ids import new_id
from innkeeper.operations import vm_create
from innkeeper.operations.engine import Context
from innkeeper.operations.networks import claim_checks
from innkeeper.operations.snapshots import MOST_NVRAM
from innkeeper.operations.vm_clone import LASTING, MOST_SEED, copy_small, put_overlays
from innkeeper.plan.chain import layer_record
from innkeeper.plan.clone import clone_first_boot, clone_identity, clone_spec
from innkeeper.plan.identity import assign
from innkeeper.plan.record import vm_record
from innkeeper.plan.snapshot import nvram_name
from innkeeper.storage.hostkeys import make_host_key
from innkeeper.store.contract import Value

POLL = 0.01
"""Seconds between two looks at the operation that takes the snapshot."""


async def wait(ctx: Context) -> None:
    """Until the snapshot is there. Raises `ActionRefused` with what kept it from being taken."""
    while ctx.args.get("capture") and "snapshot" not in ctx.data:
        document = await ctx.world.store.get(f"operation/{ctx.args['capture']}")
        if document is None:
            raise ActionRefused("the VM that was to be forked is gone")
        taking = document.value
        if taking["state"] == "done":
            ctx.data["snapshot"] = taking["data"]["snapshot"]
            await ctx.save()
        elif taking["ended"]:
            why = (taking["error"] or {}).get("detail", taking["state"])
            raise ActionRefused(f"{taking['target']['name']} could not be captured: {why}")
        else:
            ctx.report(taking["progress"]["fraction"], taking["progress"]["text"] or "capturing")
            await asyncio.sleep(POLL)


async def claim(ctx: Context) -> None:
    """Record the fork as `creating`, with everything that is its own, in one transaction."""
    world, snapshot = ctx.world, await _snapshot(ctx)
    if "vm" not in ctx.data:
        ctx.data["snapshot"] = snapshot["id"]
        ctx.data["vm"] = ctx.target["id"] = new_id()
        ctx.data["layers"] = [new_id() for _ in snapshot["disks"]]
        ctx.data["hold"] = f"vm/{ctx.data['vm']}"
        await ctx.save(synced=False)
    if await world.store.get(f"vm/{ctx.data['vm']}"):
        return  # claimed before the daemon died
    source = await world.find("vm", snapshot["vm"])
    then = source | {field: snapshot[field] for field in ("spec", "identity", "disc")}
    spec = clone_spec(then, ctx.args["name"], keep_identity=False, network=ctx.args.get("network"))
    secret, host = await world.store.get(f"secret/vm/{source['id']}"), await world.host_with_qemu(LASTING)
    assert secret is not None
    while True:
        stamp = now()
        writes, slot, ssh_port = await vm_create.claims(ctx, spec)
        checks = await claim_checks(world, writes)
        identity = clone_identity(assign(ctx.data["vm"], slot, spec, host, ssh_port), then, keep_identity=False)
        record = vm_record(spec, identity, source["image"], ctx.data["layers"], stamp)
        writes[f"vm/{identity.id}"] = record | {
            "operation": {"id": ctx.operation, "kind": ctx.kind},
            "cloned_from": {"id": source["id"], "name": source["name"]},
            "going_on": f"snapshot/{snapshot['id']}", "forked": True, "expires": ctx.args["expires"],
            "read_seed": snapshot["memory"]["seed"],
        }  # fmt: skip
        for index, (layer, below) in enumerate(zip(ctx.data["layers"], snapshot["disks"], strict=True)):
            writes[f"layer/{layer}"] = layer_record(layer, identity.id, index, parent=below, image=None, stamp=stamp)
            frozen = await world.store.get(f"layer/{below}")
            checks[f"layer/{below}"] = frozen.revision if frozen else -1  # nobody merges it away meanwhile
        macs = list(zip(then["identity"]["macs"], identity.macs, strict=True))
        writes[f"secret/vm/{identity.id}"] = {
            "first_boot": clone_first_boot(secret.value["first_boot"], macs),
            "host_key": vars(make_host_key(spec.name)),
        }
        try:
            await world.store.transact(writes, checks, synced=False)
            return
        except Conflict as conflict:
            if str(conflict.facts["key"]).startswith("name/"):
                raise NameTaken(f"there is a VM named {spec.name!r} already", name=spec.name) from None
            await _snapshot(ctx)  # `NotFound`, if that is why


async def make_files(ctx: Context) -> None:
    """The fork's folder: its layers, UEFI variables, and Ignition."""
    world, snapshot, fork = ctx.world, await _snapshot(ctx), await ctx.world.find("vm", ctx.data["vm"])
    vm_create.check_room(ctx, vm_create.NEW_DISK * max(1, len(fork["disks"])))
    folder, origin = vm_create.new_folder(ctx, fork["id"]), world.home.vm(snapshot["vm"])
    await put_overlays(world, fork)
    copy_small(origin / nvram_name(snapshot["id"]), folder / "nvram.fd", MOST_NVRAM)
    copy_small(origin / "ignition.json", folder / "ignition.json", MOST_SEED)
    vm_create.own_folder(folder, fork)


async def _snapshot(ctx: Context) -> Value:
    return await ctx.world.find("snapshot", ctx.data.get("snapshot") or ctx.args["snapshot"])


def arguments(
    name: str, *, capture: str = "", snapshot: str = "", network: str | None = None, force: bool, expires: str | None
) -> Value:
    """What the journal keeps of a request: `capture` is the operation that takes the snapshot, or it is there."""
    which = {"capture": capture, "snapshot": snapshot}
    return {"name": name, **which, "network": network, "force": force, "expires": expires}
