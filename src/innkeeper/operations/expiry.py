"""What was made for a time: VMs and snapshots are deleted when it is over, and of snapshots there is notice before."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from datetime import UTC, datetime

from innkeeper.base.clock import now
from innkeeper.base.errors import InnkeeperError
from innkeeper.operations.chains import clones_of
from innkeeper.operations.engine import Engine
from innkeeper.operations.world import World
from innkeeper.store.contract import Value, update

EVERY = 2.0
"""Seconds between two looks."""
NOTICE = 86400.0
"""Seconds before the end of a snapshot at which it is said, or in the last quarter of a short life."""


async def expire(world: World, engine: Engine) -> None:
    """Runs for as long as the daemon does."""
    while True:
        with suppress(InnkeeperError):  # a store that fails, a name that is gone: it is tried again
            for vm in await world.vms():
                over = vm["expires"] and vm["expires"] <= now() and not vm["operation"]
                if over and not await clones_of(world, vm["id"]):
                    target = {"kind": "vm", "id": vm["id"], "name": vm["name"]}
                    with suppress(InnkeeperError):  # somebody else was quicker; or it is tried again
                        await engine.submit("vm-delete", target, {}, hold=f"vm/{vm['id']}")
                        await world.events.append("vm.expired", f"the time of {vm['name']} is over", target=target)
            for document in await world.store.list("snapshot/"):
                if document.value["expires"] and document.value["state"] == "whole":
                    with suppress(InnkeeperError):
                        await (_see_off if document.value["passing"] else _look_at)(world, engine, document.value)
        await asyncio.sleep(EVERY)


async def _look_at(world: World, engine: Engine, snapshot: Value) -> None:
    vm = await world.find("vm", snapshot["vm"])
    target = {"kind": "vm", "id": vm["id"], "name": vm["name"]}
    what = f"snapshot {snapshot['name']} of {vm['name']}"
    if snapshot["expires"] <= now():
        if not vm["operation"]:
            await engine.submit("snapshot-delete", target, {"snapshots": [snapshot["id"]]}, hold=f"vm/{vm['id']}")
            await world.events.append("snapshot.expired", f"the time of {what} is over: it is removed", target=target)
    elif not snapshot["noticed"] and _soon(snapshot):
        await update(world.store, f"snapshot/{snapshot['id']}", lambda s: s | {"noticed": True})
        text = f"{what} expires at {snapshot['expires']}: it is removed then, and what it holds is merged"
        await world.events.append("snapshot.expiring", text, target=target, level="warning")


async def _see_off(world: World, engine: Engine, snapshot: Value) -> None:
    """One that was taken for forks goes when those that wait for it have been made."""
    vm = await world.find("vm", snapshot["vm"])
    operations = [document.value for document in await world.store.list("operation/")]
    if vm["operation"] or any(not o["ended"] and o["args"].get("capture") == snapshot["passing"] for o in operations):
        return
    target = {"kind": "vm", "id": vm["id"], "name": vm["name"]}
    await engine.submit("snapshot-delete", target, {"snapshots": [snapshot["id"]]}, hold=f"vm/{vm['id']}")


def _soon(snapshot: Value) -> bool:
    begun, end = (datetime.fromisoformat(snapshot[field]) for field in ("created", "expires"))
    notice = min(NOTICE, (end - begun).total_seconds() / 4)
    return (end - datetime.now(UTC)).total_seconds() <= notice
