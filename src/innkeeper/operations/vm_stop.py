"""Stop a VM: ask its system to shut down and wait, or with force pull the plug."""

from __future__ import annotations

import asyncio
from time import monotonic

from innkeeper.base.clock import now
from innkeeper.base.errors import BootTimeout, QmpFailed
from innkeeper.machine.states import LIVE
from innkeeper.operations.engine import Context, Step, Verb
from innkeeper.store.contract import update

DEFAULT_TIMEOUT = {"kvm": 60.0, "tcg": 120.0}
"""Seconds that a guest gets to shut down; emulated ones are slower."""
ASK_AGAIN = 15.0
"""Seconds between two requests: a guest that is still booting ignores the first."""


class ShutdownTimeout(BootTimeout):
    """The guest did not shut down in time; it is still running."""


async def mark(ctx: Context) -> None:
    """The VM is `stopping`, which QEMU itself cannot tell before its end."""
    machine = ctx.world.machines.get(ctx.target["id"])
    if machine is not None:
        await _mark(ctx, "stopping")


async def unmark(ctx: Context) -> None:
    """It goes on as it was."""
    machine = ctx.world.machines.get(ctx.target["id"])
    if machine is not None and machine.status.state in ("running", "paused"):
        await _mark(ctx, machine.status.state)


async def _mark(ctx: Context, state: str) -> None:
    stamp = now()
    await update(
        ctx.world.store,
        f"vm/{ctx.target['id']}",
        lambda vm: None if vm["state"] == state else vm | {"state": state, "since": stamp},
    )


async def shut_down(ctx: Context) -> None:
    """Wait for QEMU's end, which the machine's owner records."""
    machine = ctx.world.machines.get(ctx.target["id"])
    if machine is None:
        await _ended_unseen(ctx)
        return
    if ctx.args.get("force"):
        await machine.quit()
        return
    allowed = ctx.args.get("timeout") or DEFAULT_TIMEOUT[ctx.world.verdict.name]
    begun = asked = monotonic()
    await machine.power_down()
    while not machine.over.done():
        waited = monotonic() - begun
        if waited > allowed:
            raise ShutdownTimeout(
                f"{machine.name} did not shut down within {allowed:.0f} s and is still running",
                hint=f"inn logs {machine.name} shows what it does; inn stop --force pulls the plug",
            )
        if monotonic() - asked > ASK_AGAIN:
            asked = monotonic()
            try:
                await machine.power_down()
            except QmpFailed:
                continue  # it ends in this moment
        ctx.report(None, f"waiting for the guest to shut down, {waited:.0f} s")
        await asyncio.wait({machine.over}, timeout=0.5)


async def _ended_unseen(ctx: Context) -> None:
    """QEMU is gone and no owner is left to say so: it ended while the daemon was away."""
    ended = {"state": "stopped", "reason": "QEMU ended while no daemon was looking", "since": now()}
    await update(ctx.world.store, f"vm/{ctx.target['id']}", lambda vm: vm | ended if vm["state"] in LIVE else None)


STEPS = (
    Step("mark", mark, unmark),
    Step("shut-down", shut_down),
)
VERB = Verb("vm-stop", STEPS)
