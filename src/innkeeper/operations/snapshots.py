"""What the verbs of snapshots share: finding them, new layers on top of old ones, UEFI variables, holding the guest."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from innkeeper.base.clock import now
from innkeeper.base.errors import ActionRefused, NameTaken, NotFound
from innkeeper.base.nofollow import open_file, write_file
from innkeeper.base.units import MIB
from innkeeper.machine.machine import Machine
from innkeeper.operations.chains import layer_path
from innkeeper.operations.engine import Context
from innkeeper.operations.vm_create import NEW_DISK, check_room
from innkeeper.operations.world import World
from innkeeper.plan.chain import layer_record, node_name
from innkeeper.plan.snapshot import MOST_LAYERS, lineage, nvram_name
from innkeeper.qemu import blocks
from innkeeper.storage.formats.qcow2 import read_size, write_overlay
from innkeeper.store.contract import Value

MOST_NVRAM = 64 * MIB
"""Bytes of UEFI variables, generously: the flash that they lie in has less than one MiB."""


async def snapshots_of(world: World, vm_id: str) -> list[Value]:
    """A VM's snapshots, the oldest first."""
    found = [d.value for d in await world.store.list("snapshot/") if d.value["vm"] == vm_id]
    return sorted(found, key=lambda snapshot: (str(snapshot["created"]), str(snapshot["id"])))


async def find_snapshot(world: World, vm: Value, name: str) -> Value:
    """The snapshot of a VM by name or id. Raises `NotFound`."""
    for snapshot in await snapshots_of(world, vm["id"]):
        if name in (snapshot["name"], snapshot["id"]):
            return snapshot
    raise NotFound(
        f"{vm['name']} has no snapshot {name!r}", hint=f"inn snapshot ls {vm['name']} shows those it has", name=name
    )


def name_key(vm_id: str, name: str) -> str:
    """Of the document that keeps a snapshot's name unique."""
    return f"name/snapshot/{vm_id}/{name}"


async def free_name(world: World, vm_id: str, stem: str) -> str:
    """`<stem>-1`, or the next number that is free."""
    taken = {snapshot["name"] for snapshot in await snapshots_of(world, vm_id)}
    return next(name for n in range(1, len(taken) + 2) if (name := f"{stem}-{n}") not in taken)


async def check_new(world: World, vm: Value, name: str | None, *, memory: bool = False) -> None:
    """Raises `NameTaken`, and `ActionRefused` for a chain that is at its limit or a VM without disks."""
    if name is not None and await world.store.get(name_key(vm["id"], name)):
        raise NameTaken(f"{vm['name']} has a snapshot named {name!r} already", hint="choose another name", name=name)
    if not vm["disks"] and not memory:
        raise ActionRefused(f"{vm['name']} has no disk to take a snapshot of", hint="--memory saves what it is doing")
    layers = await all_layers(world)
    depth = max((len(lineage(layers, top)) for top in vm["disks"]), default=0)
    if depth >= MOST_LAYERS:
        raise ActionRefused(
            f"a disk of {vm['name']} consists of {depth} layers already, and {MOST_LAYERS} is the most",
            hint=f"each makes reads slower: inn snapshot prune {vm['name']}, or inn snapshot rm one that nobody needs",
            depth=depth,
        )  # fmt: skip


async def all_layers(world: World) -> dict[str, Value]:
    """The layers of all VMs by id."""
    return {d.value["id"]: d.value for d in await world.store.list("layer/")}


# --- layers ---


async def add_layers(ctx: Context, vm: Value, ids: Sequence[str], below: Sequence[str]) -> None:
    """New, empty layers, one on each of `below`: files and documents. Nothing refers to them yet."""
    world, stamp = ctx.world, now()
    check_room(ctx, NEW_DISK * len(ids))
    writes: dict[str, Value | None] = {}
    for index, (layer_id, base_id) in enumerate(zip(ids, below, strict=True)):
        layer = layer_record(layer_id, vm["id"], index, parent=base_id, image=None, stamp=stamp)
        path, base = layer_path(world, layer), layer_path(world, await world.find("layer", base_id))
        path.unlink(missing_ok=True)  # half-made by a daemon that died
        write_overlay(path, base, "qcow2", _size(base))
        if (uid := vm["identity"]["uid"]) is not None:
            os.chown(path, uid, uid, follow_symlinks=False)  # the folder is that of a QEMU that may run
        writes[f"layer/{layer_id}"] = layer
    await world.store.transact(writes, synced=False)  # the line of the step that uses them is


async def drop_layers(ctx: Context, vm_id: str, ids: Sequence[str]) -> None:
    """Undo of `add_layers`; layers that have become the VM's own are left to it."""
    world = ctx.world
    document = await world.store.get(f"vm/{vm_id}")
    layers = await all_layers(world)
    unused = [layers[each] for each in ids if each in layers and not (document and each in document.value["disks"])]
    if (machine := world.machines.get(vm_id)) is not None:
        await blocks.let_go(machine.monitor, [node_name(layer) for layer in unused])
    await world.store.transact({f"layer/{layer['id']}": None for layer in unused})
    for layer in unused:
        layer_path(world, layer).unlink(missing_ok=True)


def _size(path: Path) -> int:
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    try:
        return read_size(fd)
    finally:
        os.close(fd)


# --- UEFI variables ---


def keep_nvram(world: World, vm: Value, snapshot_id: str) -> bool:
    """Copy the UEFI variables for a snapshot; False where there are none."""
    folder = world.home.vm(vm["id"])
    return _copy(folder / "nvram.fd", folder / nvram_name(snapshot_id), None)


def put_nvram(world: World, vm: Value, snapshot: Value) -> None:
    """The UEFI variables become those of a snapshot; where it has none, the next start makes new ones."""
    folder = world.home.vm(vm["id"])
    if not snapshot["nvram"] or not _copy(folder / nvram_name(snapshot["id"]), folder / "nvram.fd", vm):
        (folder / "nvram.fd").unlink(missing_ok=True)


def drop_nvram(world: World, vm_id: str, snapshot_id: str) -> None:
    """Remove the copy that belongs to a snapshot."""
    (world.home.vm(vm_id) / nvram_name(snapshot_id)).unlink(missing_ok=True)


def _copy(source: Path, target: Path, owner: Value | None) -> bool:
    try:
        with open_file(source, MOST_NVRAM) as reading:
            write_file(target, reading, owner["identity"]["uid"] if owner else None)
    except FileNotFoundError:
        return False
    return True


# --- the guest stands still ---


async def hold(ctx: Context, machine: Machine) -> None:
    """Keep a guest from running until `release`; of one that ran the journal knows: the next daemon lets it go on."""
    if machine.status.state == "running":
        ctx.data["held"] = True
        await ctx.save()
    await machine.hold()


async def release(ctx: Context) -> None:
    """Let a guest go on that this operation has stopped."""
    machine, stopped = ctx.world.machines.get(ctx.target["id"]), bool(ctx.data.get("held"))
    if machine is not None:
        await machine.let_go(run=stopped)
    if stopped:
        ctx.data["held"] = False
        await ctx.save()
