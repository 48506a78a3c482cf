"""Make an image, in three ways: build it from a recipe, import a file, download it.

All end alike: the files lie whole in a workspace, are given their final place by one rename, and only then is the
image recorded. Until then its name is claimed, so that nobody else makes it meanwhile.
"""

from __future__ import annotations

import asyncio
import os
import shutil
from pathlib import Path
from typing import Any

from blake3 import blake3

from innkeeper.base.clock import now
from innkeeper.base.errors import Conflict, InUse, InvalidInput, NameTaken
from innkeeper.base.ids import new_id
from innkeeper.base.units import GIB, MIB, TIB
from innkeeper.host.users import errand_uid
from innkeeper.operations.engine import Context, Step, Verb
from innkeeper.operations.vm_create import check_room
from innkeeper.spec.image import Image
from innkeeper.spec.recipe import load_recipe
from innkeeper.storage.build import Built, build
from innkeeper.storage.convert import convert, stage
from innkeeper.storage.download import download
from innkeeper.storage.formats.detect import inspect
from innkeeper.store.contract import Value

DOWNLOAD_LIMIT = 1 * TIB
ROOM = {"build": 3 * GIB, "import": 64 * MIB, "pull": 64 * MIB}
"""Bytes that the pool must have free before it is worth beginning."""


async def claim(ctx: Context) -> None:
    """The name belongs to this operation from here on."""
    if "image" in ctx.data:
        return
    image_id, name = new_id(), ctx.target["name"]
    check_room(ctx, ROOM[ctx.args["how"]])
    store, key = ctx.world.store, f"name/image/{name}"
    old = await store.get(key)
    if old is not None and not ctx.args.get("replace"):
        raise NameTaken(f"there is an image named {name!r} already", hint="inn image rm it first, or use --replace")
    if old is not None and "pending" in old.value and old.value["pending"] != ctx.operation:
        raise NameTaken(f"image {name!r} is being made already ({old.value['pending']})")
    ctx.data["image"] = ctx.target["id"] = image_id
    ctx.data["old"] = old.value["id"] if old is not None and "pending" not in old.value else None
    await ctx.save()
    if old is None:
        try:
            await store.transact({key: {"id": image_id, "pending": ctx.operation}}, {key: 0})
        except Conflict:
            raise NameTaken(f"there is an image named {name!r} already") from None


async def unclaim(ctx: Context) -> None:
    """Give the name back, unless another image had it before."""
    store, key = ctx.world.store, f"name/image/{ctx.target['name']}"
    document = await store.get(key)
    if document is not None and document.value.get("pending") == ctx.operation:
        await store.transact({key: None}, {key: document.revision})


async def make_from_recipe(ctx: Context) -> None:
    """The long step of `inn image build`."""
    workspace = await _workspace(ctx)
    recipe = load_recipe(ctx.args["recipe"])
    built = await build(recipe, workspace, job=ctx.operation, report=ctx.report)
    ctx.data["image_fields"] = _fields(built)


def _fields(built: Built) -> dict[str, Any]:
    return {
        "kind": built.boot, "files": dict(built.files), "format": "qcow2" if built.boot == "disk" else "",
        "cmdline": built.cmdline or "", "virtual_size": built.virtual_size, "user": built.user,
        "agent": built.has_agent, "cloud_init": built.has_cloud_init, "source": dict(built.inputs),
    }  # fmt: skip


async def make_from_download(ctx: Context) -> None:
    """Fetch and verify; the import that follows reads the file only then."""
    workspace = await _workspace(ctx)
    target = workspace / "download"
    free = shutil.disk_usage(workspace).free
    await download(
        ctx.args["url"], target, sha256=ctx.args["sha256"], limit=min(free, DOWNLOAD_LIMIT), report=ctx.report
    )


async def make_from_file(ctx: Context) -> None:
    """A private copy, its header checked, then converted to qcow2 with nothing probed. The source stays as it is."""
    pulled = ctx.args["how"] == "pull"
    workspace = ctx.world.home.workspace(ctx.operation) if pulled else await _workspace(ctx)
    source, target = workspace / "download", workspace / "disk.qcow2"
    target.unlink(missing_ok=True)
    if not pulled:
        await stage(Path(ctx.args["path"]), source, report=ctx.report)
    header = inspect(source, ctx.args.get("format"))
    home = str(ctx.world.home.data)
    await convert(source, header, target, job=ctx.operation, report=ctx.report, user=errand_uid(), home=home)
    source.unlink()
    origin = {"url": ctx.args["url"], "sha256": ctx.args["sha256"]} if pulled else {"file": ctx.args["path"]}
    ctx.data["image_fields"] = {
        "kind": "disk", "files": {"disk": "disk.qcow2"}, "format": "qcow2", "cmdline": "",
        "virtual_size": header.virtual_size, "user": "", "agent": ctx.args.get("agent", False),
        "cloud_init": ctx.args.get("cloud_init", True), "source": origin | {"format": header.format},
    }  # fmt: skip


async def remove_workspace(ctx: Context) -> None:
    """Undo of making: whatever was half-made is gone."""
    await asyncio.to_thread(shutil.rmtree, ctx.world.home.workspace(ctx.operation), ignore_errors=True)


async def _workspace(ctx: Context) -> Path:
    await remove_workspace(ctx)
    workspace = ctx.world.home.workspace(ctx.operation)
    workspace.mkdir(mode=0o700, parents=True)
    return workspace


async def publish(ctx: Context) -> None:
    """Digest, final place, record: in this order, so that a record always follows whole and verified data."""
    world, image_id, name = ctx.world, ctx.data["image"], ctx.target["name"]
    fields = ctx.data["image_fields"]
    workspace, folder = world.home.workspace(ctx.operation), world.home.image(image_id)
    if workspace.exists():
        for file in fields["files"].values():
            (workspace / file).chmod(0o644)
            await asyncio.to_thread(_sync, workspace / file)
        folder.parent.mkdir(mode=0o711, parents=True, exist_ok=True)
        workspace.rename(folder)
    folder.chmod(0o711)
    digests = {}
    for file in fields["files"].values():
        ctx.report(None, f"computing the digest of {file}")
        digests[file] = await asyncio.to_thread(_digest, folder / file)
    stored = sum((folder / file).stat().st_blocks * 512 for file in fields["files"].values())
    image = Image(id=image_id, name=name, stored_size=stored, digests=digests, created=now(), **fields)
    old = ctx.data.get("old")
    writes: dict[str, Value | None] = {
        f"image/{image_id}": image.model_dump(mode="json") | {"operation": None},
        f"name/image/{name}": {"id": image_id},
    }
    if old and (previous := await world.store.get(f"image/{old}")):
        # VMs that stand on the old image keep it, under a name that says what it is.
        users = [vm["name"] for vm in await world.vms() if (vm["image"] or {}).get("id") == old]
        aside = f"{name[:50]}.{old[:8]}"
        writes[f"image/{old}"] = previous.value | {"name": aside} if users else None
        if users:
            writes[f"name/image/{aside}"] = {"id": old}
        ctx.data["drop"] = None if users else old
    await world.store.transact(writes)
    if drop := ctx.data.get("drop"):
        await asyncio.to_thread(shutil.rmtree, world.home.image(drop), ignore_errors=True)
    ctx.result["image"] = name
    target = {"kind": "image", "id": image_id, "name": name}
    await world.events.append("image.made", f"image {name} is ready", target=target)


async def unpublish(ctx: Context) -> None:
    """Take away what has no record."""
    if "image" in ctx.data and not await ctx.world.store.get(f"image/{ctx.data['image']}"):
        await asyncio.to_thread(shutil.rmtree, ctx.world.home.image(ctx.data["image"]), ignore_errors=True)


def _digest(path: Path) -> str:
    return str(blake3(max_threads=blake3.AUTO).update_mmap(path).hexdigest())


def _sync(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())


async def check_unused(ctx: Context) -> None:
    """Others may stand on it: then it stays (DESIGN.md 5.11)."""
    if "id" not in ctx.target:
        raise InvalidInput("no image is named")
    users = [vm["name"] for vm in await ctx.world.vms() if (vm["image"] or {}).get("id") == ctx.target["id"]]
    if users:
        raise InUse(
            f"image {ctx.target['name']} is the base of {', '.join(sorted(users))}",
            hint="delete those VMs first", users=sorted(users),
        )  # fmt: skip


async def delete(ctx: Context) -> None:
    """Record first, then files: files without a record are swept, a record without files would lie."""
    image_id, name = ctx.target["id"], ctx.target["name"]
    await ctx.world.store.transact({f"image/{image_id}": None, f"name/image/{name}": None})
    await asyncio.to_thread(shutil.rmtree, ctx.world.home.image(image_id), ignore_errors=True)
    target = {"kind": "image", "id": image_id, "name": name}
    if not ctx.data.get("told"):
        ctx.data["told"] = True
        await ctx.world.events.append("image.deleted", f"image {name} was deleted", target=target)


_CLAIM = Step("claim", claim, unclaim)
_PUBLISH = Step("publish", publish, unpublish)
BUILD = Verb("image-build", (_CLAIM, Step("build", make_from_recipe, remove_workspace), _PUBLISH))
IMPORT = Verb("image-import", (_CLAIM, Step("convert", make_from_file, remove_workspace), _PUBLISH))
PULL = Verb(
    "image-pull",
    (
        _CLAIM,
        Step("download", make_from_download, remove_workspace),
        Step("convert", make_from_file, remove_workspace),
        _PUBLISH,
    ),
)
DELETE = Verb("image-delete", (Step("check", check_unused), Step("delete", delete, keep=True)), cancellable=False)
