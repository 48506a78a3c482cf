"""Images and recipes."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Path, Response
from fastapi.responses import JSONResponse

from innkeeper.base.errors import ActionRefused, InUse, NameTaken
from innkeeper.operations.engine import busy
from innkeeper.operations.image_make import users
from innkeeper.operations.template_create import next_version
from innkeeper.server.context import Context, Ctx, accepted
from innkeeper.server.models import HistoryView, ImageView, OperationView, RecipeView
from innkeeper.spec.image import BuildRequest, ImportRequest, PullRequest, TemplateRequest
from innkeeper.spec.recipe import load_recipe, recipe_names
from innkeeper.store.contract import Value

router = APIRouter(prefix="/v1", tags=["images"])
ImageParam = Annotated[str, Path(description="An image's name or id", min_length=1, max_length=95)]


@router.get("/recipes", response_model=list[RecipeView], summary="What can be built")
async def recipes() -> Response:
    return JSONResponse([{"name": name, "title": load_recipe(name).description} for name in recipe_names()])


@router.get("/images", response_model=list[ImageView], summary="All images, by name")
async def list_images(ctx: Ctx) -> Response:
    images = [_view(document.value) for document in await ctx.world.store.list("image/")]
    return JSONResponse(sorted(images, key=lambda image: str(image["name"])))


@router.get("/images/{image}", response_model=ImageView, summary="One image, and who stands on it")
async def get_image(ctx: Ctx, image: ImageParam) -> Response:
    found = await ctx.world.find("image", image)
    return JSONResponse(_view(found) | {"users": await users(ctx.world, found["id"])})


def _view(image: Value) -> Value:
    return {key: value for key, value in image.items() if key != "operation"}


@router.post("/images/build", response_model=OperationView, status_code=202, summary="Build an image from a recipe")
async def build(ctx: Ctx, body: BuildRequest) -> Response:
    load_recipe(body.recipe)
    name = body.name or body.recipe
    return await _make(ctx, "build", name, body.model_dump())


@router.post("/images/import", response_model=OperationView, status_code=202, summary="Import a disk image file")
async def import_image(ctx: Ctx, body: ImportRequest) -> Response:
    return await _make(ctx, "import", body.name, body.model_dump())


@router.post("/images/pull", response_model=OperationView, status_code=202, summary="Download a disk image")
async def pull(ctx: Ctx, body: PullRequest) -> Response:
    return await _make(ctx, "pull", body.name, body.model_dump())


@router.get("/images/{image}/history", response_model=HistoryView, summary="What an image stands on, its versions")
async def history(ctx: Ctx, image: ImageParam) -> Response:
    found: Value | None = await ctx.world.find("image", image)
    assert found is not None
    name, line = (found.get("template") or {}).get("name"), []
    every = [document.value for document in await ctx.world.store.list("image/")]
    versions = [one for one in every if name and (one.get("template") or {}).get("name") == name]
    while found is not None:
        line.append(_view(found) | {"users": await users(ctx.world, found["id"])})
        found = await ctx.world.find("image", found["base"]) if found.get("base") else None
    versions.sort(key=lambda one: str(one["created"]), reverse=True)
    return JSONResponse({"line": line, "versions": [_view(one) for one in versions]})


@router.post(
    "/images/{image}/verify", response_model=OperationView, status_code=202, summary="Prove an image's digests"
)
async def verify(ctx: Ctx, image: ImageParam) -> Response:
    found = await ctx.world.find("image", image)
    target = {"kind": "image", "id": found["id"], "name": found["name"]}
    return accepted(await ctx.engine.submit("image-verify", target, {}))


@router.post("/templates", response_model=OperationView, status_code=202, summary="Seal a VM's disks as a template")
async def create_template(ctx: Ctx, body: TemplateRequest) -> Response:
    vm = await ctx.admitted(body.vm, "clone")
    if vm["state"] not in ("stopped", "crashed"):
        raise ActionRefused(
            f"{vm['name']} is {vm['state']}, and a template is sealed of a VM that is stopped",
            hint=f"inn stop {vm['name']}; or inn clone it, and seal the clone",
        )
    if not vm["disks"]:
        raise ActionRefused(f"{vm['name']} has no disk to make a template of")
    if await ctx.world.store.get(f"name/image/{body.name}"):
        raise NameTaken(f"there is an image named {body.name!r} already", hint="choose another --name")
    version = body.version or await next_version(ctx.world, body.name)
    args = body.model_dump(include={"accept", "clean", "by", "note"}) | {"vm": vm["id"]}
    return await _make(ctx, "template", f"{body.name}:{version}", args, f"vm/{vm['id']}")


async def _make(ctx: Context, how: str, name: str, args: Value, hold: str | None = None) -> Response:
    if not args.get("replace") and await ctx.world.store.get(f"name/image/{name}"):
        raise NameTaken(f"there is an image named {name!r} already", hint="choose another name, or inn image rm it")
    target = {"kind": "image", "id": None, "name": name}
    kind = "template-create" if how == "template" else f"image-{how}"
    return accepted(await ctx.engine.submit(kind, target, args | {"how": how}, hold))


@router.delete("/images/{image}", response_model=OperationView, status_code=202, summary="Delete an image")
async def delete_image(ctx: Ctx, image: ImageParam) -> Response:
    found = await ctx.world.find("image", image)
    if on_it := await users(ctx.world, found["id"]):
        raise InUse(f"image {found['name']} is the base of {', '.join(on_it)}", hint="delete those first", users=on_it)
    if found["operation"]:
        raise busy(f"image {found['name']}", found["operation"])
    target = {"kind": "image", "id": found["id"], "name": found["name"]}
    return accepted(await ctx.engine.submit("image-delete", target, {}, hold=f"image/{found['id']}"))
