"""Warm an image: boot it, wait until its guest is ready, capture memory, devices and disk as an image of their own."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path
from time import monotonic

from innkeeper.base.errors import ActionRefused, AgentFailed, BootTimeout
from innkeeper.base.nofollow import take_file
from innkeeper.machine.machine import Machine
from innkeeper.operations import image_make, vm_launch
from innkeeper.operations.chains import own_layers, role_of
from innkeeper.operations.engine import Context, Step, Verb
from innkeeper.operations.networks import behind_nat
from innkeeper.operations.vm_create import discard_folder, forget
from innkeeper.plan.chain import file_name
from innkeeper.plan.rebirth import before_capture, forms
from innkeeper.plan.waiting import HELLO, WAIT
from innkeeper.qemu import aside
from innkeeper.qemu.agent_exec import capture as run_in_guest
from innkeeper.store.contract import Value

PATIENCE = 20.0
"""Seconds that the process in the guest gets to say that it waits."""
AGAIN = 1.0
"""Seconds between two tries of the command that has to end well."""


async def prepare(ctx: Context) -> None:
    """Wait for the user's condition; leave nothing in the guest that its forks must not share."""
    vm, image = await _vm(ctx), await _image(ctx)
    machine = ctx.world.machines.get(vm["id"])
    if machine is None:
        raise ActionRefused(f"{vm['name']} ended before it could be captured", hint=f"inn logs {vm['name']}")
    if not image["agent"]:
        return
    allowed = ctx.args.get("timeout") or vm_launch.DEFAULT_TIMEOUT[ctx.world.verdict.name]
    begun = monotonic()
    while until := ctx.args["until"]:
        ctx.report(None, "waiting for the condition")
        async with machine.agent() as agent:
            ended, said, complaints = await run_in_guest(agent, ["/bin/sh", "-c", until], timeout=allowed)
        if ended.status == 0:
            break
        if monotonic() - begun > allowed:
            output = (said + complaints).decode(errors="replace").strip()[-1000:]
            raise BootTimeout(f"«{until}» did not end well within {allowed:.0f} s; it printed: {output or 'nothing'}")
        await asyncio.sleep(AGAIN)
    async with machine.agent() as agent:
        script = before_capture(behind_nat(vm)).encode()
        await run_in_guest(agent, ["/bin/sh", "-s"], stdin=script, timeout=allowed)


async def capture(ctx: Context) -> None:
    """Stop the guest for good; its devices, memory and disks are in the workspace then."""
    world, vm, image = ctx.world, await _vm(ctx), await _image(ctx)
    folder, workspace = world.home.vm(vm["id"]), world.home.workspace(ctx.operation)
    devices = workspace / "devices"
    if not devices.exists():
        machine = world.machines.get(vm["id"])
        if machine is None:
            raise ActionRefused(f"{vm['name']} ended before it was captured", hint="try again")
        await image_make.new_workspace(ctx)
        ctx.report(None, "capturing")
        ctx.data["waits"] = await _leave_waiter(machine) if image["agent"] else []
        await ctx.save()
        await machine.capture(staged := workspace / "devices.new")
        await world.machines.discard(vm["id"])
        staged.rename(devices)
    files = {"devices": "devices", "ram": "ram"}
    for layer in await own_layers(world, vm["id"]):
        role = role_of(layer["disk"])
        files[role] = f"{role}.qcow2"
        _take(folder / file_name(layer), workspace / files[role])
    for role, name in (("ram", "ram"), ("nvram", "nvram.fd"), ("seed", "seed.iso")):
        if (folder / name).exists() or (workspace / name).exists():
            files[role] = name
            _take(folder / name, workspace / name)
    identity, qemu = vm["identity"], world.qemu
    ctx.report(None, "looking through its memory")
    with (workspace / "ram").open("rb") as ram:
        uuid_at = await aside.find(ram.fileno(), forms(identity["uuid"]))
    ctx.data["image_fields"] = {
        "kind": "warm", "files": files, "format": "qcow2", "virtual_size": image["virtual_size"], "user": image["user"],
        "agent": image["agent"], "cloud_init": image["cloud_init"], "min_memory": image["min_memory"],
        "base": image["id"],
        "warm": {
            "image": image["name"], "spec": vm["spec"], "machine_type": identity["machine_type"],
            "accelerator": identity["accelerator"], "cpu_model": identity["cpu_model"],
            "qemu": qemu.version if qemu else "",
            "waits": ctx.data["waits"], "uuid": identity["uuid"], "uuid_at": uuid_at,
            "macs": identity["macs"],
        },
        "source": {"image": image["name"], "digests": image["digests"], "until": ctx.args["until"] or ""},
    }  # fmt: skip


async def _leave_waiter(machine: Machine) -> list[str]:
    """Start in the guest what its forks tell who they are; what it holds open. Connected first: without a host it would
    see the end."""
    port = await machine.dial_waiter()
    async with machine.agent() as agent:
        ended, _, _ = await run_in_guest(agent, ["/bin/sh", "-s"], stdin=WAIT.encode())
    if ended.status != 0:
        return []
    try:
        return (await port.ask(b"", HELLO, PATIENCE)).splitlines()[:-1]
    except AgentFailed:
        return []


def _take(source: Path, target: Path) -> None:
    """Unless that is done already."""
    if os.path.lexists(source):
        take_file(source, target)


async def forget_vm(ctx: Context) -> None:
    """The VM that it was has no files any more, and what was captured needs none."""
    discard_folder(ctx, ctx.data["vm"])
    await forget(ctx, ctx.data["vm"])


async def _vm(ctx: Context) -> Value:
    return await ctx.world.find("vm", ctx.data["vm"])


async def _image(ctx: Context) -> Value:
    vm = await _vm(ctx)
    return await ctx.world.find("image", vm["image"]["id"])


# What is undone includes the VM, so none of its steps may end the operation without undoing.
_LAUNCH = tuple(Step(f"boot: {step.name}", step.do, step.undo) for step in vm_launch.STEPS)
STEPS = (
    image_make.CLAIM,
    *_LAUNCH,
    Step("prepare", prepare),
    Step("capture", capture, image_make.remove_workspace),
    Step("forget", forget_vm),
    *image_make.PUBLISH,
)
VERB = Verb("template-warm", STEPS)
