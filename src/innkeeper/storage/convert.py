"""From a stranger's image to a qcow2 of ours, and what is made on top of it.

An import goes: `stage` (a private copy) → `formats.inspect` of the copy → `convert` of the same copy. The copy is what
makes the inspection worth something: its owner can neither exchange the file nor change its header between our look
and QEMU's. On file systems that can clone it costs nothing. What is private already (a download in the
workspace) needs no `stage`.

`convert` writes qcow2 version 3 with clusters of 64 KiB, without lazy refcounts (they need a repair after a power cut)
and without compression: an image is read by every VM that stands on it, for all its life.
"""

from __future__ import annotations

import json
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from innkeeper.base.errors import ImageUnsafe, InvalidInput, ToolFailed
from innkeeper.base.units import GIB, MIB, format_size
from innkeeper.storage.cage import Limits, run_tool
from innkeeper.storage.copy import Report, copy_files
from innkeeper.storage.formats import ImageHeader, inspect, inspect_fd, qcow2
from innkeeper.storage.formats.detect import open_image
from innkeeper.storage.room import full_pool_is, pool_full, room_for
from innkeeper.storage.threads import in_thread

TOOL_MEMORY = 2 * GIB
"""Address space of a caged qemu-img, most of it reserved by threads and never touched."""
SLOWEST = 10 * MIB
"""Bytes of virtual disk a second that a conversion must reach, or it is killed."""
_CONVERT = ("qemu-img", "convert", "-p", "-n", "--target-is-zero", "-O", "qcow2")
_PERCENT = re.compile(r"\((\d{1,3}\.\d\d)/100%\)")


@dataclass(frozen=True)
class CheckReport:
    """What `qemu-img check` found."""

    corruptions: int
    """Damage: data may be lost."""
    leaks: int
    """Clusters that nobody uses: wasted room, no damage."""
    errors: int
    """What could not be checked."""

    @property
    def clean(self) -> bool:
        return not (self.corruptions or self.errors)


async def stage(source: Path, target: Path, *, report: Report) -> None:
    """Copy a file of someone else into the workspace: cloned where the file system can, else sparse.

    Raises what `formats.inspect` raises for a file that cannot be opened, and `PoolFull`. `target` must not exist, is
    0600 and ours; it is removed if this fails or is cancelled.
    """
    fd = open_image(source)
    try:
        await copy_files([(fd, target)], report=report)
    except OSError as error:
        raise InvalidInput(f"{source} could not be copied: {error.strerror}") from error
    finally:
        os.close(fd)


async def convert(
    source: Path,
    header: ImageHeader,
    target: Path,
    *,
    job: str,
    report: Report,
    user: int | None = None,
) -> None:
    """Write the disk in `source`, whose inspected `header` this is, to a new qcow2 file `target`.

    `source` must be private to us (see `stage`); it is inspected again, and given to qemu-img as an open file, with
    the driver named and backing files switched off. `user` is the uid that qemu-img runs as (root only): it can read
    this one file and write that one. `target` must not exist; it ends up 0600, ours and synced, or not there at all.

    Raises `ImageUnsafe` (the image changed, or lies about its size), `InvalidInput`, `PoolFull`, `ToolFailed`,
    `ToolTimeout`.
    """
    fd = open_image(source)
    try:
        state = os.fstat(fd)
        if state.st_uid != os.geteuid() or state.st_mode & 0o022:
            raise InvalidInput(f"{source} can be changed by others while it is converted", hint="stage it first")
        if inspect_fd(fd, header.format) != header:
            raise ImageUnsafe(f"the image {source} changed after it was inspected")
        if user is not None:
            os.fchmod(fd, 0o444)  # it lies in a folder that only we can enter
        qcow2.write_empty(target, header.virtual_size, durable=False)
        out = -1
        try:
            out = os.open(target, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
            if user is not None:
                os.fchown(out, user, user)
            await _run_convert(header, fd, out, target.parent, job=job, user=user, report=report)
            if user is not None:
                os.fchown(out, os.geteuid(), os.getegid())
            await in_thread(lambda stop: os.fsync(out))
            if inspect(target, "qcow2").virtual_size != header.virtual_size:
                raise ToolFailed("qemu-img wrote a disk of another size than the image has")
        except BaseException:
            target.unlink(missing_ok=True)
            raise
        finally:
            if out >= 0:
                os.close(out)
    finally:
        os.close(fd)


async def create_overlay(base: Path, base_format: str, target: Path, size: int, *, durable: bool = True) -> None:
    """A new qcow2 `target` of `size` bytes (at least the base's) that stands on `base`, in under a millisecond.

    `base` is absolute and of ours; `base_format`, qcow2 or raw, is recorded in the overlay, so nothing is ever probed.
    `durable=False` leaves out the sync, for a machine that is not kept. Raises `InvalidInput`, `NotFound`,
    `FileExistsError`, `PoolFull`.
    """
    if base_format not in ("qcow2", "raw"):
        raise InvalidInput(f"an overlay cannot stand on a {base_format} image", hint="convert it to qcow2 first")
    fd = open_image(base)
    try:
        base_size = os.fstat(fd).st_size if base_format == "raw" else qcow2.read_size(fd)
    finally:
        os.close(fd)
    if size < base_size:
        raise InvalidInput(
            f"a disk of {format_size(size)} is smaller than its image of {format_size(base_size)}",
            hint="a disk can grow, not shrink",
            field="size",
            smallest=base_size,
        )
    with full_pool_is(f"no room for {target.name}", target.parent):
        qcow2.write_overlay(target, base, base_format, size, durable=durable)


async def image_check(path: Path, *, job: str = "", user: int | None = None) -> CheckReport:
    """Check the structure of one of our qcow2 files (not of what it stands on). No QEMU may have it open.

    Raises `ToolFailed` if it cannot be opened, `ToolTimeout`.
    """
    fd = open_image(path)
    try:
        image = {**_file("qcow2", fd), "backing": None}
        size = os.fstat(fd).st_size
        out = await run_tool(
            ["qemu-img", "check", "--output=json", _json(image)],
            limits=Limits(300 + size / SLOWEST, memory=TOOL_MEMORY),
            env={"MALLOC_ARENA_MAX": "2"},
            job=job,
            user=user,
            pass_fds=[fd],
            ok_status=(0, 2, 3),  # 2: corruptions, 3: leaks only
        )
    finally:
        os.close(fd)
    found = json.loads(out)
    return CheckReport(found.get("corruptions", 0), found.get("leaks", 0), found.get("check-errors", 0))


async def _run_convert(
    header: ImageHeader,
    fd: int,
    out: int,
    folder: Path,
    *,
    job: str,
    user: int | None,
    report: Report,
) -> None:
    image = {**_file(header.format, fd), "read-only": True}
    if header.format in ("qcow2", "vmdk"):
        image["backing"] = None
    if header.format == "vpc":
        image["force_size_calc"] = "current_size"  # as our parser: see formats/vpc.py
    size = header.virtual_size
    # Tables: 8 bytes of L2 and 2 of refcount for each 64 KiB. An image in which many addresses share one piece of
    # data can grow to its whole virtual size, so the room there is bounds it too.
    whole, room = size + size // 4096 + 16 * MIB, room_for(folder)
    report(0.0, f"converting {header.format}")

    def on_line(line: str) -> None:
        if found := _PERCENT.search(line):
            report(float(found[1]) / 100, f"converting {header.format}")

    try:
        await run_tool(
            [*_CONVERT, _json(image), _json(_file("qcow2", out))],
            limits=Limits(300 + size / SLOWEST, memory=TOOL_MEMORY, file_size=min(whole, room)),
            env={"MALLOC_ARENA_MAX": "2"},
            job=job,
            user=user,
            pass_fds=[fd, out],
            on_line=on_line,
        )
    except ToolFailed as error:
        too_large = "File too large" in error.detail or "SIGXFSZ" in error.detail
        if "No space left" in error.detail or (too_large and room < whole):
            raise pool_full(folder, f"no room for the image ({format_size(size)} at most)", room) from error
        if too_large:
            raise ImageUnsafe(f"the image holds more than the {format_size(size)} that it claims") from error
        raise


def _file(driver: str, fd: int) -> dict[str, Any]:
    """A block node on an open file, which is opened anew through its magic link, whoever may enter the folder. QEMU's
    image locks stay on."""
    return {"driver": driver, "file": {"driver": "file", "filename": f"/proc/self/fd/{fd}"}}


def _json(node: dict[str, Any]) -> str:
    return "json:" + json.dumps(node)
