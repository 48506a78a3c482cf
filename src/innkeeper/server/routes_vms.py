"""VMs: make, list, act, delete."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated, Any, TypeVar

from fastapi import APIRouter, Query, Response
from fastapi.responses import JSONResponse

from innkeeper.base.errors import InvalidInput, NameTaken, Unsupported
from innkeeper.base.units import format_size
from innkeeper.operations import host_cards, vm_clone
from innkeeper.operations.networks import reachable
from innkeeper.operations.vm_create import arguments
from innkeeper.operations.vm_delete import check_alone
from innkeeper.operations.world import World
from innkeeper.plan import ignition, seed
from innkeeper.server.context import Ctx, VMName, accepted
from innkeeper.server.models import ActionRequest, CloneRequest, OperationView, SSHView, VMRequest, VMView
from innkeeper.server.views import user
from innkeeper.spec.disk import DiskSpec
from innkeeper.spec.vm import VMSpec
from innkeeper.store.contract import Value

router = APIRouter(prefix="/v1/vms", tags=["VMs"])
Spec = TypeVar("Spec", bound=VMSpec)


class Action(StrEnum):
    """What can be asked of a VM."""

    start = "start"
    stop = "stop"
    restart = "restart"
    pause = "pause"
    resume = "resume"


@router.get("", response_model=list[VMView], summary="All VMs, by name")
async def list_vms(
    ctx: Ctx,
    memory_used: Annotated[bool, Query(description="Also what each takes of the host's memory")] = False,
) -> Response:
    return Response(await ctx.views.all(used=memory_used), media_type="application/json")


@router.post("", response_model=OperationView, status_code=202, summary="Make a VM, start it, wait until it is ready")
async def create_vm(ctx: Ctx, body: VMRequest) -> Response:
    image = await ctx.world.find("image", body.spec.image) if body.spec.image else {}
    spec = as_sealed(image, body.spec)
    await check(ctx.world, spec)
    kind = "vm-launch" if body.start else "vm-create"
    args = arguments(spec, kind, wait=body.wait, force=body.force, timeout=body.timeout)
    target = {"kind": "vm", "id": None, "name": body.spec.name}
    await ctx.have_default(spec.nics)
    return accepted(await ctx.engine.submit(kind, target, args))


def as_sealed(image: Value, spec: Spec) -> Spec:
    """Of a template's VM, what nobody has asked for otherwise is as the sealed one had it: disks and firmware."""
    if not (template := image.get("template")):
        return spec
    sealed: dict[str, Any] = {
        "disks": tuple(DiskSpec(size=size) for size in template["disks"]), "firmware": template["firmware"]
    }  # fmt: skip
    return spec.model_copy(update={key: value for key, value in sealed.items() if key not in spec.model_fields_set})


async def check(world: World, spec: VMSpec) -> None:
    """What can be known to be wrong before anything is made: better an answer now than a failed operation."""
    if await world.store.get(f"name/vm/{spec.name}"):
        raise NameTaken(f"there is a VM named {spec.name!r} already", hint="choose another --name", name=spec.name)
    await host_cards.check(world, spec.nics)
    image = await world.find("image", spec.image) if spec.image else None
    if image and image["kind"] == "warm":
        raise InvalidInput(
            f"image {image['name']} is warm: it is forked, not launched", hint=f"inn fork {image['name']}"
        )
    boot = spec.first_boot
    if boot.user_data is not None:
        seed.validate("user-data", boot.user_data, "user-data")
    if boot.network_config is not None:
        seed.validate("network-config", boot.network_config, "network-config")
    if boot.ignition is not None:
        ignition.validate(boot.ignition, "ignition")
    seed.environment_lines(boot.env)
    if image and spec.memory < image["min_memory"]:
        raise InvalidInput(
            f"image {image['name']} needs {format_size(image['min_memory'])} of memory, and this is"
            f" {format_size(spec.memory)}",
            field="spec.memory",
        )
    if spec.firmware == "uefi" and image and image["kind"] == "disk":
        host = await world.host()
        if host.firmware.uefi is None:
            raise Unsupported("this host has no UEFI firmware for guests", hint="apt install ovmf")
    if image and image["virtual_size"] and spec.disks and (size := spec.disks[0].size) and size < image["virtual_size"]:
        raise InvalidInput(
            f"disk 0 of {size} bytes is smaller than image {image['name']} of {image['virtual_size']} bytes",
            hint="make it larger, or leave its size out", field="spec.disks.0.size",
        )  # fmt: skip


@router.get("/{vm}", response_model=VMView, summary="One VM")
async def get_vm(ctx: Ctx, vm: VMName) -> Response:
    return JSONResponse(await ctx.views.one(await ctx.world.find("vm", vm)))


@router.delete("/{vm}", response_model=OperationView, status_code=202, summary="Delete a VM and its disks")
async def delete_vm(
    ctx: Ctx, vm: VMName, force: Annotated[bool, Query(description="Also when it runs or is busy")] = False
) -> Response:
    await check_alone(ctx.world, await ctx.world.find("vm", vm))
    return accepted(await ctx.act(vm, "delete", {"force": force}))


@router.post("/{vm}/clone", response_model=OperationView, status_code=202, summary="Clone a VM, running or not")
async def clone_vm(ctx: Ctx, vm: VMName, body: CloneRequest) -> Response:
    source = await ctx.admitted(vm, "clone")
    await vm_clone.check(ctx.world, source, body.name, linked=body.linked)
    args = vm_clone.arguments(body.name, linked=body.linked, keep_identity=body.keep_identity, quiesce=body.quiesce)
    target = {"kind": "vm", "id": source["id"], "name": source["name"]}
    return accepted(await ctx.engine.submit("vm-clone", target, args, hold=f"vm/{source['id']}"))


@router.post("/{vm}/actions/{action}", response_model=OperationView, status_code=202, summary="Act on a VM")
async def act_on_vm(ctx: Ctx, vm: VMName, action: Action, body: ActionRequest | None = None) -> Response:
    return accepted(await ctx.act(vm, action.value, (body or ActionRequest()).model_dump()))


@router.get("/{vm}/ssh", response_model=SSHView, summary="How to reach its SSH, with the host key to expect")
async def ssh(ctx: Ctx, vm: VMName) -> Response:
    found = await ctx.world.find("vm", vm)
    image = await ctx.world.find("image", found["image"]["id"]) if found["image"] else None
    port, address = found["identity"]["ssh_port"], "127.0.0.1"
    if port is None and (reached := await reachable(ctx.world, found)):
        port, address = 22, reached
    if port is None:
        raise Unsupported(f"{found['name']} has no network that this host can reach it by", hint="inn exec or console")
    if image is None or not image["cloud_init"]:
        raise Unsupported(
            f"{found['name']} has no SSH server that Innkeeper knows of",
            hint=f"inn exec {found['name']} -- …, or console",
        )
    secret = await ctx.world.store.get(f"secret/vm/{found['id']}")
    assert secret is not None
    answer: Value = {
        "address": address, "port": port, "user": user(found, image),
        "host_key": secret.value["host_key"]["public"], "alias": found["id"],
    }  # fmt: skip
    return JSONResponse(answer)
