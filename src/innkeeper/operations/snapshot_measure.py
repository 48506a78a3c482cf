"""Measure what the layers of a snapshot cost who reads through them (storage/measure.py).

An operation, since it holds the VM: nothing may be merged into a layer while a tool reads it.
"""

from __future__ import annotations

from innkeeper.base.errors import ActionRefused
from innkeeper.operations.chains import chain
from innkeeper.operations.engine import Context, Step, Verb
from innkeeper.plan.chain import Chain
from innkeeper.storage.measure import read_cost


async def measure(ctx: Context) -> None:
    """Each disk in turn; `result["disks"]` has {layers, through, alone}, seconds for a read, or None for a disk without
    data."""
    world = ctx.world
    vm, snapshot = await world.find("vm", ctx.target["id"]), await world.find("snapshot", ctx.args["snapshot"])
    if snapshot["state"] != "whole":
        raise ActionRefused(f"snapshot {snapshot['name']} is being removed")
    found = []
    for number, top in enumerate(snapshot["disks"]):
        ctx.report(number / len(snapshot["disks"]), "reading")
        layers = _readable(await chain(world, vm["id"], top, absolute=True))
        cost = await read_cost(layers, user=vm["identity"]["uid"], job=ctx.operation)
        found.append(vars(cost) if cost else None)
    ctx.result |= {"snapshot": snapshot["name"], "disks": found}


def _readable(layers: Chain) -> Chain:
    """Those from the top down that the VM's own user may open: what only the daemon may, is not read here."""
    handed = [number for number, layer in enumerate(layers) if layer.handed]
    return layers[handed[-1] + 1 :] if handed else layers


VERB = Verb("snapshot-measure", (Step("measure", measure),))
