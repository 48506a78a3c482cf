"""A guest's memory, read and written from outside its QEMU: process_vm_readv(2), proc(5) «pagemap».

A running guest stands still for a picture of its QEMU's memory (picture.py), which takes a moment whatever the size,
and is copied while the guest goes on. Where there is no picture, memory is copied twice: while the guest runs, which
takes as long as it takes and leaves the host with pages for all of it, and once more while it stands still, which takes
some 0.1 s for each GiB in use.

QEMU's own ways are slower (its migration stream has one thread, and looks at each page), or cannot be relied upon:
under software emulation QEMU before 9.0 loses track of some of what a guest writes (fixed by «physmem: Fix migration
dirty bitmap coherency with TCG memory access»). Its background-snapshot needs a privilege (userfaultfd(2)), hangs for
good when it is cancelled (7.2), and leaves all of RAM in use for each later copy (docs/benchmarks.md).
"""

from __future__ import annotations

import asyncio
import ctypes
import errno
import fcntl
import mmap
import os
import re
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from time import monotonic
from typing import TypeVar

import structlog

from innkeeper.base.errors import QemuFailed
from innkeeper.base.priority import LAST
from innkeeper.base.units import MIB
from innkeeper.qemu import aside
from innkeeper.qemu.monitor import Monitor
from innkeeper.qemu.picture import Picture
from innkeeper.qemu.process_memory import Vector, move, readv, writev
from innkeeper.qemu.ram import NAME, SEALS, extents

log = structlog.get_logger()

PAGE = mmap.PAGESIZE
HUGE = 2 * MIB
MOST = 2 * MIB
"""Bytes that are copied at once: between two, a cancel is seen."""
WORKERS = 2
"""Threads that copy: two are as fast as the memory of most hosts."""
REPORT_EVERY = 0.2
_PROCESS_MADVISE, _COLLAPSE = 440, 25
"""process_madvise(2), which glibc has since 2.36; MADV_COLLAPSE."""
_IN_USE = bytes(int(flags >= 0x40) for flags in range(256))
"""The highest byte of an entry in a pagemap → 1 if bit 63 or 62 is set: the page is in RAM, or in swap."""

Progress = Callable[[float | None], None]
T = TypeVar("T")


@dataclass(frozen=True)
class Region:
    """`size` bytes of QEMU's address space."""

    address: int
    size: int


async def regions(monitor: Monitor, memory: int) -> list[Region]:
    """Where the guest's RAM of `memory` bytes is, and what its screen shows. Raises `QmpFailed`, `QemuFailed`."""
    ram = await _host_address(monitor, 0)
    if ram is None:
        raise QemuFailed("QEMU does not say where the guest's memory is")
    found = [Region(ram, memory)]
    for bus in await monitor.execute("query-pci"):
        for device in bus["devices"]:
            for bar in device["regions"] if device["qdev_id"] == "vga" else ():
                screen = await _host_address(monitor, bar["address"]) if bar["bar"] == 0 else None
                if screen is not None:
                    found.append(Region(screen, bar["size"]))
    return found


async def _host_address(monitor: Monitor, guest: int) -> int | None:
    command = {"command-line": f"gpa2hva {guest:#x}"}
    answer = await monitor.execute("human-monitor-command", command)
    match = re.search(r"\((?:ram|.*vga\.vram)\) is (0x[0-9a-f]+)", answer)
    return int(match[1], 16) if match else None


class Copy:
    """What regions of a QEMU hold, one after the other, in a memfd: sparse as they are.

    `prepare` while the guest runs, `fix` while it stands still, `finish` while it runs again.
    """

    def __init__(self, pid: int, of: Sequence[Region]) -> None:
        self._pid, self._regions = pid, of
        self._picture: Picture | None = None
        self._had = b""
        self.size = sum(region.size for region in of)
        self.fd = os.memfd_create(NAME, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        os.ftruncate(self.fd, self.size)
        self._map: mmap.mmap | None = mmap.mmap(self.fd, self.size)

    async def prepare(self, progress: Progress) -> None:
        """Whatever makes `fix` quick. Raises `QemuFailed`."""
        try:
            self._picture = await Picture.ready(self._pid, [(region.address, region.size) for region in self._regions])
        except QemuFailed as error:
            log.info("memory is copied twice", reason=error.detail)
            await self._take(self._pid, progress)
        else:
            await gently(self._in_huge_pages)

    async def fix(self) -> None:
        """This is the moment of which the copy is. Raises `QemuFailed`."""
        if self._picture is not None:
            try:
                return await self._picture.take()
            except QemuFailed as error:
                log.warning("memory is copied while the guest waits", reason=error.detail)
                await self._drop_picture()
        await self._take(self._pid, None)

    async def finish(self, progress: Progress) -> None:
        """From here on it is whole. Raises `QemuFailed`."""
        if self._picture is not None:
            todo, _ = await self._look(self._picture.pid)
            told = monotonic()
            async for count in self._picture.read(self.fd, todo):
                if count == len(todo) or monotonic() - told > REPORT_EVERY:
                    told = monotonic()
                    progress(count / len(todo))
            await self._drop_picture()

    async def _drop_picture(self) -> None:
        picture, self._picture = self._picture, None
        if picture is not None:
            await picture.close()

    async def _take(self, pid: int, progress: Progress | None) -> None:
        """As it is now: what the guest has given back since the last time reads as zeros. With `progress` the guest
        runs meanwhile, and goes first; else it waits."""
        assert self._map is not None
        todo, has = await self._look(pid)
        await _move(readv, pid, self._map, todo, progress)
        gone = int.from_bytes(self._had, "big") & ~int.from_bytes(has, "big")
        for begin, end in _runs(gone.to_bytes(len(has), "big")):
            self._map.madvise(mmap.MADV_REMOVE, begin, end - begin)
        self._had = has

    async def _look(self, pid: int) -> tuple[list[tuple[int, int, int]], bytes]:
        """(offset in the copy, address in the process, length) of what there is to copy, and all pages as `in_use`."""
        todo, has, offset = [], b"", 0
        for region in self._regions:
            pages = await asyncio.to_thread(in_use, pid, region, self._pid)  # much to read, of a large guest
            todo += [(offset + at, region.address + at, length) for at, length in _pieces(_runs(pages))]
            has, offset = has + pages, offset + region.size
        return todo, has

    def _in_huge_pages(self) -> None:
        """Have RAM in huge pages again (MADV_COLLAPSE of madvise(2)), where the last picture has split them: the next
        is made in a tenth of the time. Where that is not possible it is not."""
        with suppress(OSError, QemuFailed), _pidfd(self._pid) as process:
            for region in self._regions:
                pages = in_use(self._pid, region)
                for at in range(-region.address % HUGE, region.size - HUGE + 1, HUGE):
                    if pages.count(1, at // PAGE, (at + HUGE) // PAGE) == HUGE // PAGE:
                        part = Vector(region.address + at, HUGE)
                        done = _libc.syscall(_PROCESS_MADVISE, process, ctypes.byref(part), 1, _COLLAPSE, 0)
                        if done < 0 and ctypes.get_errno() not in (errno.EAGAIN, errno.EBUSY):
                            return

    def append(self, data: bytes) -> None:
        """Put `data` behind it, once it is whole."""
        os.pwrite(self.fd, data, self.size)
        self.size += len(data)

    def seal(self) -> int:
        """A descriptor of the copy, which nobody can change any more."""
        self._unmap()
        fcntl.fcntl(self.fd, fcntl.F_ADD_SEALS, SEALS)
        return os.dup(self.fd)

    async def find(self, patterns: Sequence[bytes]) -> list[tuple[int, int]]:
        """(offset, index of the pattern) of every place that holds one of `patterns`. Raises `OSError`."""
        return await aside.find(self.fd, patterns)

    async def write(self, target: int) -> None:
        """Into a file, which is on the host's disk then. Raises `OSError`."""
        await aside.write(self.fd, self.size, target)

    def _unmap(self) -> None:
        if self._map is not None:
            self._map.close()
            self._map = None

    async def close(self) -> None:
        """Let go of it, unless it is sealed and in use elsewhere."""
        self._unmap()
        try:
            await self._drop_picture()  # its tracer opens `fd` by number: that must not be another file's by then
        finally:
            os.close(self.fd)


@contextmanager
def _pidfd(pid: int) -> Iterator[int]:
    fd = os.pidfd_open(pid)
    try:
        yield fd
    finally:
        os.close(fd)


async def put(pid: int, region: Region, file: int, offset: int, progress: Progress | None = None) -> None:
    """Have a region of a QEMU, which is all zeros, hold what the file has from `offset` on. Raises `QemuFailed`."""
    held = [(max(begin, offset), end) for begin, end in extents(file, offset + region.size)]
    todo = [(at, region.address + at - offset, length) for at, length in _pieces(held)]
    with mmap.mmap(file, offset + region.size, access=mmap.ACCESS_COPY) as source:
        await _move(writev, pid, source, todo, progress)


def in_use(pid: int, region: Region, of: int = 0) -> bytes:
    """A byte for each page of the region: 1 for those that it has of its own, or of a file that it maps. The others are
    all zeros, and reading them would make the host provide them. `of` is the process that it is a picture of, which has
    such a file open. Raises `QemuFailed`."""
    try:
        flags = bytearray(_pagemap(pid, region))
        for begin, end in _of_file(of or pid, region):
            pages = range(begin // PAGE, -(-end // PAGE))
            flags[pages.start : pages.stop] = b"\x01" * len(pages)
    except OSError as error:
        raise _failed(pid, "pagemap", error.errno or 0) from None
    return bytes(flags)


def _runs(flags: bytes) -> Iterator[tuple[int, int]]:
    """(begin, end) in bytes of pages one after the other that are 1."""
    end = 0
    while (begin := flags.find(b"\x01", end)) >= 0:
        end = flags.find(b"\x00", begin)
        end = len(flags) if end < 0 else end
        yield begin * PAGE, end * PAGE


def _pieces(runs: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    """(begin, length), each at most `MOST` bytes."""
    return [(at, min(MOST, end - at)) for begin, end in runs for at in range(begin, end, MOST)]


def _pagemap(pid: int, region: Region) -> bytes:
    """A byte for each page: whether it is in the process's page table."""
    with open(f"/proc/{pid}/pagemap", "rb", buffering=0) as file:  # noqa: PTH123 - a hot little read
        file.seek(region.address // PAGE * 8)
        entries, wanted = b"", region.size // PAGE * 8
        while len(entries) < wanted and (more := file.read(wanted - len(entries))):
            entries += more
    return entries[7::8].translate(_IN_USE)


def _of_file(pid: int, region: Region) -> list[tuple[int, int]]:
    """What the file that is mapped there holds, as a fork's RAM: pages that it never touched are not its own."""
    with open(f"/proc/{pid}/maps") as maps:  # noqa: PTH123 - a hot little read
        for line in maps:
            addresses, _, offset, _, inode, *name = line.split()
            begin, end = (int(each, 16) for each in addresses.split("-"))
            if begin <= region.address < end:
                break
        else:
            return []
    if inode == "0" or not name or int(offset, 16) != 0 or begin != region.address:
        return []
    for link in Path(f"/proc/{pid}/fd").iterdir():
        with suppress(FileNotFoundError):  # QEMU has closed it
            if str(link.readlink()) == " ".join(name) and str(link.stat().st_ino) == inode:
                with link.open("rb") as file:
                    return extents(file.fileno(), region.size)
    return []


_libc = ctypes.CDLL(None, use_errno=True)


async def _move(
    call: Callable[..., int], pid: int, ours: mmap.mmap, todo: list[tuple[int, int, int]], progress: Progress | None
) -> None:
    """`todo`: (offset in `ours`, address in the process, length)."""
    base = ctypes.addressof(ctypes.c_char.from_buffer(ours))
    left = deque(todo)

    def work() -> None:
        while left:
            try:
                offset, address, length = left.popleft()
            except IndexError:
                return
            try:
                move(call, pid, base + offset, address, length)
            except OSError as error:
                left.clear()
                raise _failed(pid, call.__name__, error.errno or 0) from None

    working = {asyncio.ensure_future((gently if progress else asyncio.to_thread)(work)) for _ in range(WORKERS)}
    try:
        running = working
        while running:
            _, running = await asyncio.wait(running, timeout=REPORT_EVERY)
            if progress and todo:
                progress(1 - len(left) / len(todo))
    except asyncio.CancelledError:
        left.clear()
        await asyncio.wait(working)  # they must not write to what is gone
        raise
    for each in working:
        each.result()


async def gently(work: Callable[[], T]) -> T:
    """In a thread of its own with the lowest priority; a guest is helped by that where sessions do not count
    (base/priority.py)."""

    def step_back() -> None:
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), LAST)

    thread = ThreadPoolExecutor(1, initializer=step_back)
    working = asyncio.get_running_loop().run_in_executor(thread, work)
    try:
        return await asyncio.shield(working)
    except asyncio.CancelledError:
        await asyncio.wait({working})  # what it works on is about to be closed
        raise
    finally:
        thread.shutdown(wait=False)


def _failed(pid: int, what: str, code: int) -> QemuFailed:
    hint = "sysctl kernel.yama.ptrace_scope=0 allows it" if code in (errno.EPERM, errno.EACCES) else ""
    return QemuFailed(f"the memory of process {pid} cannot be used ({what}): {os.strerror(code)}", hint=hint)
