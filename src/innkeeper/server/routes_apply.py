"""Declarative files: what would change, and changing it."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Response
from fastapi.responses import JSONResponse
from pydantic import TypeAdapter, ValidationError

from innkeeper.base.errors import ActionRefused, InvalidInput
from innkeeper.machine.states import admit
from innkeeper.operations.converge import differences, needs_new_vm
from innkeeper.operations.vm_create import arguments
from innkeeper.operations.vm_update import AT_ONCE
from innkeeper.server.context import Context, Ctx, VMName
from innkeeper.server.models import ApplyRequest, ApplyView, Export, ManifestChange
from innkeeper.server.problems import invalid
from innkeeper.server.routes_vms import as_sealed, check
from innkeeper.spec.manifest import ImageManifest, Manifest, VMManifest
from innkeeper.spec.recipe import load_recipe
from innkeeper.store.contract import Value

router = APIRouter(prefix="/v1", tags=["apply"])
_MANIFEST: TypeAdapter[VMManifest | ImageManifest] = TypeAdapter(Manifest)


@router.post("/apply", response_model=ApplyView, summary="Make what is there as the documents say; twice is a no-op")
async def apply(ctx: Ctx, body: ApplyRequest) -> Response:
    manifests = [_parse(index, document) for index, document in enumerate(body.documents)]
    names = [(manifest.kind, manifest.name) for manifest in manifests]
    if doubled := next((name for name in names if names.count(name) > 1), None):
        raise InvalidInput(f"{doubled[0]} {doubled[1]!r} is described twice")
    planned = {manifest.name for manifest in manifests if manifest.kind == "image"}
    manifests = [await _as_sealed(ctx, manifest, planned) for manifest in manifests]
    # All are checked before the first is touched: a mistake in the last document changes nothing.
    changes = [await _compare(ctx, manifest, planned) for manifest in manifests]
    operations: list[str] = []
    if not body.dry_run:
        for manifest, change in zip(manifests, changes, strict=True):
            operations += await _converge(ctx, manifest, change)
    return JSONResponse(ApplyView(changes=changes, operations=operations).model_dump(mode="json"))


def _parse(index: int, document: dict[str, Any]) -> VMManifest | ImageManifest:
    try:
        return _MANIFEST.validate_python({"kind": "vm"} | document)
    except ValidationError as error:
        problem = invalid(list(error.errors()))
        name = document.get("name", "without a name")
        raise InvalidInput(
            f"document {index + 1} ({name}): {problem.detail}", document=index, **problem.facts
        ) from None


async def _as_sealed(
    ctx: Context, manifest: VMManifest | ImageManifest, planned: set[str]
) -> VMManifest | ImageManifest:
    """A VM of a template has what the manifest leaves out from there: from the version that it was made of."""
    if isinstance(manifest, ImageManifest) or manifest.image in planned:
        return manifest
    made = await ctx.world.store.get(f"name/vm/{manifest.name}")
    origin = (await ctx.world.find("vm", manifest.name))["image"] if made else {"id": manifest.image}
    return as_sealed(await ctx.world.find("image", origin["id"]), manifest) if origin and origin["id"] else manifest


async def _compare(ctx: Context, manifest: VMManifest | ImageManifest, planned: set[str]) -> ManifestChange:
    pointer = await ctx.world.store.get(f"name/{manifest.kind}/{manifest.name}")
    if isinstance(manifest, ImageManifest):
        load_recipe(manifest.recipe)
        return ManifestChange(
            kind="image", name=manifest.name, action="none" if pointer else "build", differences=[], note=""
        )
    if pointer is None:
        if manifest.image in planned and not await ctx.world.store.get(f"name/image/{manifest.image}"):
            raise ActionRefused(
                f"{manifest.name} needs image {manifest.image}, which is still to be built",
                hint=f"inn image build {manifest.image} first, then apply again",
            )
        await check(ctx.world, manifest.spec())
        return ManifestChange(kind="vm", name=manifest.name, action="create", differences=[])
    vm = await ctx.world.find("vm", manifest.name)
    secret = await ctx.world.store.get(f"secret/vm/{vm['id']}")
    assert secret is not None
    found = differences(manifest, vm, secret.value)
    if frozen := needs_new_vm(found):
        raise ActionRefused(
            f"{manifest.name}: {', '.join(frozen)} cannot change on a VM that exists",
            hint=f"inn rm {manifest.name} and apply again makes it anew; its disks are lost then",
            fields=frozen,
        )  # fmt: skip
    running = vm["state"] in ("running", "starting", "paused")
    if found:
        waits = running and any(difference["field"] not in AT_ONCE for difference in found)
        note = "takes effect at its next restart" if waits else ""
        return ManifestChange(kind="vm", name=manifest.name, action="update", differences=found, note=note)
    if manifest.state == "running" and not running:
        return ManifestChange(kind="vm", name=manifest.name, action="start", differences=[])
    if manifest.state == "stopped" and running:
        return ManifestChange(kind="vm", name=manifest.name, action="stop", differences=[])
    return ManifestChange(kind="vm", name=manifest.name, action="none", differences=[])


async def _converge(ctx: Context, manifest: VMManifest | ImageManifest, change: ManifestChange) -> list[str]:
    if change.action == "none":
        return []
    if isinstance(manifest, ImageManifest):
        target: Value = {"kind": "image", "id": None, "name": manifest.name}
        args = {"recipe": manifest.recipe, "name": manifest.name, "replace": False, "how": "build"}
        return [(await ctx.engine.submit("image-build", target, args))["id"]]
    if change.action == "create":
        kind = "vm-launch" if manifest.state == "running" else "vm-create"
        target = {"kind": "vm", "id": None, "name": manifest.name}
        await ctx.have_default(manifest.spec().nics)
        return [(await ctx.engine.submit(kind, target, arguments(manifest.spec(), kind)))["id"]]
    if change.action in ("start", "stop"):
        return [(await ctx.act(manifest.name, change.action, {"force": False, "timeout": None}))["id"]]
    vm = await ctx.world.find("vm", manifest.name)
    target = {"kind": "vm", "id": vm["id"], "name": vm["name"]}
    args = {"spec": manifest.spec().model_dump(mode="json")}
    await ctx.have_default(manifest.spec().nics)
    updated = await ctx.engine.submit("vm-update", target, args, hold=f"vm/{vm['id']}")
    while not updated["ended"]:
        updated = await ctx.engine.wait(updated["id"], updated["revision"], 10)
    state = (await ctx.world.find("vm", vm["id"]))["state"]
    wanted = {"running": "start", "stopped": "stop"}[manifest.state]
    if admit(state, wanted).answer != "accept":
        return [updated["id"]]
    return [updated["id"], (await ctx.act(vm["id"], wanted, {"force": False, "timeout": None}))["id"]]


@router.get("/vms/{vm}/export", response_model=Export, summary="A VM as a declarative document, without its secrets")
async def export(ctx: Ctx, vm: VMName) -> Response:
    found = await ctx.world.find("vm", vm)
    spec = {key: value for key, value in found["spec"].items() if value not in (None, "", [], {})}
    boot = {key: value for key, value in found["spec"]["first_boot"].items() if value not in (None, "", [], {})}
    state = "running" if found["state"] in ("running", "starting", "paused") else "stopped"
    document = {"kind": "vm", "state": state} | spec
    document.pop("first_boot", None)
    return JSONResponse(document | ({"first_boot": boot} if boot else {}))
