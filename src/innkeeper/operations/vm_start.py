"""Start a VM: admit it, prepare its folder, spawn QEMU, let the guest run."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from innkeeper.base.clock import now
from innkeeper.base.errors import ActionRefused, Conflict, NotFound, PortTaken, QemuFailed
from innkeeper.base.nofollow import open_file, write_file
from innkeeper.host.memory import check_memory
from innkeeper.machine.machine import Machine
from innkeeper.machine.states import LIVE
from innkeeper.network.ports import is_free, who_listens
from innkeeper.operations import host_cards
from innkeeper.operations.captured import captured, memory_path
from innkeeper.operations.chains import chain
from innkeeper.operations.engine import Context, Step, always
from innkeeper.operations.network_doctor import warn_before_boot
from innkeeper.operations.networks import plugged_in
from innkeeper.operations.vm_create import claim_ports, write_first_boot
from innkeeper.operations.world import World
from innkeeper.plan.command import Files, command
from innkeeper.plan.identity import Identity, on_accelerator
from innkeeper.plan.options import Plan
from innkeeper.plan.rebirth import forms, state_with
from innkeeper.qemu import cards
from innkeeper.qemu.ram import overwrite
from innkeeper.spec.image import Image
from innkeeper.spec.vm import VMSpec
from innkeeper.store.contract import Value, update


async def admit(ctx: Context) -> None:
    """Is there memory, are the ports free? Then the VM is `starting`."""
    vm = await _vm(ctx)
    if vm["state"] in LIVE - {"starting"} and ctx.world.machines.get(vm["id"]):
        raise ActionRefused(f"{vm['name']} is {vm['state']}")
    host = await ctx.world.host_with_qemu()
    if not ctx.args.get("force"):
        running = {m.id for m in ctx.world.machines.live()}
        promised = sum(
            max(0, _expected(v) - resident(ctx, v["id"])) for v in await ctx.world.vms() if v["id"] in running
        )
        check_memory(_expected(vm), host.memory, promised)
    await _check_ports(ctx)
    if ctx.kind != "vm-fork":  # which takes less time than such a look
        await warn_before_boot(ctx, vm)
    await _state(ctx, "starting")


async def _check_ports(ctx: Context) -> None:
    """Are they free? The one for SSH, which nobody chose, is exchanged if not. Raises `PortTaken`."""
    document = await ctx.world.store.get(f"vm/{_vm_id(ctx)}")
    assert document is not None
    vm = document.value
    for forward in (forward for nic in vm["spec"]["nics"] for forward in nic["publish"]):
        port, protocol, address = forward["host"], forward["protocol"], forward["address"]
        if not is_free(port, protocol, address):
            holder = who_listens(port, protocol, address) or "another program"
            raise PortTaken(
                f"host port {port}/{protocol} of {vm['name']} is in use by {holder}",
                hint="stop that program", port=port, holder=holder,
            )  # fmt: skip
    ssh_port = vm["identity"]["ssh_port"]
    if ssh_port is None or is_free(ssh_port, "tcp", "127.0.0.1"):
        return
    owner, spec = {"id": vm["id"], "name": vm["name"]}, VMSpec.model_validate(vm["spec"])
    _, other = await claim_ports(ctx, spec, owner, vm["identity"]["slot"])
    writes: dict[str, Value | None] = {
        document.key: vm | {"identity": vm["identity"] | {"ssh_port": other}},
        f"port/tcp/{ssh_port}": None,
        f"port/tcp/{other}": owner,
    }
    try:
        await ctx.world.store.transact(writes, {document.key: document.revision, f"port/tcp/{other}": 0})
    except Conflict:
        await _check_ports(ctx)


MOST_MEMORY = 1 << 50
"""Bytes of a saved memory: no limit but that of the host's disk."""
FORK_SHARE = 4
"""Of a fork's memory one part in so many is expected to become its own; the rest it goes on sharing."""


def _expected(vm: Value) -> int:
    """Bytes of RAM that a VM is expected to take from the host."""
    return int(vm["spec"]["memory"]) // (FORK_SHARE if vm["forked"] else 1)


def resident(ctx: Context, vm_id: str) -> int:
    """Bytes of RAM that a VM's QEMU holds now; 0 when it cannot be told."""
    machine = ctx.world.machines.get(vm_id)
    if machine is None:
        return 0
    try:
        with open(f"/proc/{machine.process.pid.number}/statm") as file:  # noqa: PTH123 - a hot little read
            return int(file.read().split()[1]) * os.sysconf("SC_PAGESIZE")
    except OSError:
        return 0


async def unadmit(ctx: Context) -> None:
    """Back to stopped."""
    try:
        await _state(ctx, "stopped")
    except NotFound:
        return  # it was being made in the same operation, and is gone again


async def spawn(ctx: Context) -> None:
    """QEMU runs, stopped before the guest's first instruction."""
    vm = await _vm(ctx)
    machine = ctx.world.machines.get(vm["id"])
    half_way = vm["going_on"] or (ctx.data.get("memory") and machine is not None and machine.status.state == "paused")
    if machine is not None and machine.status.state != "starting" and not half_way:
        return  # a daemon before this one came as far as letting it run
    try:
        await _start(ctx, vm)
    except QemuFailed as error:
        if "host forwarding rule" not in str(error.facts.get("stderr")):
            raise
        await _check_ports(ctx)  # somebody took one since they were looked at
        await _start(ctx, await _vm(ctx))


async def _start(ctx: Context, vm: Value) -> None:
    world = ctx.world
    if world.machines.get(vm["id"]):  # half-way: its end would take away what is opened now
        await world.machines.discard(vm["id"])
    async with host_cards.functions(world, vm) as functions:
        planned = await plan(ctx, vm, functions)
        async with plugged_in(world, vm, planned.taps) as taps:
            await _spawn(ctx, vm, planned, taps)


async def _spawn(ctx: Context, vm: Value, planned: Plan, taps: Sequence[int]) -> None:
    machine = await _begin(ctx, vm, planned, taps)
    for index, nic in enumerate(vm["spec"]["nics"]):
        if nic.get("link") == "down":
            await cards.set_link(machine.monitor, index, up=False)


async def _begin(ctx: Context, vm: Value, planned: Plan, taps: Sequence[int]) -> Machine:
    world = ctx.world
    if vm["going_on"]:
        return await _go_on(world, vm, planned, taps)
    machine = await world.machines.start(vm, planned, taps=taps)
    if saved := ctx.data.get("memory"):
        with open_file(memory_path(world, vm["id"], saved["snapshot"]), MOST_MEMORY) as file:
            await machine.load_memory(
                file.fileno(), saved["parts"], lambda fraction: ctx.report(fraction, "loading memory")
            )
    return machine


async def _go_on(world: World, vm: Value, planned: Plan, taps: Sequence[int]) -> Machine:
    found = await captured(world, vm["going_on"])
    try:
        ram = await world.ram.get(found.id, found.ram)
    except NotFound as error:  # of a passing snapshot there is only what a daemon before this one had
        raise ActionRefused(f"the memory that {vm['name']} was to go on from is gone: {error.detail}") from None
    nics = list(zip(found.macs, vm["identity"]["macs"], strict=True))
    state, new = state_with(found.state(ram), nics), forms(vm["identity"]["uuid"])

    async def load(machine: Machine) -> None:
        await machine.go_on_from(state, saved=found.devices is not None, agent=found.agent, waiter=bool(found.waits))
        overwrite(machine.process.pid.number, [(at, new[form]) for at, form in found.uuid_at])
        if found.parts:
            await machine.load_screen(ram, found.parts)

    return await world.machines.start(vm, planned, ram, load, taps)


async def kill(ctx: Context) -> None:
    """Undo of `spawn`."""
    if vm_id := _vm_id(ctx):
        await ctx.world.machines.discard(vm_id)


async def plan(ctx: Context, vm: Value, functions: Mapping[int, str]) -> Plan:
    """The QEMU command of this start. `functions`: the host's PCI devices that it gets, by card. Pins the CPU model
    anew if the host's accelerator has changed."""
    world = ctx.world
    host = await world.host_with_qemu()
    identity = on_accelerator(Identity.model_validate(vm["identity"]), host)
    if identity.model_dump(mode="json") != vm["identity"]:
        await update(world.store, f"vm/{vm['id']}", lambda v: v | {"identity": identity.model_dump(mode="json")})
    spec = VMSpec.model_validate(vm["spec"])
    folder = world.home.vm(vm["id"])
    if not vm["seed"] and not vm["going_on"]:
        vm = await _seed_of_its_own(ctx, vm)
    if spec.firmware == "uefi" and not (folder / "nvram.fd").exists():
        assert host.firmware.uefi is not None
        _fresh_variables(Path(host.firmware.uefi.vars), folder, identity.uid)
    image = await boot_image(world, vm)
    fork = await captured(world, vm["going_on"]) if vm["going_on"] else None
    files = Files(
        chains=[await chain(world, vm["id"], layer) for layer in vm["disks"]],
        kernel_dir=str(world.home.image(image.id)) if image else "",
        seed=fork.seed if fork else "seed.iso" if vm["seed"] else "",
        iso=vm["disc"],
        ignition=(folder / "ignition.json").exists(),
        ram=str(fork.ram) if fork else "",
        functions=functions,
    )
    saved = ctx.data.get("memory")
    as_fork, nat = (fork.as_fork, fork.nat) if fork else (saved["as_fork"], saved["nat"]) if saved else (False, ())
    return command(
        spec,
        identity,
        host,
        image,
        files,
        capturable=vm["capturable"],
        incoming=bool(saved),
        as_fork=as_fork,
        nat=nat,
    )


def _fresh_variables(template: Path, folder: Path, uid: int | None) -> None:
    with template.open("rb") as fresh:
        write_file(folder / "nvram.fd", fresh, uid)


async def _seed_of_its_own(ctx: Context, vm: Value) -> Value:
    """A fork or clone that boots for the first time: its cloud-init must find what it became, not what it was copied
    from."""
    image = await ctx.world.find("image", vm["image"]["id"]) if vm["image"] else None
    if not vm.get("identity_due") and not vm["forked"]:
        return vm
    await write_first_boot(ctx, vm, image)
    seed = ctx.world.home.vm(vm["id"]) / "seed.iso"
    if (uid := vm["identity"]["uid"]) is not None and seed.exists():
        os.chown(seed, uid, uid, follow_symlinks=False)
    return vm | {"seed": seed.exists()}


async def boot_image(world: World, vm: Value) -> Image | None:
    """What the VM's kernel comes from, where it is booted directly: its image, or the one below a captured one."""
    image = await world.find("image", vm["image"]["id"]) if vm["image"] else None
    while image is not None and image.get("base"):
        image = await world.find("image", image["base"])
    return Image.model_validate({key: image[key] for key in Image.model_fields if key in image}) if image else None


async def run(ctx: Context) -> None:
    """Let the guest go, if this operation still holds the VM (DESIGN.md 5.1)."""
    vm = await _vm(ctx)
    if (vm["operation"] or {}).get("id") != ctx.operation:
        raise ActionRefused(f"{vm['name']} is held by another operation", operation=vm["operation"])
    machine = ctx.world.machines.get(vm["id"])
    if machine is None:
        raise ActionRefused(f"the QEMU of {vm['name']} ended before its guest ran", hint="see inn logs and qemu.log")
    # A guest that goes on from saved memory counts as paused until it does; nobody else can have paused one that is
    # still held.
    saved = ctx.kind == "vm-fork" or ctx.data.get("memory")
    first = saved and machine.status.state == "paused" and not machine.status.reason
    if first and ctx.args.get("paused"):
        return
    if machine.status.state == "starting" or first:
        if vm["going_on"]:  # from here on its memory and its disk are one with nothing else: never again from there
            await update(ctx.world.store, f"vm/{vm['id']}", lambda v: v | {"going_on": ""})
        await machine.run()
        if ctx.kind != "vm-fork":  # whose guest has something else to do first
            await machine.poll_statistics()
        target = {"kind": "vm", "id": vm["id"], "name": vm["name"]}
        accelerator = "KVM" if ctx.world.verdict.name == "kvm" else "software emulation"
        await ctx.world.events.append("vm.started", f"{vm['name']} runs, on {accelerator}", target=target)
    ctx.result["vm"] = vm["name"]


def _vm_id(ctx: Context) -> str:
    return str(ctx.data.get("vm") or ctx.target.get("id") or "")


async def _vm(ctx: Context) -> Value:
    return await ctx.world.find("vm", _vm_id(ctx))


async def _state(ctx: Context, state: str) -> None:
    changed = {"state": state, "reason": "", "since": now(), "pending": False}
    key = f"vm/{_vm_id(ctx)}"
    await update(ctx.world.store, key, lambda vm: None if vm["state"] == state else vm | changed, synced=False)


STEPS = (
    Step("admit", admit, unadmit, unsynced=always),
    Step("spawn", spawn, kill, unsynced=always),
    Step("run", run),
)
