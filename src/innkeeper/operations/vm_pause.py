"""Stop a VM's vCPUs, or let them go on."""

from __future__ import annotations

from innkeeper.base.errors import ActionRefused
from innkeeper.machine.machine import Machine
from innkeeper.operations.engine import Context, Step, Verb


async def pause(ctx: Context) -> None:
    """Its RAM stays; nothing runs."""
    await _machine(ctx).pause()


async def resume(ctx: Context) -> None:
    """It goes on where it was."""
    await _machine(ctx).run()


def _machine(ctx: Context) -> Machine:
    machine = ctx.world.machines.get(ctx.target["id"])
    if machine is None:
        raise ActionRefused(f"{ctx.target['name']} is not running", hint="inn start starts it")
    return machine


PAUSE = Verb("vm-pause", (Step("pause", pause, resume),))
RESUME = Verb("vm-resume", (Step("resume", resume),))
