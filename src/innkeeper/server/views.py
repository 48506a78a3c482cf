"""How documents look from outside."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

from innkeeper.base.ids import natural_order
from innkeeper.host.usage import Used, used_by
from innkeeper.machine.machine import Machine
from innkeeper.machine.states import allowed_actions
from innkeeper.operations.chains import clones_of, linked_to
from innkeeper.operations.networks import cards
from innkeeper.operations.world import World
from innkeeper.store.contract import Document, Value


class VMViews:
    """VMs as the API shows them, each encoded once per change: a list of ten thousand is a join of what is there."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._encoded: dict[str, tuple[tuple[Any, ...], bytes]] = {}

    async def all(self, *, used: bool = False) -> bytes:
        """All VMs, by name, as a JSON list; `used`: with what each takes of the host's memory, some 3 ms for each."""
        documents = await self._world.store.list("vm/")
        images = await self._images()
        addresses = await self._addresses()
        rows = {d.value["name"]: self._row(d, images, addresses.get(d.value["id"])) for d in documents}
        if len(self._encoded) > len(documents):
            self._encoded = {d.value["id"]: self._encoded[d.value["id"]] for d in documents}
        for name, takes in (await self.used() if used else {}).items():
            if name in rows:
                rows[name] = rows[name][:-1] + b', "memory_used": ' + json.dumps(takes._asdict()).encode() + b"}"
        return b"[" + b",".join(rows[name] for name in sorted(rows, key=natural_order)) + b"]"

    async def used(self) -> dict[str, Used]:
        """What each running VM takes of the host's memory, by name."""
        pids = {machine.name: machine.process.pid.number for machine in self._world.machines.live()}
        return await asyncio.to_thread(lambda: {name: found for name, pid in pids.items() if (found := used_by(pid))})

    async def one(self, vm: Value) -> Value:
        """One VM, with what its disks take on the host."""
        address = (await self._addresses()).get(vm["id"])
        view = self._view(vm, self._world.machines.get(vm["id"]), await self._images(), address)
        used = await asyncio.to_thread(used_by, view["pid"]) if view["pid"] else None
        snapshots = [d for d in await self._world.store.list("snapshot/") if d.value["vm"] == vm["id"]]
        return view | {
            "disks": self._disks(vm),
            "memory_used": used._asdict() if used else None,
            "snapshots": sum(not snapshot.value["passing"] for snapshot in snapshots),
            "forked": vm["forked"],
            "cloned_from": (vm.get("cloned_from") or {}).get("name"),
            "linked_to": await linked_to(self._world, vm),
            "linked_clones": await clones_of(self._world, vm["id"]),
        }

    async def _images(self) -> dict[str, Value]:
        return {d.value["id"]: d.value for d in await self._world.store.list("image/")}

    async def _addresses(self) -> dict[str, str]:
        """Of the first card of each VM that has one."""
        told = self._world.outer_addresses.items()
        outside = [{"id": vm, "nic": index, "address": address} for (vm, index), address in told]
        found = sorted([*await cards(self._world), *outside], key=lambda card: -int(card["nic"]))
        return {card["id"]: card["address"] for card in found if card["address"]}

    def _row(self, document: Document, images: dict[str, Value], address: str | None) -> bytes:
        vm = document.value
        machine = self._world.machines.get(vm["id"])
        state = (
            document.revision,
            machine.status if machine else None,
            (vm["image"] or {}).get("id") in images,
            address,
        )
        known = self._encoded.get(vm["id"])
        if known is not None and known[0] == state:
            return known[1]
        text = json.dumps(self._view(vm, machine, images, address)).encode()
        self._encoded[vm["id"]] = (state, text)
        return text

    def _view(self, vm: Value, machine: Machine | None, images: dict[str, Value], address: str | None) -> Value:
        spec, identity = vm["spec"], vm["identity"]
        image = images.get(vm["image"]["id"]) if vm["image"] else None
        agent = machine is not None and machine.status.agent
        running = vm["state"] == "running"
        ssh_port = identity["ssh_port"]
        return {
            "id": vm["id"],
            "name": vm["name"],
            "state": vm["state"],
            "reason": vm["reason"],
            "since": vm["since"],
            "created": vm["created"],
            "image": image["name"] if image else None,
            "cpus": spec["cpus"],
            "memory": spec["memory"],
            "spec": spec,
            "operation": vm["operation"],
            "ready": running and (agent or not (image and image["agent"])),
            "agent": agent,
            "pending": vm["pending"],
            "pid": machine.process.pid.number if machine and not machine.process.ended.done() else None,
            "address": "127.0.0.1" if ssh_port else address,
            "ssh_port": ssh_port,
            "forwards": [forward for nic in spec["nics"] for forward in nic["publish"]],
            "user": user(vm, image),
            "disc": spec["iso"] if vm["disc"] else None,
            "machine": {
                "accelerator": identity["accelerator"],
                "type": identity["machine_type"],
                "cpu": identity["cpu_model"],
                "uuid": identity["uuid"],
                "macs": identity["macs"],
            },
            "allowed_actions": allowed_actions(vm["state"], vm["operation"]),
        }

    def _disks(self, vm: Value) -> list[Value]:
        folder = self._world.home.vm(vm["id"])
        return [
            {
                "name": f"disk{index}",
                "virtual_size": disk["size"],
                "stored_size": sum(_stored(path) for path in folder.glob(f"disk{index}-*.qcow2")),
            }
            for index, disk in enumerate(vm["spec"]["disks"])
        ]


def user(vm: Value, image: Value | None) -> str:
    """Who to log in as."""
    return vm["spec"]["first_boot"]["user"] or (image["user"] if image else "") or "root"


def _stored(path: Path) -> int:
    try:
        return path.stat().st_blocks * 512
    except OSError:
        return 0
