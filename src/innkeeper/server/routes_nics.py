"""The cards of a VM, and the host's ports that lead to them."""

from __future__ import annotations

from fastapi import APIRouter, Response
from fastapi.responses import JSONResponse

from innkeeper.network import macvtap, sriov
from innkeeper.operations import host_cards, vm_nics
from innkeeper.operations.networks import nics
from innkeeper.operations.world import World
from innkeeper.plan.devices import SSH
from innkeeper.plan.network import macvtap_name
from innkeeper.server.context import Ctx, VMName, accepted
from innkeeper.server.models import NicsRequest, NicView, OperationView, PortView
from innkeeper.spec.wiring import AddNic, SetNic
from innkeeper.store.contract import Value

router = APIRouter(prefix="/v1", tags=["networks"])


@router.get("/vms/{vm}/nics", response_model=list[NicView], summary="The network cards of a VM")
async def list_nics(ctx: Ctx, vm: VMName) -> Response:
    found = await ctx.world.find("vm", vm)
    plugged = {nic.index: nic for nic in await nics(ctx.world, found)}
    dropped = await ctx.world.fabric.dropped() if plugged else {}
    dropped |= await macvtap.dropped(found["id"], ctx.world.home.networks)
    functions = sriov.functions_of(found["id"], ctx.world.home.networks)
    views = []
    for index, (nic, mac) in enumerate(zip(found["spec"]["nics"], found["identity"]["macs"], strict=True)):
        if nic["mode"] != "absent":
            view = {"index": index, "mac": mac} | {key: nic.get(key) for key in ("mode", "network", "parent", "model")}
            view |= {"limit": nic.get("limit"), "link": nic.get("link", "up")}
            at = plugged.get(index)
            view |= {key: getattr(at, key, None) for key in ("address", "address6", "tap")}
            if nic["mode"] == "macvtap":
                view["tap"] = macvtap_name(found["id"], index)
            view |= {"backend": nic.get("backend", "qemu") if nic["mode"] == "user" else None}
            view |= {"vlan": nic.get("vlan"), "function": functions.get(index)}
            view["address"] = view["address"] or ctx.world.outer_addresses.get((found["id"], index))
            views.append(view | {"dropped": dropped.get(view["tap"], 0) if view["tap"] else None})
    return JSONResponse(views)


@router.post(
    "/vms/{vm}/nics", response_model=OperationView, status_code=202, summary="Change the cards of a VM, or their ports"
)
async def change_nics(ctx: Ctx, vm: VMName, body: NicsRequest) -> Response:
    found = await ctx.admitted(vm, "nics")
    vm_nics.check(found, body.change)
    if isinstance(body.change, AddNic):
        await host_cards.check(ctx.world, [body.change.nic])
    if isinstance(body.change, AddNic | SetNic):
        await ctx.have_default([body.change.nic if isinstance(body.change, AddNic) else body.change])
    target = {"kind": "vm", "id": found["id"], "name": found["name"]}
    args = vm_nics.arguments(body.change, body.by)
    return accepted(await ctx.engine.submit("vm-nics", target, args, hold=f"vm/{found['id']}"))


@router.get("/ports", response_model=list[PortView], summary="Every port of the host that leads into a VM, by port")
async def list_ports(ctx: Ctx) -> Response:
    await ctx.world.fabric.count()
    claims = {document.key: document.value for document in await ctx.world.store.list("port/")}
    views = [view for vm in await ctx.world.vms() for view in await _ports(ctx.world, vm, claims)]
    return JSONResponse(sorted(views, key=lambda view: (view["host"], view["protocol"], view["address"])))


async def _ports(world: World, vm: Value, claims: dict[str, Value]) -> list[Value]:
    plugged = {nic.index: nic for nic in await nics(world, vm)}
    views = []
    for index, nic in enumerate(vm["spec"]["nics"]):
        forwards = list(nic["publish"])
        if index == 0 and (port := vm["identity"]["ssh_port"]):
            forwards.append({"host": port, "guest": SSH, "protocol": "tcp", "address": "127.0.0.1", "note": "SSH"})
        at = plugged.get(index)
        for forward in forwards:
            claim = claims.get(f"port/{forward['protocol']}/{forward['host']}", {})
            seen = world.fabric.traffic.of(at.tap, forward["protocol"], forward["host"]) if at else None
            views.append(
                {"note": ""}
                | forward
                | {"vm": vm["name"], "nic": index, "network": nic["network"], "to": at.address if at else None}
                | {"by": claim.get("by", ""), "since": claim.get("since") or vm["created"]}
                | {key: getattr(seen, key, None) for key in ("packets", "bytes", "last")}
            )
    return views
