"""Make, start, and wait until the guest is ready to be used."""

from __future__ import annotations

import asyncio
import io
import json
import re
from collections import deque
from pathlib import Path
from time import monotonic
from typing import Any

from innkeeper.base.errors import AgentFailed, AgentUnavailable, BootTimeout
from innkeeper.base.nofollow import write_file
from innkeeper.machine.machine import Machine
from innkeeper.machine.serial_log import read
from innkeeper.operations import vm_create, vm_start
from innkeeper.operations.engine import Context, Step, Verb
from innkeeper.qemu.agent import Agent
from innkeeper.qemu.agent_files import read_file
from innkeeper.store.contract import Value

DEFAULT_TIMEOUT = {"kvm": 300.0, "tcg": 900.0}
"""Seconds from start to ready."""
LOOK_EVERY = 0.5
_SEQUENCES = re.compile(r"\x1b(?:\[[0-?]*[ -/]*[@-~]|[ -/]*[0-~])")
"""What moves a terminal's cursor or clears it (ECMA-48, 5.4): firmware and boot loaders print little else."""
CLOUD_INIT_RESULT = "/run/cloud-init/result.json"
"""Written when cloud-init has done everything (cloud-init documentation, «Files»)."""


async def wait_until_ready(ctx: Context) -> None:
    """The agent answers and cloud-init is through. Without an agent in the image nobody can tell: no waiting."""
    vm_id = ctx.data.get("vm") or ctx.target["id"]
    vm = await ctx.world.find("vm", vm_id)
    image = await ctx.world.find("image", vm["image"]["id"]) if vm["image"] else None
    if image is None or not image["agent"] or not ctx.args.get("wait", True):
        return
    machine = ctx.world.machines.get(vm_id)
    allowed = ctx.args.get("timeout") or DEFAULT_TIMEOUT[ctx.world.verdict.name]
    begun = monotonic()
    while True:
        if machine is None or machine.over.done():
            vm = await ctx.world.find("vm", vm_id)
            raise await _failure(ctx, vm, f"{vm['name']} ended before it was ready: {vm['reason']}", None)
        try:
            problems = await _ready(machine, image)
        except (AgentUnavailable, AgentFailed):
            problems = None
        if problems is not None:
            break
        waited = monotonic() - begun
        if waited > allowed:
            raise await _failure(ctx, vm, f"{vm['name']} was not ready within {allowed:.0f} s", machine)
        ctx.report(None, await _last_line(machine.folder) or "the guest boots")
        await asyncio.wait({machine.over}, timeout=LOOK_EVERY)
    target = {"kind": "vm", "id": vm["id"], "name": vm["name"]}
    seconds = monotonic() - begun
    await ctx.world.events.append("vm.ready", f"{vm['name']} is ready after {seconds:.1f} s", target=target)
    for problem in problems:
        text = f"{vm['name']}: cloud-init says: {problem}"
        await ctx.world.events.append("vm.cloud-init", text, target=target, level="warning")
    ctx.result["warnings"] = list(dict.fromkeys([*ctx.result.get("warnings", ()), *problems]))


async def _ready(machine: Machine, image: Value) -> list[str] | None:
    """None while it is not; then what cloud-init complains about."""
    if not machine.status.agent:
        return None
    async with machine.agent() as agent:
        await agent.ping()
        return await _cloud_init(agent) if image["cloud_init"] else []


async def _cloud_init(agent: Agent) -> list[str] | None:
    try:
        text = b"".join([block async for block in read_file(agent, CLOUD_INIT_RESULT)])
    except AgentFailed:
        return None  # not there yet
    try:
        result: dict[str, Any] = json.loads(text)
        return [str(error) for error in result["v1"]["errors"]]
    except (ValueError, KeyError, TypeError):
        return ["result.json cannot be read"]


async def _failure(ctx: Context, vm: Value, what: str, machine: Machine | None) -> BootTimeout:
    folder = ctx.world.home.vm(vm["id"])
    lines = [line async for line in _lines(folder)]
    picture = ""
    if machine is not None:
        path = folder / "boot-failure.png"
        try:
            write_file(path, io.BytesIO(await machine.screenshot()))
            picture = f"; its screen is in {path}"
        except Exception:
            picture = ""
    return BootTimeout(
        f"{what}. Its last console lines:\n" + ("\n".join(lines) or "(nothing was printed)") + picture,
        hint=f"inn console {vm['name']} to look inside; it was left as it is. --no-wait does not wait",
        screenshot=picture.removeprefix("; its screen is in "),
    )


async def _lines(folder: Path) -> Any:
    kept: deque[str] = deque(maxlen=10)
    async for block in read(folder / "serial.log", tail=10, follow=False):
        lines = _SEQUENCES.sub("", block.decode(errors="replace")).splitlines()
        kept.extend(line.strip() for line in lines if line.strip())
    for line in kept:
        yield line


async def _last_line(folder: Path) -> str:
    line = ""
    async for found in _lines(folder):
        line = found
    return "".join(c for c in line if c.isprintable())[:100]


STEPS = (*vm_create.STEPS, *vm_start.STEPS, Step("wait-until-ready", wait_until_ready, keep=True))
VERB = Verb("vm-launch", STEPS)
