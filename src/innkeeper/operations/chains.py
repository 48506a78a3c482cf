"""Where the layers of disks lie (`plan/chain.py`), as the store knows it."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path

from innkeeper.base.errors import StoreFailed
from innkeeper.operations.world import World
from innkeeper.plan.chain import Chain, Layer, file_name, node_name
from innkeeper.plan.snapshot import lineage
from innkeeper.store.contract import Value

PRIVATE = ("warm", "template")
"""Kinds of images that only the daemon may read: what somebody's guest had in memory or on disk is in them."""


async def chain(world: World, vm_id: str, layer_id: str, *, absolute: bool = False) -> Chain:
    """The disk whose top is this layer, as a QEMU of `vm_id` opens it: its own layers by name, relative to the VM's
    folder, unless `absolute`. Raises `NotFound` for a layer that is gone."""
    found: list[Layer] = []
    seen: set[str] = set()
    below: str | None = layer_id
    layer: Value = {}
    while below is not None:
        if below in seen:
            raise StoreFailed(f"layer {below} stands on itself")
        seen.add(below)
        layer = await world.find("layer", below)
        found.append(
            Layer(
                node_name(layer),
                _path(world, vm_id, layer, absolute),
                handed=layer["vm"] != vm_id,
                own=layer["vm"] == vm_id,
            )
        )
        below = layer["parent"]
    if layer["image"]:
        found += await _image_layers(world, layer["image"], layer["disk"])
    return tuple(reversed(found))


def _path(world: World, vm_id: str, layer: Value, absolute: bool) -> str:
    return file_name(layer) if layer["vm"] == vm_id and not absolute else str(layer_path(world, layer))


async def _image_layers(world: World, image_id: str, disk: int) -> list[Layer]:
    """Top first: the image's own files, and those of the images that it stands on."""
    found: list[Layer] = []
    above: str | None = image_id
    while above is not None:
        image = await world.find("image", above)
        for role in roles_of(disk, image):
            path = world.home.image(image["id"]) / image["files"][role]
            found.append(Layer(f"disk{disk}-image-{len(found)}", str(path), handed=image["kind"] in PRIVATE))
        above = image.get("base")
    return found


def roles_of(disk: int, image: Value) -> Iterator[str]:
    """The roles under which an image has the layers of a disk, the top one first."""
    for number in itertools.count():
        role = f"{role_of(disk)}-below{number}" if number else role_of(disk)
        if role not in image["files"]:
            return
        yield role


def role_of(disk: int) -> str:
    """The role under which an image has the base of a VM's disk."""
    return "disk" if disk == 0 else f"disk{disk}"


async def own_layers(world: World, vm_id: str) -> list[Value]:
    """All layers in the folder of a VM."""
    return [d.value for d in await world.store.list("layer/") if d.value["vm"] == vm_id]


async def clones_of(world: World, vm_id: str) -> list[str]:
    """Names of the VMs whose disks stand on layers of this one: its linked clones."""
    layers = {d.value["id"]: d.value for d in await world.store.list("layer/")}
    own = {layer["id"] for layer in layers.values() if layer["vm"] == vm_id}
    others = {layer["vm"] for layer in layers.values() if layer["vm"] != vm_id and layer["parent"] in own}
    return sorted(vm["name"] for vm in await world.vms() if vm["id"] in others)


async def linked_to(world: World, vm: Value) -> list[str]:
    """Names of the VMs that a linked clone shares layers with."""
    layers = {d.value["id"]: d.value for d in await world.store.list("layer/")}
    owners = {layers[layer]["vm"] for top in vm["disks"] for layer in lineage(layers, top)} - {vm["id"]}
    return sorted(other["name"] for other in await world.vms() if other["id"] in owners)


def layer_path(world: World, layer: Value) -> Path:
    """Where a layer's file lies on the host."""
    return world.home.vm(layer["vm"]) / file_name(layer)
