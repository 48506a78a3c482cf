"""Networks."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Path, Query, Response
from fastapi.responses import JSONResponse

from innkeeper.operations.engine import busy
from innkeeper.operations.network_check import check
from innkeeper.operations.network_create import name_taken
from innkeeper.operations.network_delete import check_unused, users
from innkeeper.operations.network_doctor import examine
from innkeeper.plan.network import network_of
from innkeeper.server.context import Context, Ctx, VMName, accepted
from innkeeper.server.models import CheckRequest, CheckView, DoctorRequest, FindingView, NetworkView, OperationView
from innkeeper.spec.network import NetworkSpec
from innkeeper.store.contract import Value

router = APIRouter(prefix="/v1", tags=["networks"])
NetworkParam = Annotated[str, Path(description="A network's name or id", min_length=1, max_length=95)]


@router.get("/networks", response_model=list[NetworkView], summary="All networks, by name")
async def list_networks(ctx: Ctx) -> Response:
    views = [await _view(ctx, document.value) for document in await ctx.world.store.list("network/")]
    return JSONResponse(sorted(views, key=lambda view: str(view["name"])))


@router.get("/networks/{network}", response_model=NetworkView, summary="One network, and who is in it")
async def get_network(ctx: Ctx, network: NetworkParam) -> Response:
    return JSONResponse(await _view(ctx, await ctx.world.find("network", network)))


async def _view(ctx: Context, document: Value) -> Value:
    network = network_of(document)
    more = {"bridge": network.bridge, "gateway": network.gateway, "gateway6": network.gateway6}
    return document | more | {"cards": await users(ctx.world, network.id)}


@router.post("/networks", response_model=OperationView, status_code=202, summary="Make a network")
async def create_network(ctx: Ctx, body: NetworkSpec) -> Response:
    if await ctx.world.store.get(f"name/network/{body.name}"):
        raise name_taken(body.name)
    target = {"kind": "network", "id": None, "name": body.name}
    return accepted(await ctx.engine.submit("network-create", target, {"spec": body.model_dump(mode="json")}))


@router.get("/network-doctor", response_model=list[FindingView], summary="What is wrong with the host's network")
async def examine_networks(
    ctx: Ctx, network: Annotated[str | None, Query(description="Of this one only", min_length=1, max_length=95)] = None
) -> Response:
    return JSONResponse([finding.document() for finding in await examine(ctx.world, network)])


@router.post("/network-doctor", response_model=list[FindingView], summary="The same, and put right what is safe to")
async def fix_networks(ctx: Ctx, body: DoctorRequest) -> Response:
    return JSONResponse([finding.document() for finding in await examine(ctx.world, body.network, fix=True)])


@router.post(
    "/vms/{vm}/network-check", response_model=CheckView, summary="Follow a connection from a guest to a target"
)
async def check_network(ctx: Ctx, vm: VMName, body: CheckRequest) -> Response:
    found, machine = await ctx.machine(vm, "exec")
    hops = await check(ctx.world, found, machine, body.host, body.port, body.protocol)
    reached = hops[-1].passed if hops[-1].name == "target" else False
    return JSONResponse({"vm": found["name"], "reached": reached, "hops": [hop.document() for hop in hops]})


@router.delete("/networks/{network}", response_model=OperationView, status_code=202, summary="Delete a network")
async def delete_network(ctx: Ctx, network: NetworkParam) -> Response:
    found = await ctx.world.find("network", network)
    if found["operation"]:
        raise busy(f"network {found['name']}", found["operation"])
    await check_unused(ctx.world, found)
    target = {"kind": "network", "id": found["id"], "name": found["name"]}
    return accepted(await ctx.engine.submit("network-delete", target, {}, hold=f"network/{found['id']}"))
