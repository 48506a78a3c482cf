"""Fork a warm image, or a VM that runs: a running copy of a captured guest, which is a machine of its own before anyone
can talk to it."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from innkeeper.base.errors import ActionRefused, AgentFailed, AgentUnavailable, Unsupported
from innkeeper.machine.machine import Machine
from innkeeper.operations import fork_of_vm, vm_create, vm_start
from innkeeper.operations.captured import Captured, captured
from innkeeper.operations.engine import Context, Step, Verb, always
from innkeeper.operations.rebirth import ALLOWED, heard, new_self, tell_agent
from innkeeper.operations.world import World
from innkeeper.plan.identity import misfit
from innkeeper.plan.rebirth import DONE, Rebirth
from innkeeper.plan.waiting import calls
from innkeeper.store.contract import Value

SUFFIX = "-warm"
"""A warm image is named after what it was made of."""


async def go_on(ctx: Context) -> None:
    """Let the guest go on, and change what it copied before anyone can talk to it. It is told who it is before it
    moves, so that nothing waits for anything else. A fork that stays somebody else is not let live."""
    world = ctx.world
    vm = await world.find("vm", ctx.data["vm"])
    found = await captured(world, f"snapshot/{ctx.data['snapshot']}" if _of_vm(ctx) else f"image/{vm['image']['id']}")
    machine = world.machines.get(vm["id"])
    if machine is None:
        raise ActionRefused(f"{vm['name']} ended before it was itself", hint="see its qemu.log")
    if found.agent:
        ctx.result["warnings"] = await _as_itself(ctx, vm, machine, found)
    else:
        await vm_start.run(ctx)
        target = {"kind": "vm", "id": vm["id"], "name": vm["name"]}
        text = f"{vm['name']} has no agent: hostname, machine-id, SSH host keys and MAC are still those of {found.name}"
        await world.events.append("vm.same-identity", text, target=target, level="warning")
        ctx.result["warnings"] = [text]
    await machine.poll_statistics()


async def _as_itself(ctx: Context, vm: Value, machine: Machine, found: Captured) -> list[str]:
    """What its guest remarks on having become somebody else."""
    who = await new_self(ctx.world, vm, list(zip(found.macs, vm["identity"]["macs"], strict=True)))
    telling = _tell(machine, found.waits, who)
    try:
        answer, _, _ = await asyncio.gather(telling, _greet(machine), vm_start.run(ctx))
    except (AgentUnavailable, AgentFailed) as error:
        raise AgentFailed(f"{vm['name']} could not be made a machine of its own: {error.detail}") from None
    return heard(vm, answer)


async def _tell(machine: Machine, waits: Sequence[str], who: Rebirth) -> str:
    """Through the port of what waits in the guest. That is told once: a daemon that comes later asks the agent."""
    if waits and machine.waiter is not None:
        try:
            told = calls(waits, who)
            return told.answer(await machine.waiter.ask(told.message(), DONE, ALLOWED))
        finally:
            machine.drop_waiter()
    return await tell_agent(machine, who)


async def _greet(machine: Machine) -> None:
    """Meanwhile the agent comes to its senses: the first answer is the slowest."""
    async with machine.agent():
        return


def warm_name(image: str) -> str:
    """What a warm image of this one is called, by default: of `web:2` it is `web-2-warm`."""
    return f"{image.replace(':', '-')}{SUFFIX}"


async def find_warm(world: World, name: str) -> Value:
    """The warm image of this name, or the one that was made of the image of this name. Raises `NotFound`,
    `Unsupported` for one that this host cannot go on from."""
    image = await world.find("image", name)
    if image["kind"] != "warm":
        pointer = await world.store.get(f"name/image/{warm_name(name)}")
        if pointer is None or pointer.value.get("pending"):
            raise ActionRefused(f"image {name} is not warm", hint=f"inn template warm {name} makes a warm one of it")
        image = await world.find("image", pointer.value["id"])
    if found := misfit(image["warm"], await world.host_with_qemu()):
        what, its, ours = found
        raise Unsupported(
            f"{image['name']} was captured with {what} {its}, and this host has {ours}",
            hint=f"inn template warm {image['warm']['image']} --refresh makes it anew",
        )
    return image


def _of_vm(ctx: Context) -> bool:
    return "capture" in ctx.args


def _nothing_to_wait_for(ctx: Context) -> bool:
    return not ctx.args.get("capture")


async def _claim(ctx: Context) -> None:
    await (fork_of_vm if _of_vm(ctx) else vm_create).claim(ctx)


async def _make_files(ctx: Context) -> None:
    await (fork_of_vm if _of_vm(ctx) else vm_create).make_files(ctx)


STEPS = (
    Step("wait", fork_of_vm.wait, idle=_nothing_to_wait_for),
    Step("claim", _claim, vm_create.unclaim, unsynced=always),
    Step("make-files", _make_files, vm_create.remove_files, unsynced=always),
    Step("settle", vm_create.settle, vm_create.unsettle, unsynced=always),
    *(step for step in vm_start.STEPS if step.do is not vm_start.run),
    Step("go-on", go_on, unsynced=always),  # `run` syncs
)
VERB = Verb("vm-fork", STEPS)
