"""Warm images and their forks."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

from fastapi import APIRouter, Response
from fastapi.responses import JSONResponse

from innkeeper.base.clock import stamp
from innkeeper.base.errors import InvalidInput, NameTaken
from innkeeper.operations.vm_create import arguments
from innkeeper.operations.vm_fork import find_warm, warm_name
from innkeeper.server.context import Ctx, accepted
from innkeeper.server.models import ForkRequest, ForkView, OperationView, WarmRequest
from innkeeper.server.routes_vms import check
from innkeeper.spec.vm import VMSpec
from innkeeper.store.contract import Value

router = APIRouter(prefix="/v1", tags=["forks"])


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
    await check(ctx.world, body.spec)
    args = arguments(
        body.spec, "template-warm", how="warm", replace=body.refresh, until=body.until, timeout=body.timeout,
        capturable=True,
    )  # fmt: skip
    target = {"kind": "image", "id": None, "name": name}
    return accepted(await ctx.engine.submit("template-warm", target, args))


@router.post("/forks", response_model=ForkView, status_code=202, summary="Fork a warm image, once or many times")
async def fork(ctx: Ctx, body: ForkRequest) -> Response:
    image = await find_warm(ctx.world, body.image)
    if doubled := next((name for name in body.names if body.names.count(name) > 1), None):
        raise InvalidInput(f"{doubled!r} is named twice", field="names")
    for name in body.names:
        if await ctx.world.store.get(f"name/vm/{name}"):
            raise NameTaken(f"there is a VM named {name!r} already", hint="choose another --name", name=name)
    expires = stamp(datetime.now(UTC) + timedelta(seconds=body.ttl)) if body.ttl else None
    operations = [await _fork_one(ctx, image, name, body.force, expires) for name in body.names]
    return JSONResponse({"operations": operations}, status_code=202)


async def _fork_one(ctx: Ctx, image: Value, name: str, force: bool, expires: str | None) -> str:
    spec = VMSpec.model_validate(image["warm"]["spec"] | {"name": name, "image": image["name"]})
    args = arguments(spec, "vm-fork", force=force, expires=expires)
    return str((await ctx.engine.submit("vm-fork", {"kind": "vm", "id": None, "name": name}, args))["id"])
