"""Make a VM: claim its name, number and ports; make its disks and seed; record it as stopped."""

from __future__ import annotations

import os
import shutil
from contextlib import suppress
from pathlib import Path
from typing import Any

from innkeeper.base.clock import now
from innkeeper.base.errors import (
    ActionRefused,
    Conflict,
    InvalidInput,
    NameTaken,
    NotFound,
    PoolFull,
    PortTaken,
    Unsupported,
)
from innkeeper.base.ids import new_id
from innkeeper.base.nofollow import write_file
from innkeeper.base.units import format_size
from innkeeper.network.ports import is_free, who_listens
from innkeeper.operations import host_cards
from innkeeper.operations.chains import chain, own_layers, role_of
from innkeeper.operations.engine import Context, Step, Verb, always, busy
from innkeeper.operations.image_verify import check_untouched
from innkeeper.operations.networks import claim_addresses, claim_checks, follow
from innkeeper.plan.chain import layer_record
from innkeeper.plan.identity import SSH_PORT_BASE, assign
from innkeeper.plan.record import vm_record
from innkeeper.plan.seed import HostKey, compose
from innkeeper.spec.vm import VMSpec
from innkeeper.storage.formats.qcow2 import write_empty, write_overlay
from innkeeper.storage.hostkeys import make_host_key
from innkeeper.storage.seed import write_seed
from innkeeper.store.contract import Value, update

NEW_DISK = 1024 * 1024
"""Bytes that a thin disk, its seed and its firmware variables need at least."""


async def claim(ctx: Context) -> None:
    """Record the VM as `creating`, with everything that must be its own, in one transaction."""
    world, spec = ctx.world, VMSpec.model_validate(ctx.args["spec"])
    if "vm" not in ctx.data:
        ctx.data["vm"] = new_id()
        ctx.data["layers"] = [new_id() for _ in spec.disks]
        ctx.data["hold"] = f"vm/{ctx.data['vm']}"
        if ctx.target["kind"] == "vm":
            ctx.target["id"] = ctx.data["vm"]
        await ctx.save(synced=False)
    if await world.store.get(f"vm/{ctx.data['vm']}"):
        return  # claimed before the daemon died
    if said := await host_cards.remarks(spec.nics):
        ctx.result["warnings"] = said
    host = await world.host_with_qemu()
    if spec.firmware == "uefi" and host.firmware.uefi is None:
        raise Unsupported("this host has no UEFI firmware for guests", hint="apt install ovmf")
    while True:
        writes, slot, ssh_port = await claims(ctx, spec)
        checks = await claim_checks(world, writes)
        identity = assign(ctx.data["vm"], slot, spec, host, ssh_port)
        image = await world.find("image", spec.image) if spec.image else None
        if image and (operation := image["operation"]):
            raise busy(f"image {image['name']}", operation)
        await check_untouched(world, image["id"] if image else None)
        if image and image["kind"] == "warm":  # saved state loads into the same machine only
            pinned = ("machine_type", "accelerator", "cpu_model")
            identity = identity.model_copy(update={key: image["warm"][key] for key in pinned})
        origin, layers, stamp = {"id": image["id"], "name": image["name"]} if image else None, ctx.data["layers"], now()
        record = vm_record(spec, identity, origin, layers, stamp)
        writes[f"vm/{identity.id}"] = record | {
            "operation": {"id": ctx.operation, "kind": ctx.args["kind"]},
            "capturable": bool(ctx.args.get("capturable")),
            "going_on": f"image/{image['id']}" if image and image["kind"] == "warm" else "",
            "forked": bool(image and image["kind"] == "warm"),
            "expires": ctx.args.get("expires"),
        }
        for index, layer in enumerate(layers):
            base = image["id"] if image and role_of(index) in image["files"] else None
            writes[f"layer/{layer}"] = layer_record(layer, identity.id, index, parent=None, image=base, stamp=stamp)
        writes[f"secret/vm/{identity.id}"] = {
            "first_boot": ctx.args["spec"]["first_boot"],
            "host_key": vars(make_host_key(spec.name)),
        }
        if image:
            document = await world.store.get(f"image/{image['id']}")
            checks[f"image/{image['id']}"] = document.revision if document else 0
        try:
            await world.store.transact(writes, checks, synced=False)
        except Conflict as conflict:
            if not str(conflict.facts["key"]).startswith(("slot/", "image/", "port/", "address/", "network/")):
                raise _taken(spec) from None
            continue
        return await follow(world, identity.id)


async def claims(ctx: Context, spec: VMSpec) -> tuple[dict[str, Value | None], int, int | None]:
    """Keys that must not exist yet (name, slot, ports, addresses), and the slot and the SSH port among them."""
    store, owner = ctx.world.store, {"id": ctx.data["vm"], "name": spec.name}
    if await store.get(f"name/vm/{spec.name}"):
        raise _taken(spec)
    used = {int(document.key.removeprefix("slot/")) for document in await store.list("slot/")}
    slot = next(number for number in range(1, len(used) + 2) if number not in used)
    ports, ssh_port = await claim_ports(ctx, spec, owner, slot)
    addresses = await claim_addresses(ctx.world, spec, owner)
    return {f"name/vm/{spec.name}": owner, f"slot/{slot}": owner, **ports, **addresses}, slot, ssh_port


async def claim_ports(
    ctx: Context, spec: VMSpec, owner: Value, slot: int, ssh_port: int | None = None
) -> tuple[dict[str, Value], int | None]:
    """The port documents that a VM with this spec needs, and its SSH port: `ssh_port` where it may stay, else a free
    one. What the owner has already is among them. Raises `PortTaken`."""
    store = ctx.world.store
    claims: dict[str, Value] = {}
    for nic in (nic for nic in spec.nics if nic.network and nic.publish):
        document = await ctx.world.find("network", str(nic.network))
        network, mode = document["name"], document["mode"]
        if mode != "nat":
            raise ActionRefused(
                f"network {network} is {mode}: no port leads into it from outside",
                hint="publish on a card in a network of mode nat (inn unpublish takes a port away)"
                + (", or use the guest's own address on this host" if mode == "host-only" else ""),
            )  # fmt: skip
        if beyond := [
            forward.address for forward in nic.publish if forward.families == (6,) and not document["prefix"]
        ]:
            raise InvalidInput(
                f"network {network} has no IPv6, so nothing that comes to {beyond[0]} can lead into it",
                hint="bind an IPv4 address, or 0.0.0.0 for all of them", field="address",
            )  # fmt: skip
    for forward in (forward for nic in spec.nics for forward in nic.publish):
        key = f"port/{forward.protocol}/{forward.host}"
        holder = await store.get(key)
        if holder and holder.value["id"] != owner["id"]:
            raise PortTaken(
                f"host port {forward.host}/{forward.protocol} is published by {holder.value['name']}",
                hint="choose another host port", port=forward.host, holder=holder.value["name"],
            )  # fmt: skip
        if not holder and not is_free(forward.host, forward.protocol, forward.address):
            program = who_listens(forward.host, forward.protocol, forward.address) or "another program"
            raise PortTaken(
                f"host port {forward.host}/{forward.protocol} is in use by {program}",
                hint="choose another host port, or stop that program", port=forward.host, holder=program,
            )  # fmt: skip
        claims[key] = owner | {"by": str(ctx.args.get("by") or ""), "since": now()}
    if not spec.nics or spec.nics[0].mode != "user":
        return claims, None
    if ssh_port is None or f"port/tcp/{ssh_port}" in claims:
        ssh_port = SSH_PORT_BASE + slot
        while (
            (key := f"port/tcp/{ssh_port}") in claims
            or await store.get(key)
            or not is_free(ssh_port, "tcp", "127.0.0.1")
        ):
            ssh_port += 1
    claims[f"port/tcp/{ssh_port}"] = owner
    return claims, ssh_port


def _taken(spec: VMSpec) -> NameTaken:
    return NameTaken(f"there is a VM named {spec.name!r} already", hint="choose another --name", name=spec.name)


async def unclaim(ctx: Context) -> None:
    """Forget the VM and give back what it had claimed."""
    await forget(ctx, ctx.data.get("vm"))


async def forget(ctx: Context, vm_id: str | None) -> None:
    """Delete every document of a VM, in one transaction."""
    if not vm_id:
        return
    store = ctx.world.store
    owned = [
        document.key
        for prefix in ("name/vm/", "slot/", "port/", "address/")
        for document in await store.list(prefix)
        if document.value["id"] == vm_id
    ]
    owned += [f"layer/{layer['id']}" for layer in await own_layers(ctx.world, vm_id)]
    owned += [f"snapshot/{d.value['id']}" for d in await store.list("snapshot/") if d.value["vm"] == vm_id]
    owned += [document.key for document in await store.list(f"name/snapshot/{vm_id}/")]
    keys = [*owned, f"vm/{vm_id}", f"live/{vm_id}", f"secret/vm/{vm_id}"]
    await store.transact(dict.fromkeys(keys))
    await follow(ctx.world, vm_id)


async def make_files(ctx: Context) -> None:
    """The VM's folder: disks, seed, Ignition; all owned by the VM's user."""
    world = ctx.world
    vm = await world.find("vm", ctx.data["vm"])
    spec = VMSpec.model_validate(vm["spec"])
    check_room(ctx, NEW_DISK * max(1, len(spec.disks)))
    folder = new_folder(ctx, vm["id"])
    image = await world.find("image", vm["image"]["id"]) if vm["image"] else None
    for index, (disk, layer_id) in enumerate(zip(spec.disks, vm["disks"], strict=True)):
        *_, base, top = (None, *await chain(world, vm["id"], layer_id))
        target = folder / top.path
        if image and base:
            size, smallest = disk.size or image["virtual_size"], _smallest(image, index)
            if size < smallest:
                raise InvalidInput(
                    f"disk {index} of {format_size(size)} is smaller than that of image {image['name']}",
                    hint=f"give it at least {format_size(smallest)}", field=f"disks.{index}.size",
                )  # fmt: skip
            write_overlay(target, Path(base.path), "qcow2", size)
        elif disk.size is None:
            raise InvalidInput(f"disk {index} has no size, and image {vm['image']['name']} has no disk to take it from")
        else:
            write_empty(target, disk.size)
    if image and (vm["going_on"] or (image["kind"] == "template" and spec.firmware == "uefi")):
        _as_captured(ctx, folder, image)
    if not vm["going_on"]:
        await write_first_boot(ctx, vm, image)
    own_folder(folder, vm)


def new_folder(ctx: Context, vm_id: str) -> Path:
    """An empty folder of a VM."""
    folder = ctx.world.home.vm(vm_id)
    if folder.exists():
        shutil.rmtree(folder)  # half-made by a daemon that died
    folder.mkdir(mode=0o700, parents=True)
    return folder


def own_folder(folder: Path, vm: Value) -> None:
    """It and all that is in it are the VM's user's."""
    if (uid := vm["identity"]["uid"]) is not None:
        for path in (*folder.iterdir(), folder):
            os.chown(path, uid, uid)


def _smallest(image: Value, disk: int) -> int:
    """Bytes that a disk must have at least to hold what the image has of it."""
    return int(image["template"]["disks"][disk] if image.get("template") else image["virtual_size"])


def _as_captured(ctx: Context, folder: Path, image: Value) -> None:
    """What a fork has of its own besides its disks: a seed is made when it boots for the first time (vm_start). Also
    what firmware has to know to find the system on the disks of a template."""
    if "nvram" in image["files"]:
        with (ctx.world.home.image(image["id"]) / image["files"]["nvram"]).open("rb") as captured:
            write_file(folder / "nvram.fd", captured)


async def write_first_boot(ctx: Context, vm: Value, image: Value | None) -> None:
    world = ctx.world
    folder = world.home.vm(vm["id"])
    document = await world.store.get(f"secret/vm/{vm['id']}")
    assert document is not None
    secret = document.value["first_boot"]
    if secret["ignition"]:
        path = folder / "ignition.json"
        path.touch(0o600)
        path.write_text(secret["ignition"])
    if image is None and not secret["user_data"]:
        return  # nobody will look for a seed on a machine that is being installed
    macs = vm["identity"]["macs"]
    files = compose(
        instance_id=f"i-{vm['id']}",
        hostname=vm["name"],
        user=secret["user"],
        ssh_keys=secret["ssh_keys"],
        host_key=HostKey(**document.value["host_key"]),
        user_data=secret["user_data"],
        vendor_data=None,
        network_config=secret["network_config"],
        env=secret["env"],
        mac=macs[0] if macs else None,
    )
    write_seed(files, folder / "seed.iso")
    await update(world.store, f"vm/{vm['id']}", lambda v: v | {"seed": True})


def check_room(ctx: Context, needed: int) -> None:
    """Raise `PoolFull` where the pool has not `needed` bytes."""
    pool = ctx.world.home.pool
    free = shutil.disk_usage(pool).free
    if free < needed:
        raise PoolFull(f"the pool at {pool} has {format_size(free)} free and this needs {format_size(needed)}")


async def remove_files(ctx: Context) -> None:
    """Undo of `make_files`."""
    if "vm" in ctx.data:
        discard_folder(ctx, ctx.data["vm"])


def discard_folder(ctx: Context, vm_id: str) -> None:
    """Take a VM's folder away: renamed first, so that a half-deleted one is never taken for a VM."""
    folder, trash = ctx.world.home.vm(vm_id), ctx.world.home.workspace(f"{ctx.operation}-trash")
    if folder.exists():
        trash.parent.mkdir(parents=True, exist_ok=True)
        if trash.exists():
            shutil.rmtree(trash)
        folder.rename(trash)
    if trash.exists():
        shutil.rmtree(trash)


async def settle(ctx: Context) -> None:
    """The VM is whole: it may be started from now on."""
    stamp = now()

    def change(vm: Value) -> Value | None:
        return vm | {"state": "stopped", "since": stamp} if vm["state"] == "creating" else None

    vm = await update(ctx.world.store, f"vm/{ctx.data['vm']}", change, synced=False)
    ctx.result["vm"] = vm["name"]
    target = {"kind": "vm", "id": vm["id"], "name": vm["name"]}
    if not ctx.data.get("told"):
        ctx.data["told"] = True
        await ctx.world.events.append("vm.created", f"{vm['name']} was created", target=target)


async def unsettle(ctx: Context) -> None:
    """Its files are taken away now: should forgetting it fail, it must not be taken for a VM."""
    with suppress(NotFound):
        await update(ctx.world.store, f"vm/{ctx.data['vm']}", lambda vm: vm | {"state": "creating"})


STEPS = (
    Step("claim", claim, unclaim, unsynced=always),
    Step("make-files", make_files, remove_files, unsynced=always),
    Step("settle", settle, unsettle, unsynced=always),
)
VERB = Verb("vm-create", STEPS)


def arguments(spec: VMSpec, kind: str, **more: Any) -> dict[str, Any]:
    """What the journal keeps of a request to make a VM."""
    return {"spec": spec.model_dump(mode="json"), "kind": kind, **more}
