"""What every route gets handed: the host, the engine, the views."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Annotated, Any, cast

from fastapi import Depends, Path
from fastapi.responses import JSONResponse
from starlette.requests import HTTPConnection

from innkeeper.base.clock import now
from innkeeper.base.errors import ActionRefused, MachineBusy
from innkeeper.machine.console import Console
from innkeeper.machine.machine import Machine
from innkeeper.machine.states import admit
from innkeeper.operations.engine import Engine
from innkeeper.operations.network_default import ensure_default
from innkeeper.operations.world import World
from innkeeper.server.views import VMViews
from innkeeper.spec.nic import NicSpec
from innkeeper.spec.wiring import SetNic
from innkeeper.store.contract import Value


@dataclass
class Context:
    """One daemon."""

    world: World
    engine: Engine
    started: str = field(default_factory=now)
    consoles: dict[str, Console] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.views = VMViews(self.world)

    async def have_default(self, nics: Iterable[NicSpec | SetNic]) -> None:
        """Make the network `default` if one of the cards is to be in it and nobody has made it. Raises
        `NetworkFailed`."""
        await ensure_default(self.world, self.engine, [nic.network for nic in nics])

    async def machine(self, name: str, action: str) -> tuple[Value, Machine]:
        """The VM and its live machine, if its state admits `action` now. Raises `ActionRefused`, `NotFound`."""
        vm = await self.world.find("vm", name)
        answer = admit(vm["state"], action)
        machine = self.world.machines.get(vm["id"])
        if answer.answer == "refuse" or machine is None:
            raise ActionRefused(f"{vm['name']}: {answer.reason or 'no QEMU runs for it'}", hint=answer.hint)
        return vm, machine

    async def admitted(self, name: str, action: str, *, force: bool = False) -> Value:
        """The VM, if it takes `action` now. Raises `ActionRefused`, `MachineBusy`, `NotFound`."""
        vm = await self.world.find("vm", name)
        answer = admit(vm["state"], action, operation=vm["operation"], force=force)
        if answer.answer == "refuse":
            kind = MachineBusy if vm["operation"] else ActionRefused
            raise kind(f"{vm['name']}: {answer.reason}", hint=answer.hint, state=vm["state"])
        return vm

    async def act(self, name: str, action: str, args: dict[str, Any]) -> Value:
        """Submit `action` on a VM if it is admitted; with nothing to do, an operation that has ended well."""
        vm = await self.world.find("vm", name)
        force = bool(args.get("force"))
        answer = admit(vm["state"], action, operation=vm["operation"], force=force)
        if answer.answer == "refuse":
            kind = MachineBusy if vm["operation"] else ActionRefused
            raise kind(f"{vm['name']}: {answer.reason}", hint=answer.hint, state=vm["state"])
        target = {"kind": "vm", "id": vm["id"], "name": vm["name"]}
        if answer.answer == "nothing":
            return await self.engine.nothing(f"vm-{action}", target, answer.reason)
        if vm["operation"] and force:
            await self.engine.give_way(vm["operation"]["id"])
            if action == "delete" and await self.world.store.get(f"vm/{vm['id']}") is None:
                return await self.engine.nothing("vm-delete", target, "undoing its launch has removed it")
            return await self.act(vm["id"], action, args)
        try:
            return await self.engine.submit(f"vm-{action}", target, args, hold=f"vm/{vm['id']}")
        except MachineBusy:
            if not force:
                raise
            return await self.act(vm["id"], action, args)  # an operation has begun meanwhile, and gives way as well


async def _context(connection: HTTPConnection) -> Context:  # FastAPI calls what is not async in a thread
    return cast(Context, connection.app.state.context)


Ctx = Annotated[Context, Depends(_context)]
VMName = Annotated[str, Path(description="A VM's name or id", min_length=1, max_length=63, examples=["web-1"])]


def accepted(operation: Value) -> JSONResponse:
    """202 with the operation to follow."""
    return JSONResponse(operation, status_code=202, headers={"Location": f"/v1/operations/{operation['id']}"})
