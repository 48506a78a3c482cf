"""The firewall rules of a VM, its tags, and what was denied."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

from fastapi import APIRouter, Response
from fastapi.responses import JSONResponse

from innkeeper.base.clock import stamp
from innkeeper.operations import vm_firewall
from innkeeper.plan.filter import COUNTED_AS, DEFAULTS
from innkeeper.server.context import Ctx, VMName, accepted
from innkeeper.server.models import DeniedView, FirewallRequest, FirewallView, OperationView
from innkeeper.spec.vm import VMSpec

router = APIRouter(prefix="/v1", tags=["networks"])


@router.get("/vms/{vm}/firewall", response_model=FirewallView, summary="The firewall rules of a VM, with what they did")
async def show_firewall(ctx: Ctx, vm: VMName) -> Response:
    found = await ctx.world.find("vm", vm)
    spec, judged = VMSpec.model_validate(found["spec"]), await ctx.world.fabric.judged(found["id"])
    rules = []
    for number, rule in enumerate(spec.firewall.rules, 1):
        packets, octets = judged.get(f"{COUNTED_AS}{number}", (0, 0))
        rules.append(rule.model_dump(mode="json") | {"number": number, "packets": packets, "bytes": octets})
    firewall = spec.firewall.model_dump(mode="json") | {"vm": found["name"], "tags": list(spec.tags), "rules": rules}
    defaults = {direction: judged.get(comment, (0, 0))[0] for direction, comment in DEFAULTS.items()}
    return JSONResponse(firewall | {"defaults": defaults})


@router.post(
    "/vms/{vm}/firewall", response_model=OperationView, status_code=202, summary="Change a VM's firewall rules or tags"
)
async def change_firewall(ctx: Ctx, vm: VMName, body: FirewallRequest) -> Response:
    found = await ctx.admitted(vm, "firewall")
    await vm_firewall.check(ctx.world, found, body.change)
    target = {"kind": "vm", "id": found["id"], "name": found["name"]}
    args = vm_firewall.arguments(body.change)
    return accepted(await ctx.engine.submit("vm-firewall", target, args, hold=f"vm/{found['id']}"))


@router.get("/vms/{vm}/firewall/log", response_model=list[DeniedView], summary="What a VM's rules denied within a day")
async def firewall_log(ctx: Ctx, vm: VMName) -> Response:
    found, now = await ctx.world.find("vm", vm), datetime.now(UTC)
    return JSONResponse(
        [
            {
                "nic": nic.index, "direction": attempt.direction, "protocol": attempt.protocol, "peer": attempt.peer,
                "name": name, "port": attempt.port, "packets": attempt.packets, "rule": rule,
                "last": stamp(now - timedelta(seconds=attempt.seconds)),
            }
            for nic, attempt, rule, name in await ctx.world.fabric.denied(found["id"])
        ]
    )  # fmt: skip
