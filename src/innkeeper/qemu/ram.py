"""Captured RAM, as QEMU gets it: a sealed copy in memory of the file on disk.

Forks map the copy privately, so they share every page that none of them has written. It is a memfd with all seals
(memfd_create(2), fcntl(2) «File Sealing»): QEMU 7.2 opens a RAM file for writing even where it maps it privately, and
punches holes into it for a balloon (softmmu/physmem.c, ram_block_discard_range), so a file that others start from must
be one that nobody can change. The file on disk outlives the host's reboot; the copy is made at the first fork.
"""

from __future__ import annotations

import asyncio
import errno
import fcntl
import mmap
import os
from collections.abc import Sequence
from pathlib import Path

from innkeeper.base.errors import NotFound, QemuFailed

NAME = "innkeeper-ram"
"""What the copies are called in a process's maps."""
SEARCHED = 4 << 20
"""Bytes that are searched before other threads get a turn."""
SEALS = fcntl.F_SEAL_SEAL | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE


class RamImages:
    """The copies there are, by image id."""

    def __init__(self) -> None:
        self._copies: dict[str, asyncio.Future[int]] = {}

    async def get(self, image_id: str, path: Path) -> int:
        """A descriptor of the copy; it stays ours. Raises `NotFound` when the file is gone."""
        if image_id not in self._copies:
            self._copies[image_id] = asyncio.create_task(asyncio.to_thread(_copy, path))
        task = self._copies[image_id]
        try:
            return await asyncio.shield(task)
        except OSError as error:
            self._copies.pop(image_id, None)
            raise NotFound(f"{path} cannot be read: {error.strerror}") from None

    def put(self, image_id: str, copy: int) -> None:
        """Take over a sealed copy that has been made elsewhere."""
        self._copies[image_id] = done = asyncio.get_running_loop().create_future()
        done.set_result(copy)

    def drop(self, image_id: str) -> None:
        """Let go of a copy; forks that run keep theirs."""
        task = self._copies.pop(image_id, None)
        if task is not None and task.done() and not task.cancelled() and task.exception() is None:
            os.close(task.result())

    def close(self) -> None:
        """Let go of all."""
        for image_id in list(self._copies):
            self.drop(image_id)


def _copy(path: Path) -> int:
    source = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    try:
        target = os.memfd_create(NAME, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            copy_sparse(source, target, os.fstat(source).st_size)
            fcntl.fcntl(target, fcntl.F_ADD_SEALS, SEALS)
            return target
        except BaseException:
            os.close(target)
            raise
    finally:
        os.close(source)


def copy_sparse(source: int, target: int, size: int) -> None:
    """What a file holds into an empty one, of `size` bytes then."""
    os.ftruncate(target, size)
    for begin, end in extents(source, size):
        while begin < end:
            os.lseek(target, begin, os.SEEK_SET)
            begin += os.sendfile(target, source, begin, min(end - begin, 1 << 26))


def find_all(file: int, patterns: Sequence[bytes]) -> list[tuple[int, int]]:
    """(offset, index of the pattern) of every place in captured RAM that holds one of `patterns`."""
    found, size = [], os.fstat(file).st_size
    with mmap.mmap(file, size, prot=mmap.PROT_READ) as ram:
        for begin, end in extents(file, size):
            for start in range(begin, end, SEARCHED):
                for index, pattern in enumerate(patterns):
                    at, stop = start - 1, min(start + SEARCHED + len(pattern) - 1, size)
                    while (at := ram.find(pattern, at + 1, stop)) >= 0:
                        found.append((at, index))
    return sorted(set(found))


def overwrite(pid: int, writes: Sequence[tuple[int, bytes]]) -> None:
    """Change the RAM of a QEMU that maps a copy privately, at these offsets, before its guest runs (proc(5), mem).

    Raises `QemuFailed` where that is not permitted."""
    try:
        with open(f"/proc/{pid}/maps") as maps:  # noqa: PTH123 - a hot little read
            mapped = [line.split() for line in maps if f"/memfd:{NAME}" in line]
        fd = os.open(f"/proc/{pid}/mem", os.O_RDWR | os.O_CLOEXEC)
        try:
            for addresses, _, offset, *_ in mapped:
                begin, end = (int(each, 16) for each in addresses.split("-"))
                first = int(offset, 16)
                for at, data in writes:
                    if first <= at < first + end - begin:
                        os.pwrite(fd, data, begin + at - first)
        finally:
            os.close(fd)
    except OSError as error:
        raise QemuFailed(f"the memory of process {pid} cannot be written: {error.strerror}") from None


def extents(fd: int, size: int) -> list[tuple[int, int]]:
    """(begin, end) of the parts of a sparse file's first `size` bytes that hold data (lseek(2), SEEK_DATA)."""
    found, at = [], 0
    while at < size:
        try:
            begin = os.lseek(fd, at, os.SEEK_DATA)
        except OSError as error:
            if error.errno == errno.ENXIO:
                break
            raise
        at = min(os.lseek(fd, begin, os.SEEK_HOLE), size)
        if begin < at:
            found.append((begin, at))
    return found
