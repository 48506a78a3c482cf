"""VMs that were made for a time: deleted when it is over."""

from __future__ import annotations

import asyncio
from contextlib import suppress

from innkeeper.base.clock import now
from innkeeper.base.errors import InnkeeperError
from innkeeper.operations.engine import Engine
from innkeeper.operations.world import World

EVERY = 5.0
"""Seconds between two looks."""


async def expire(world: World, engine: Engine) -> None:
    """Runs for as long as the daemon does."""
    while True:
        for vm in await world.vms():
            if vm["expires"] and vm["expires"] <= now() and not vm["operation"]:
                target = {"kind": "vm", "id": vm["id"], "name": vm["name"]}
                with suppress(InnkeeperError):  # somebody else was quicker; or it is tried again
                    await engine.submit("vm-delete", target, {}, hold=f"vm/{vm['id']}")
                    await world.events.append("vm.expired", f"the time of {vm['name']} is over", target=target)
        await asyncio.sleep(EVERY)
