"""Make an image, in three ways: build it from a recipe, import a file, download it.

All end alike: the files lie whole in a workspace, are given their final place by one rename, and only then is the
image recorded. Until then its name is claimed, so that nobody else makes it meanwhile.
"""

from __future__ import annotations

import asyncio
import os
import shutil
from contextlib import suppress
from pathlib import Path
from typing import Any

from innkeeper.base.clock import now
from innkeeper.base.errors import Conflict, InUse, InvalidInput, NameTaken, NotFound
from innkeeper.base.ids import new_id
from innkeeper.base.units import GIB, MIB, TIB
from innkeeper.host.users import errand_uid
from innkeeper.operations.chains import PRIVATE
from innkeeper.operations.engine import Context, Step, Verb, busy
from innkeeper.operations.image_verify import digest, stamp
from innkeeper.operations.vm_create import check_room
from innkeeper.operations.world import World
from innkeeper.spec.image import Image
from innkeeper.spec.recipe import load_recipe
from innkeeper.storage.build import Built, build
from innkeeper.storage.convert import convert, stage
from innkeeper.storage.download import download
from innkeeper.storage.formats.detect import inspect
from innkeeper.store.contract import Document, Value, update

DOWNLOAD_LIMIT = 1 * TIB
ROOM = {"build": 3 * GIB, "import": 64 * MIB, "pull": 64 * MIB, "warm": 64 * MIB, "template": 64 * MIB}
"""Bytes that the pool must have free before it is worth beginning."""


async def claim(ctx: Context) -> None:
    """The name belongs to this operation from here on; an image that has it keeps it until the new one is whole."""
    store, key = ctx.world.store, _name(ctx)
    if "image" not in ctx.data:
        check_room(ctx, ROOM[ctx.args["how"]])
        ctx.data["image"] = ctx.target["id"] = new_id()
        ctx.data["old"] = None
        await ctx.save()
    while True:
        holder = await store.get(key)
        pending = holder.value.get("pending") if holder else None
        if pending == ctx.operation:
            return
        if pending:
            raise NameTaken(f"image {ctx.target['name']!r} is being made already ({pending})")
        if holder and not ctx.args.get("replace"):
            raise NameTaken(
                f"there is an image named {ctx.target['name']!r} already",
                hint="inn image rm it first, or use --replace",
            )
        ctx.data["old"] = holder.value["id"] if holder else None
        await ctx.save()
        claimed = {"id": ctx.data["old"] or ctx.data["image"], "pending": ctx.operation}
        with suppress(Conflict):
            await store.transact({key: claimed}, {key: holder.revision if holder else 0})


async def unclaim(ctx: Context) -> None:
    """Give the name back, to the image that had it before if there is one."""
    document = await ctx.world.store.get(_name(ctx))
    if document is not None and document.value.get("pending") == ctx.operation:
        old = ctx.data["old"]
        await ctx.world.store.transact({_name(ctx): {"id": old} if old else None}, {document.key: document.revision})


def _name(ctx: Context) -> str:
    return f"name/image/{ctx.target['name']}"


async def make_from_recipe(ctx: Context) -> None:
    """The long step of `inn image build`."""
    workspace = await new_workspace(ctx)
    recipe = load_recipe(ctx.args["recipe"])
    built = await build(recipe, workspace, job=ctx.operation, report=ctx.report)
    ctx.data["image_fields"] = _fields(built)


def _fields(built: Built) -> dict[str, Any]:
    return {
        "kind": built.boot, "files": dict(built.files), "format": "qcow2" if built.boot == "disk" else "",
        "cmdline": built.cmdline or "", "virtual_size": built.virtual_size, "user": built.user,
        "agent": built.has_agent, "min_memory": built.min_memory, "cloud_init": built.has_cloud_init,
        "source": dict(built.inputs),
    }  # fmt: skip


async def make_from_download(ctx: Context) -> None:
    """Fetch and verify; the import that follows reads the file only then."""
    workspace = await new_workspace(ctx)
    target = workspace / "download"
    free = shutil.disk_usage(workspace).free
    await download(
        ctx.args["url"], target, sha256=ctx.args["sha256"], limit=min(free, DOWNLOAD_LIMIT), report=ctx.report
    )


async def make_from_file(ctx: Context) -> None:
    """A private copy, its header checked, then converted to qcow2 with nothing probed. The source stays as it is."""
    pulled = ctx.args["how"] == "pull"
    workspace = ctx.world.home.workspace(ctx.operation) if pulled else await new_workspace(ctx)
    source, target = workspace / "download", workspace / "disk.qcow2"
    target.unlink(missing_ok=True)  # half-made by a daemon that died
    if not pulled:
        await stage(Path(ctx.args["path"]), source, report=ctx.report)
    header = inspect(source, ctx.args.get("format"))
    await convert(source, header, target, job=ctx.operation, report=ctx.report, user=errand_uid())
    origin = {"url": ctx.args["url"], "sha256": ctx.args["sha256"]} if pulled else {"file": ctx.args["path"]}
    ctx.data["image_fields"] = {
        "kind": "disk", "files": {"disk": "disk.qcow2"}, "format": "qcow2", "cmdline": "",
        "virtual_size": header.virtual_size, "user": "", "agent": ctx.args.get("agent", False),
        "cloud_init": ctx.args.get("cloud_init", True), "source": origin | {"format": header.format},
    }  # fmt: skip


async def remove_workspace(ctx: Context) -> None:
    """Undo of making: whatever was half-made is gone."""
    await asyncio.to_thread(shutil.rmtree, ctx.world.home.workspace(ctx.operation), ignore_errors=True)


async def new_workspace(ctx: Context) -> Path:
    await remove_workspace(ctx)
    workspace = ctx.world.home.workspace(ctx.operation)
    workspace.mkdir(mode=0o700, parents=True)
    return workspace


async def publish(ctx: Context) -> None:
    """Digest, final place, record: in this order, so that a record always follows whole and verified data."""
    world, image_id, name = ctx.world, ctx.data["image"], ctx.target["name"]
    if await world.store.get(f"image/{image_id}"):
        return  # published before the daemon died
    fields = ctx.data["image_fields"]
    workspace, folder = world.home.workspace(ctx.operation), world.home.image(image_id)
    private = fields["kind"] in PRIVATE
    if workspace.exists():
        for path in workspace.iterdir():
            if path.name not in fields["files"].values():  # what it was made from
                path.unlink()
                continue
            path.chmod(0o600 if private else 0o644)
            await asyncio.to_thread(_sync, path)
        folder.parent.mkdir(mode=0o711, parents=True, exist_ok=True)
        workspace.rename(folder)
    folder.chmod(0o700 if private else 0o711)
    digests = {}
    for file in fields["files"].values():
        ctx.report(None, f"computing the digest of {file}")
        digests[file] = await asyncio.to_thread(digest, folder / file)
    stored = sum((folder / file).stat().st_blocks * 512 for file in fields["files"].values())
    stamps = {file: stamp(folder / file) for file in fields["files"].values()}
    image = Image(
        id=image_id, name=name, stored_size=stored, digests=digests, stamps=stamps, created=now(), **fields
    )  # fmt: skip
    writes: dict[str, Value | None] = {
        f"image/{image_id}": image.model_dump(mode="json") | {"operation": None},
        _name(ctx): {"id": image_id},
    }
    checks = {}
    if fields.get("base"):  # nobody deletes it before it is known that this one stands on it
        base = await world.find("image", fields["base"])
        if base["operation"]:
            raise busy(f"image {base['name']}", base["operation"])
        document = await world.store.get(f"image/{base['id']}")
        checks[f"image/{base['id']}"] = document.revision if document else 0
    if previous := await _previous(ctx):
        # VMs may stand on the old image: it steps aside, under a name that says what it is.
        writes[previous.key] = previous.value | {"name": _aside(ctx)}
        writes[f"name/image/{_aside(ctx)}"] = {"id": ctx.data["old"]}
        checks[previous.key] = previous.revision
    await world.store.transact(writes, checks)
    ctx.result["image"] = name
    target = {"kind": "image", "id": image_id, "name": name}
    await world.events.append("image.made", f"image {name} is ready", target=target)


def _aside(ctx: Context) -> str:
    return f"{ctx.target['name'][:50]}.{ctx.data['old'][:8]}"


async def _previous(ctx: Context) -> Document | None:
    return await ctx.world.store.get(f"image/{ctx.data['old']}") if ctx.data["old"] else None


async def unpublish(ctx: Context) -> None:
    """Take it away again, and give its name back to the image that had it, unless a VM stands on it by now."""
    if "image" not in ctx.data or ctx.data.get("replaced"):
        return
    writes: dict[str, Value | None] = {_name(ctx): {"id": ctx.data["image"], "pending": ctx.operation}}
    if previous := await _previous(ctx):
        writes = {
            _name(ctx): {"id": ctx.data["old"], "pending": ctx.operation},
            previous.key: previous.value | {"name": ctx.target["name"]},
            f"name/image/{_aside(ctx)}": None,
        }
    await _retire(ctx, ctx.data["image"], writes)


async def replace(ctx: Context) -> None:
    """The image that had the name before goes, unless VMs stand on it."""
    if await _previous(ctx):
        ctx.data["replaced"] = True
        await ctx.save()
        await _retire(ctx, ctx.data["old"], {f"name/image/{_aside(ctx)}": None})
    elif ctx.data["old"]:
        await _remove_folder(ctx, ctx.data["old"])  # the daemon died between the record's end and the files'


async def _retire(ctx: Context, image_id: str, writes: dict[str, Value | None]) -> None:
    """Delete an image that no VM stands on, record first, together with `writes`.

    It is held while its users are counted (DESIGN.md 5.11): a VM that is being made is either seen here, or sees the
    hold and is refused.
    """
    store, key = ctx.world.store, f"image/{image_id}"
    hold = {"id": ctx.operation, "kind": ctx.kind}
    try:
        image = await update(store, key, lambda image: None if image["operation"] else image | {"operation": hold})
    except NotFound:
        await _remove_folder(ctx, image_id)
        return
    if image["operation"] != hold:
        return  # somebody is deleting it already
    if await users(ctx.world, image_id):
        await update(store, key, lambda image: image | {"operation": None})
        return
    await store.transact({key: None, **writes})
    await _remove_folder(ctx, image_id)


async def _remove_folder(ctx: Context, image_id: str) -> None:
    ctx.world.ram.drop(image_id)
    await asyncio.to_thread(shutil.rmtree, ctx.world.home.image(image_id), ignore_errors=True)


def _sync(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())


async def users(world: World, image_id: str) -> list[str]:
    """Names of the VMs and images that stand on an image."""
    vms = [vm["name"] for vm in await world.vms() if (vm["image"] or {}).get("id") == image_id]
    images = [d.value["name"] for d in await world.store.list("image/") if d.value.get("base") == image_id]
    return sorted([*vms, *images])


async def check_unused(ctx: Context) -> None:
    """Others may stand on it: then it stays (DESIGN.md 5.11)."""
    if "id" not in ctx.target:
        raise InvalidInput("no image is named")
    if found := await users(ctx.world, ctx.target["id"]):
        raise InUse(
            f"image {ctx.target['name']} is the base of {', '.join(found)}", hint="delete those first", users=found
        )


async def delete(ctx: Context) -> None:
    """Record first, then files: files without a record are swept, a record without files would lie."""
    image_id, name = ctx.target["id"], ctx.target["name"]
    pointer = await ctx.world.store.get(_name(ctx))
    writes: dict[str, Value | None] = {f"image/{image_id}": None}
    checks = {}
    if pointer is not None and pointer.value["id"] == image_id:
        if by := pointer.value.get("pending"):
            raise InUse(f"image {name} is being replaced ({by})", hint="wait for that, or cancel it")
        writes[pointer.key], checks[pointer.key] = None, pointer.revision
    await ctx.world.store.transact(writes, checks)
    await _remove_folder(ctx, image_id)
    target = {"kind": "image", "id": image_id, "name": name}
    if not ctx.data.get("told"):
        ctx.data["told"] = True
        await ctx.world.events.append("image.deleted", f"image {name} was deleted", target=target)


CLAIM = Step("claim", claim, unclaim)
PUBLISH = (Step("publish", publish, unpublish), Step("replace", replace, keep=True))
BUILD = Verb("image-build", (CLAIM, Step("build", make_from_recipe, remove_workspace), *PUBLISH))
IMPORT = Verb("image-import", (CLAIM, Step("convert", make_from_file, remove_workspace), *PUBLISH))
PULL = Verb(
    "image-pull",
    (
        CLAIM,
        Step("download", make_from_download, remove_workspace),
        Step("convert", make_from_file, remove_workspace),
        *PUBLISH,
    ),
)
DELETE = Verb("image-delete", (Step("check", check_unused), Step("delete", delete, keep=True)), cancellable=False)
