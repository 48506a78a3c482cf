"""What a VM goes on from at its first start, instead of booting: the memory and devices of a warm image, or of a
snapshot of another VM."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from innkeeper.operations.world import World
from innkeeper.plan.devices import of_qemu
from innkeeper.plan.snapshot import memory_name
from innkeeper.spec.nic import NicSpec
from innkeeper.store.contract import Value


@dataclass(frozen=True)
class Captured:
    """`id` is what its RAM is known by (qemu/ram.py), `ram` the file of it."""

    id: str
    name: str
    ram: Path
    devices: Path | None
    """Their state; None where it is in `ram`, as `parts` says: bytes of RAM, screen and devices."""
    parts: Sequence[int]
    macs: Sequence[str]
    uuid_at: Sequence[tuple[int, int]]
    agent: bool
    waits: Sequence[str]
    """What a process in the guest holds open that waits to be told who it is (plan/waiting.py)."""
    as_fork: bool
    """It had the devices of one that was made to be captured (plan/command.py)."""
    nat: Sequence[int]
    """Cards of which there is the state of a NAT."""
    seed: str
    """The guest has read it already, and needs a device of the same size."""

    def state(self, ram: int) -> bytes:
        """Of the devices; `ram` is a descriptor of the copy of its RAM."""
        if self.devices is not None:
            return self.devices.read_bytes()
        memory, screen, devices = self.parts
        return os.pread(ram, devices, memory + screen)


async def captured(world: World, origin: str) -> Captured:
    """`origin` is the key of an image's or snapshot's document. Raises `NotFound`."""
    kind, _, found_id = origin.partition("/")
    found = await world.find(kind, found_id)
    return _of_image(world, found) if kind == "image" else _of_snapshot(world, found)


def _of_image(world: World, image: Value) -> Captured:
    folder, files, warm = world.home.image(image["id"]), image["files"], image["warm"]
    nat = [index for index, nic in enumerate(warm["spec"]["nics"]) if of_qemu(NicSpec.model_validate(nic))]
    return Captured(
        image["id"], image["name"], folder / files["ram"], folder / files["devices"], (), warm["macs"], warm["uuid_at"],
        image["agent"], _told(warm["waits"]), True, nat,
        str(folder / files["seed"]) if "seed" in files else "",
    )  # fmt: skip


def _of_snapshot(world: World, snapshot: Value) -> Captured:
    saved = snapshot["memory"]
    return Captured(
        snapshot["id"], snapshot["name"], memory_path(world, snapshot["vm"], snapshot["id"]), None, saved["parts"],
        snapshot["identity"]["macs"], saved["uuid_at"], saved["agent"], (), saved["as_fork"], saved["nat"],
        saved["seed"],
    )  # fmt: skip


def _told(waits: list[str] | bool) -> list[str]:
    """What waits in an image of an older version is told nothing: the agent does its work."""
    return waits if isinstance(waits, list) else []


def memory_path(world: World, vm_id: str, snapshot_id: str) -> Path:
    """The file of a snapshot's memory."""
    return world.home.vm(vm_id) / memory_name(snapshot_id)


async def seed_of(world: World, vm: Value) -> str:
    """The seed that a running VM has, as a path; empty for none. A fork has that of what it goes on from."""
    if vm["seed"]:
        return str(world.home.vm(vm["id"]) / "seed.iso")
    image = await world.find("image", vm["image"]["id"]) if vm["image"] else None
    if image is not None and image["kind"] == "warm":
        return _of_image(world, image).seed
    return str(vm["read_seed"])
