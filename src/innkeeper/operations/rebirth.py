"""A guest that is a copy of another becomes a machine of its own, through its agent, as `plan/rebirth.py` tells it:
a fork before anyone can talk to it, a clone when it starts for the first time."""

from __future__ import annotations

import secrets
import time
from collections.abc import Sequence

from innkeeper.base.errors import AgentFailed
from innkeeper.machine.machine import Machine
from innkeeper.operations import vm_launch, vm_start
from innkeeper.operations.engine import Context, Step, Verb
from innkeeper.operations.networks import places
from innkeeper.operations.world import World
from innkeeper.plan.rebirth import Rebirth, shell_script, understood
from innkeeper.plan.seed import HostKey
from innkeeper.qemu.agent_exec import capture
from innkeeper.store.contract import Value, update

POLL = 0.01
"""Seconds between two looks whether it has: somebody waits for each of them."""
ALLOWED = 60.0
"""Seconds that the guest gets to become itself."""


async def new_self(world: World, vm: Value, nics: Sequence[tuple[str, str]]) -> Rebirth:
    """Who a guest becomes. `nics` are the (old, new) MACs of cards that it has had since before."""
    now = await places(world, vm) if nics else {}
    secret = await world.store.get(f"secret/vm/{vm['id']}")
    assert secret is not None
    return Rebirth(
        name=vm["name"],
        machine_id=secrets.token_hex(16),
        host_key=HostKey(**secret.value["host_key"]),
        nics=list(nics),
        seed=secrets.token_bytes(64),
        seconds=time.time(),
        places={old: now[new] for old, new in nics if new in now},
    )


async def tell_agent(machine: Machine, who: Rebirth) -> str:
    """Have the agent change what the guest copied; what it says to that. Raises `AgentFailed`, `AgentUnavailable`."""
    async with machine.agent() as agent:
        script = shell_script(who).encode()
        _, said, wrong = await capture(agent, ["/bin/sh", "-s"], stdin=script, timeout=ALLOWED, poll=POLL)
    return (wrong + said).decode(errors="replace")


def heard(vm: Value, answer: str) -> list[str]:
    """What the guest remarked. Raises `AgentFailed` when it has not become itself."""
    notes, complaints = understood(answer)
    if complaints:
        said = "; ".join(complaints)[:1000]
        raise AgentFailed(f"{vm['name']} could not be made a machine of its own: {said}")
    return notes


async def at_first_start(ctx: Context) -> None:
    """Of a clone: once its guest is up. What it has from its own seed by then (hostname, host key) is not changed by
    this; its machine-id is. A clone where it failed goes on running, and its next start tries again."""
    world = ctx.world
    vm = await world.find("vm", ctx.target["id"])
    if not vm.get("identity_due"):
        return
    image = await world.find("image", vm["image"]["id"]) if vm["image"] else None
    if image is None or not image["agent"]:
        same = "machine-id is" if image and image["cloud_init"] else "hostname, machine-id and SSH host keys are"
        text = f"{vm['name']} has no agent that Innkeeper knows of: its {same} still as they were in the VM it is of"
        await world.events.append("vm.same-identity", text, target=dict(ctx.target), level="warning")
        ctx.result["warnings"] = list(dict.fromkeys([*ctx.result.get("warnings", ()), text]))
    else:
        await vm_launch.wait_until_ready(ctx)
        if (machine := world.machines.get(vm["id"])) is None:
            raise AgentFailed(
                f"{vm['name']} ended before it was a machine of its own", hint="its next start tries again"
            )
        heard(vm, await tell_agent(machine, await new_self(world, vm, [])))
    await update(world.store, f"vm/{vm['id']}", lambda v: v | {"identity_due": False})


FIRST_START = Step("first-start", at_first_start, keep=True)
START = Verb("vm-start", (*vm_start.STEPS, FIRST_START))
