"""Clone a VM: a machine of its own with the disks of another, copies of all layers or (linked) new layers on top.

Layers are copied as they are, not flattened: so blocks can be shared where the file system can, no tool reads what a
guest's QEMU wrote, and what was sparse stays so. A copy is made of layers that nobody writes to. Those of a VM that has
no QEMU are; one that has a QEMU, or is to share its disks with a linked clone, goes on in new layers above them, as for
a snapshot. They are merged away again once the copy is whole.
"""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path

from innkeeper.base.clock import now
from innkeeper.base.errors import Conflict, NameTaken
from innkeeper.base.ids import new_id
from innkeeper.base.nofollow import open_file, write_file
from innkeeper.base.units import TIB
from innkeeper.operations import snapshot_create, vm_create
from innkeeper.operations.chains import layer_path
from innkeeper.operations.consolidate import abandon, consolidate
from innkeeper.operations.engine import Context, Step, Verb, always
from innkeeper.operations.image_verify import check_untouched
from innkeeper.operations.networks import claim_checks
from innkeeper.operations.snapshots import MOST_NVRAM, all_layers, check_new, drop_layers, drop_nvram
from innkeeper.operations.world import World
from innkeeper.plan.chain import layer_record
from innkeeper.plan.clone import clone_first_boot, clone_identity, clone_spec, remarks
from innkeeper.plan.identity import assign
from innkeeper.plan.record import vm_record
from innkeeper.plan.snapshot import lineage, nvram_name
from innkeeper.storage.copy import copy_files
from innkeeper.storage.formats.qcow2 import read_size, write_overlay
from innkeeper.storage.hostkeys import make_host_key
from innkeeper.store.contract import Value, update

MOST_LAYER = 65 * TIB
"""Bytes of a layer's file: the largest disk there may be, and its tables."""
LASTING = 86400.0
"""Seconds for which what a clone is told of the host does not change: whether the daemon is root, and its QEMU."""
MOST_SEED = 16 * 1024 * 1024
"""Bytes of a seed or an Ignition file, generously."""


async def check(world: World, vm: Value, name: str, *, linked: bool) -> None:
    """What can be known to be wrong before anything is made. Raises `NameTaken`, `ActionRefused`."""
    if await world.store.get(f"name/vm/{name}"):
        raise NameTaken(f"there is a VM named {name!r} already", hint="choose another name", name=name)
    if vm["disks"] and (linked or world.machines.get(vm["id"]) is not None):
        await check_new(world, vm, None)


async def claim(ctx: Context) -> None:
    """Record the clone as `creating`, with everything that is its own, in one transaction."""
    world, source = ctx.world, await _source(ctx)
    if "vm" not in ctx.data:
        await check(world, source, ctx.args["new"], linked=ctx.args["linked"])
        await check_untouched(world, source["image"]["id"] if source["image"] else None)
        await _decide(ctx, source)
    if await world.store.get(f"vm/{ctx.data['vm']}"):
        return  # claimed before the daemon died
    secret, layers = await world.store.get(f"secret/vm/{source['id']}"), await _layers(ctx, source)
    assert secret is not None
    keep, host = ctx.args["keep_identity"], await world.host_with_qemu(LASTING)
    spec = clone_spec(source, ctx.args["new"], keep_identity=keep)
    while True:
        writes, slot, ssh_port = await vm_create.claims(ctx, spec)
        checks = await claim_checks(world, writes)
        identity = clone_identity(assign(ctx.data["vm"], slot, spec, host, ssh_port), source, keep_identity=keep)
        record = vm_record(spec, identity, source["image"], ctx.data["tops"], now())
        writes[f"vm/{identity.id}"] = record | {
            "operation": {"id": ctx.operation, "kind": "vm-clone"},
            "cloned_from": {"id": source["id"], "name": source["name"]},
            "identity_due": not keep and bool(ctx.data["tops"]),
            "seed": keep and source["seed"],
        }
        writes |= {f"layer/{layer['id']}": layer for layer in layers}
        macs = list(zip(source["identity"]["macs"], identity.macs, strict=True))
        writes[f"secret/vm/{identity.id}"] = {
            "first_boot": clone_first_boot(secret.value["first_boot"], macs),
            "host_key": secret.value["host_key"] if keep else vars(make_host_key(spec.name)),
        }
        try:
            await world.store.transact(writes, checks, synced=False)
            break
        except Conflict as conflict:
            if str(conflict.facts["key"]).startswith("name/"):
                raise NameTaken(f"there is a VM named {spec.name!r} already", name=spec.name) from None
    user_data = bool(secret.value["first_boot"]["user_data"])
    ctx.result["warnings"] = remarks(source, spec, keep_identity=keep, user_data=user_data)


async def _decide(ctx: Context, source: Value) -> None:
    """The ids of all that will be there; from here on they are in the journal."""
    linked, tops = ctx.args["linked"], source["disks"]
    layers = await all_layers(ctx.world)
    copied = [] if linked else list(dict.fromkeys(each for top in tops for each in lineage(layers, top)))
    ctx.data |= {
        "vm": new_id(),
        "copies": {each: new_id() for each in copied},  # the source's layer → the clone's
        "changes_over": bool(tops) and (linked or ctx.world.machines.get(source["id"]) is not None),
    }
    if ctx.data["changes_over"]:
        ctx.data |= snapshot_create.decide(source)
    ctx.data["tops"] = [new_id() for _ in tops] if linked else [ctx.data["copies"][top] for top in tops]
    ctx.data["hold"] = [f"vm/{source['id']}", f"vm/{ctx.data['vm']}"]
    await ctx.save(synced=False)


async def _layers(ctx: Context, source: Value) -> list[Value]:
    """The documents of the clone's layers."""
    vm_id, copies, stamp = ctx.data["vm"], ctx.data["copies"], now()
    if ctx.args["linked"]:
        pairs = enumerate(zip(ctx.data["tops"], source["disks"], strict=True))
        return [layer_record(new, vm_id, disk, parent=old, image=None, stamp=stamp) for disk, (new, old) in pairs]
    layers = await all_layers(ctx.world)
    return [
        layer_record(
            new, vm_id, layers[old]["disk"], parent=copies.get(layers[old]["parent"]), image=layers[old]["image"],
            stamp=stamp,
        )
        for old, new in copies.items()
    ]  # fmt: skip


async def unclaim(ctx: Context) -> None:
    """Forget the clone; what the source was given for its sake is merged away."""
    await vm_create.forget(ctx, ctx.data.get("vm"))
    await _tidy(ctx)


async def prepare(ctx: Context) -> None:
    """New layers for the source to go on in, where it has to."""
    if ctx.data["changes_over"]:
        await snapshot_create.prepare(ctx)


async def unprepare(ctx: Context) -> None:
    """They are gone again, unless they are in use."""
    if not ctx.data.get("begun"):
        await drop_layers(ctx, ctx.target["id"], ctx.data.get("layers", []))
        if ctx.data.get("changes_over"):
            drop_nvram(ctx.world, ctx.target["id"], ctx.data["snapshot"])  # of a `switch` whose line the power took


async def switch(ctx: Context) -> None:
    """The moment that the clone is of: the source writes to its new layers from here on."""
    if ctx.data["changes_over"]:
        await snapshot_create.change_over(ctx, _record)


async def _record(ctx: Context) -> None:
    runs = ctx.world.machines.get(ctx.target["id"]) is not None  # else nobody writes to them before the end
    key, disks = f"vm/{ctx.target['id']}", {"disks": ctx.data["layers"]}
    await update(ctx.world.store, key, lambda vm: vm | disks, synced=runs)


async def unswitch(ctx: Context) -> None:
    """As before, but for layers that may have been written to; `unclaim` merges those."""
    if ctx.data["changes_over"] and not ctx.data.get("begun"):
        await snapshot_create.unswitch(ctx)


async def copy(ctx: Context) -> None:
    """The clone's folder: its layers, UEFI variables, and the seed if it is to be taken for the source."""
    world, source, clone = ctx.world, await _source(ctx), await ctx.world.find("vm", ctx.data["vm"])
    vm_create.check_room(ctx, vm_create.NEW_DISK * max(1, len(clone["disks"])))
    folder, origin = vm_create.new_folder(ctx, clone["id"]), world.home.vm(source["id"])
    layers = await all_layers(world)
    if ctx.args["linked"]:
        await put_overlays(world, clone)
    elif ctx.data["copies"]:
        with ExitStack() as files:
            pairs = [
                (
                    files.enter_context(open_file(layer_path(world, layers[old]), MOST_LAYER)),
                    layer_path(world, layers[new]),
                )
                for old, new in ctx.data["copies"].items()
            ]
            await copy_files([(file.fileno(), target) for file, target in pairs], report=ctx.report)
    variables = nvram_name(ctx.data["snapshot"]) if ctx.data["changes_over"] else "nvram.fd"
    copy_small(origin / variables, folder / "nvram.fd", MOST_NVRAM)
    if ctx.args["keep_identity"]:
        for name in ("seed.iso", "ignition.json"):
            copy_small(origin / name, folder / name, MOST_SEED)
    vm_create.own_folder(folder, clone)


async def put_overlays(world: World, vm: Value) -> None:
    """The top layers of a VM whose disks stand on frozen layers of another."""
    layers = await all_layers(world)
    for top in vm["disks"]:
        base = layer_path(world, layers[layers[top]["parent"]])
        with open_file(base, MOST_LAYER) as frozen:
            write_overlay(layer_path(world, layers[top]), base, "qcow2", read_size(frozen.fileno()))


def copy_small(source: Path, target: Path, most: int) -> None:
    """Where there is such a file."""
    try:
        with open_file(source, most) as reading:
            write_file(target, reading)
    except FileNotFoundError:
        return


async def settle(ctx: Context) -> None:
    """The clone is whole."""
    await vm_create.settle(ctx)
    if ctx.data["changes_over"]:
        drop_nvram(ctx.world, ctx.target["id"], ctx.data["snapshot"])


async def merge(ctx: Context) -> None:
    """The source is as it was: what it wrote meanwhile is merged. What a linked clone stands on stays."""
    if not _not_merged(ctx):
        await _tidy(ctx)


async def _tidy(ctx: Context) -> None:
    if ctx.data.get("changes_over"):
        await consolidate(ctx)


async def _source(ctx: Context) -> Value:
    return await ctx.world.find("vm", ctx.target["id"])


def _stays(ctx: Context) -> bool:
    return not ctx.data["changes_over"]


def _not_frozen(ctx: Context) -> bool:
    return not ctx.args["quiesce"]


def _not_merged(ctx: Context) -> bool:
    return _stays(ctx) or bool(ctx.args["linked"])


def _is_linked(ctx: Context) -> bool:
    return bool(ctx.args["linked"])


def _no_variables(ctx: Context) -> bool:
    return not ctx.data.get("nvram")


STEPS = (
    Step("claim", claim, unclaim, unsynced=always),
    Step("prepare", prepare, unprepare, idle=_stays),
    Step("freeze", snapshot_create.freeze, snapshot_create.thaw, idle=_not_frozen),
    Step("switch", switch, unswitch, idle=_stays, unsynced=always),  # of one that runs it syncs
    Step("thaw", snapshot_create.thaw, idle=_not_frozen),
    Step("copy", copy, vm_create.remove_files, unsynced=_is_linked),
    Step("settle", settle, vm_create.unsettle, unsynced=_no_variables),
    Step("merge", merge, abandon, keep=True, idle=_not_merged),
)
VERB = Verb("vm-clone", STEPS)


def arguments(new: str, *, linked: bool, keep_identity: bool, quiesce: bool) -> Value:
    """What the journal keeps of a request. `name` and `memory` are those of the snapshot which this is not
    (snapshot_create)."""
    return {
        "new": new, "linked": linked, "keep_identity": keep_identity, "quiesce": quiesce, "name": None, "memory": False,
    }  # fmt: skip
