"""Warm images and their forks."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from time import monotonic

from fastapi import APIRouter, Response
from fastapi.responses import JSONResponse

from innkeeper.base.clock import stamp
from innkeeper.base.errors import ActionRefused, InvalidInput, MachineBusy, NameTaken, NotFound
from innkeeper.operations import fork_of_vm, snapshot_create
from innkeeper.operations.host_cards import check_saved
from innkeeper.operations.network_default import ensure_default
from innkeeper.operations.snapshot_memory import check_fits, check_memory
from innkeeper.operations.snapshots import check_new, find_snapshot
from innkeeper.operations.vm_create import arguments
from innkeeper.operations.vm_fork import find_warm, warm_name
from innkeeper.plan.clone import plugged_into
from innkeeper.server.context import Context, Ctx, accepted
from innkeeper.server.models import ForkRequest, ForkView, OperationView, WarmRequest
from innkeeper.server.routes_vms import check
from innkeeper.spec.vm import VMSpec
from innkeeper.store.contract import Value

router = APIRouter(prefix="/v1", tags=["forks"])
TIDYING, LOOK_EVERY = 60.0, 0.05
"""Seconds for which a fork of a VM waits that is being tidied up, and between two looks."""
LONGEST = 3600.0
"""Seconds after which a snapshot that was taken for forks goes, whatever has become of them."""


@router.post("/images/warm", response_model=OperationView, status_code=202, summary="Make a warm image, to fork")
async def warm(ctx: Ctx, body: WarmRequest) -> Response:
    image = await ctx.world.find("image", body.image)
    if image["kind"] == "warm":
        raise InvalidInput(f"image {image['name']} is warm itself", hint=f"inn template warm {image['warm']['image']}")
    if body.spec.image != body.image:
        raise InvalidInput("the spec is of another image", field="spec.image")
    if not body.spec.disks and image["kind"] == "disk":
        raise InvalidInput(f"image {image['name']} boots from a disk, and the spec has none", field="spec.disks")
    if any(nic.publish for nic in body.spec.nics):
        raise InvalidInput("a host port leads to one VM only, so forks cannot publish one", field="spec.nics")
    name = body.name or warm_name(body.image)
    if not body.refresh and await ctx.world.store.get(f"name/image/{name}"):
        raise NameTaken(f"there is an image named {name!r} already", hint="--refresh makes it anew")
    check_saved(body.spec, body.spec.name, "it cannot be captured")
    await check(ctx.world, body.spec)
    await ctx.have_default(body.spec.nics)
    args = arguments(
        body.spec, "template-warm", how="warm", replace=body.refresh, until=body.until, timeout=body.timeout,
        capturable=True,
    )  # fmt: skip
    target = {"kind": "image", "id": None, "name": name}
    return accepted(await ctx.engine.submit("template-warm", target, args))


@router.post(
    "/forks", response_model=ForkView, status_code=202, summary="Fork a warm image or a VM, once or many times"
)
async def fork(ctx: Ctx, body: ForkRequest) -> Response:
    if doubled := next((name for name in body.names if body.names.count(name) > 1), None):
        raise InvalidInput(f"{doubled!r} is named twice", field="names")
    for name in body.names:
        if await ctx.world.store.get(f"name/vm/{name}"):
            raise NameTaken(f"there is a VM named {name!r} already", hint="choose another --name", name=name)
    source = await _source(ctx, body)
    await _check_network(ctx, source, body)
    more: Value = {"force": body.force, "expires": _in(body.ttl) if body.ttl else None}
    if "warm" in source:
        spec = source["warm"]["spec"] | {"image": source["name"]}
        spec["nics"] = plugged_into(spec["nics"], body.network)
        wishes = [arguments(VMSpec.model_validate(spec | {"name": name}), "vm-fork", **more) for name in body.names]
    else:
        more |= await (_found if body.snapshot else _capture)(ctx, source, body)
        wishes = [fork_of_vm.arguments(name, network=body.network, **more) for name in body.names]
    operations = [
        await ctx.engine.submit("vm-fork", {"kind": "vm", "id": None, "name": name}, wish)
        for name, wish in zip(body.names, wishes, strict=True)
    ]
    return JSONResponse({"operations": [operation["id"] for operation in operations]}, status_code=202)


async def _source(ctx: Context, body: ForkRequest) -> Value:
    """The warm image that is meant, or the VM; the image comes first where both have the name. Raises `NotFound`,
    `ActionRefused` for an image that is not warm."""
    if body.snapshot:
        return await ctx.world.find("vm", body.source)
    try:
        return await find_warm(ctx.world, body.source)
    except (NotFound, ActionRefused) as error:
        with suppress(NotFound):
            return await ctx.world.find("vm", body.source)
        if isinstance(error, ActionRefused):
            raise
    raise NotFound(
        f"there is no image and no VM {body.source!r}", hint="inn image ls and inn ls show what there is",
        name=body.source,
    )  # fmt: skip


async def _check_network(ctx: Context, source: Value, body: ForkRequest) -> None:
    """Raises `NotFound`, `InvalidInput`, `ActionRefused` where forks cannot come into the network."""
    warm = source.get("warm")
    if not warm:
        check_saved(source["spec"], source["name"], "it cannot be forked")
    nics = plugged_into((warm or source)["spec"]["nics"], body.network)
    if outside := next((nic["parent"] for nic in nics if nic.get("parent")), None):
        raise ActionRefused(
            f"{source['name']} has a card on {outside}, where the network outside gives addresses: forks would go on"
            " with its address",
            hint=f"inn clone {source['name']} boots anew; or fork it with --network default",
        )
    if not any(nic.get("network") for nic in nics):
        return
    await ensure_default(ctx.world, ctx.engine, [nic.get("network") for nic in nics])
    for name in filter(None, (nic.get("network") for nic in nics)):
        if (await ctx.world.find("network", name))["mode"] == "bridged":
            raise ActionRefused(
                f"forks cannot come into network {name}: they would go on with the address of {source['name']}, since"
                " it is the network outside that gives addresses there",
                hint=f"inn clone {source['name']} boots anew; or fork it with --network default",
            )
    machine = ctx.world.machines.get(source["id"])
    if not (source["agent"] if warm else body.snapshot or (machine and machine.status.agent)):
        raise ActionRefused(
            f"{source['name']} has no agent that could tell its forks their addresses",
            hint="fork it without a network, or clone it",
        )


async def _capture(ctx: Context, vm: Value, body: ForkRequest) -> Value:
    """All forks of a VM go on from one moment, which is still to come."""
    deadline = monotonic() + TIDYING
    while True:
        try:
            return await _capture_now(ctx, vm)
        except MachineBusy:
            holder = (await ctx.world.find("vm", vm["id"]))["operation"]
            if (holder and holder["kind"] != "snapshot-delete") or monotonic() > deadline:
                raise
            await asyncio.sleep(LOOK_EVERY)  # what is done after forks that came before, layers being merged


async def _capture_now(ctx: Context, vm: Value) -> Value:
    vm = await ctx.admitted(vm["id"], "fork")
    await check_new(ctx.world, vm, None, memory=True)
    await check_memory(ctx.world, vm, quiesce=False)
    args = snapshot_create.arguments(expires=_in(LONGEST), memory=True, passing=True)
    target = {"kind": "vm", "id": vm["id"], "name": vm["name"]}
    return {"capture": (await ctx.engine.submit("snapshot-create", target, args, hold=f"vm/{vm['id']}"))["id"]}


async def _found(ctx: Context, vm: Value, body: ForkRequest) -> Value:
    snapshot = await find_snapshot(ctx.world, vm, str(body.snapshot))
    if not snapshot["memory"] or snapshot["state"] != "whole":
        raise ActionRefused(
            f"snapshot {snapshot['name']} has no memory to go on from", hint="inn snapshot create --memory takes one"
        )
    await check_fits(ctx.world, snapshot)
    return {"snapshot": snapshot["id"]}


def _in(seconds: float) -> str:
    return stamp(datetime.now(UTC) + timedelta(seconds=seconds))
