"""Are an image's files as they were when it was made? A quick look at each launch, fork and clone tells;
`inn template verify` proves it by their digests."""

from __future__ import annotations

import asyncio
from pathlib import Path

from blake3 import blake3

from innkeeper.base.clock import now
from innkeeper.base.errors import ImageChanged, NotFound
from innkeeper.operations.engine import Context, Step, Verb
from innkeeper.operations.world import World
from innkeeper.store.contract import Value, update


def digest(path: Path) -> str:
    """BLAKE3 of a file, in hex. Blocks."""
    return str(blake3(max_threads=blake3.AUTO).update_mmap(path).hexdigest())


def stamp(path: Path) -> tuple[int, ...]:
    """What changes with a file: its size, inode, and the times (ns) of the last change of its content and of itself.
    The last one nobody can set back."""
    found = path.lstat()
    return (found.st_size, found.st_ino, found.st_mtime_ns, found.st_ctime_ns)


async def check_untouched(world: World, image_id: str | None) -> None:
    """A quick look at the files of an image and of all that it stands on. Raises `ImageChanged`."""
    while image_id is not None:
        image = await world.find("image", image_id)
        if changed := [file for file in image["files"].values() if not _untouched(world, image, file)]:
            raise _changed(image, changed, "since it was made")
        image_id = image.get("base")


def _untouched(world: World, image: Value, file: str) -> bool:
    known = image.get("stamps", {}).get(file)
    if known is None:  # made before there were stamps
        return True
    try:
        return list(stamp(world.home.image(image["id"]) / file)) == list(known)
    except OSError:
        return False


def _changed(image: Value, files: list[str], how: str) -> ImageChanged:
    return ImageChanged(
        f"{', '.join(files)} of image {image['name']} has been changed {how}",
        hint=f"inn template verify {image['name']} compares it with its digest, and says if it is whole after all",
        files=files,
    )


async def verify(ctx: Context) -> None:
    """Read all of it. What is whole counts as untouched from now on (a pool that was moved has other inodes)."""
    world = ctx.world
    image = await world.find("image", ctx.target["id"])
    folder, changed, stamps = world.home.image(image["id"]), [], {}
    for file, known in image["digests"].items():
        ctx.report(None, f"reading {file}")
        try:
            stamps[file] = list(stamp(folder / file))
            whole = await asyncio.to_thread(digest, folder / file) == known
        except OSError:
            whole = False
        if not whole:
            changed.append(file)
            stamps[file] = []  # what is not whole is refused, whatever its stamp
    checked = {"stamps": stamps, "verified": None if changed else now()}
    try:
        await update(world.store, f"image/{image['id']}", lambda image: image | checked)
    except NotFound:
        raise NotFound(f"image {image['name']} was deleted meanwhile", name=image["name"]) from None
    target = {"kind": "image", "id": image["id"], "name": image["name"]}
    if changed:
        text = f"{', '.join(changed)} of image {image['name']} is not what was recorded"
        await world.events.append("image.changed", text, target=target, level="error")
        raise ImageChanged(
            text, hint="nothing is started from it any more; delete it, or put its file back", files=changed
        )
    ctx.result["image"] = image["name"]


VERB = Verb("image-verify", (Step("verify", verify, keep=True),))
