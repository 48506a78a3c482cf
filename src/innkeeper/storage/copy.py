"""Copy files: their blocks are shared where the file system can (reflinks of xfs and btrfs), else only what is data is
copied, several pieces at a time. Nothing in a file is looked at, so it does not matter who wrote it.

ioctl_ficlonerange(2), lseek(2) SEEK_DATA, copy_file_range(2).
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import fcntl
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from innkeeper.base.units import MIB, format_size
from innkeeper.storage.room import full_pool_is, pool_full, room_for
from innkeeper.storage.threads import in_thread

Report = Callable[[float | None, str], None]
"""Progress: a fraction from 0 to 1 (`None`: not known), and a line for people."""

FICLONE = 0x40049409
"""linux/fs.h: make one file share all blocks of another, copy-on-write (btrfs, xfs)."""
PIECE = 16 * MIB
"""Bytes that one thread copies before it takes the next piece."""
BLOCK = 4 * MIB
"""Bytes between two looks whether to stop."""
AT_ONCE = 4
"""Pieces at a time: enough to keep a disk busy that answers several requests at once."""
_NO_COPY_IN_KERNEL = (errno.EXDEV, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)


async def copy_files(pairs: Sequence[tuple[int, Path]], *, report: Report) -> None:
    """From open files to new ones, 0600 and ours, whole and on the host's disk: all of them, or none is left.

    Raises `PoolFull`, `OSError`; `FileExistsError` where a target is there. Safe to cancel.
    """
    made: list[tuple[int, Path]] = []
    try:
        with full_pool_is("no room for the copy", pairs[0][1].parent):
            for _, target in pairs:
                flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
                made.append((os.open(target, flags, 0o600), target))
            await _fill([(fd, out) for (fd, _), (out, _) in zip(pairs, made, strict=True)], pairs[0][1].parent, report)
    except BaseException:
        for _, target in made:
            target.unlink(missing_ok=True)
        raise
    finally:
        for out, _ in made:
            os.close(out)


async def _fill(pairs: Sequence[tuple[int, int]], folder: Path, report: Report) -> None:
    left = [(fd, out) for fd, out in pairs if not share(fd, out)]
    total, room = sum(data_size(fd) for fd, _ in left), room_for(folder)
    if total > room:
        raise pool_full(folder, f"the copy needs {format_size(total)}", room)
    loop, lock, done = asyncio.get_running_loop(), threading.Lock(), 0

    def tell(more: int) -> None:
        nonlocal done
        with lock:
            done += more
        text = f"copying, {format_size(done)} of {format_size(total)}"
        loop.call_soon_threadsafe(report, min(1.0, done / total), text)

    def work(stop: threading.Event) -> None:
        for fd, out in left:
            copy_data(fd, out, stop, tell)
        for _, out in pairs:
            if not stop.is_set():
                os.fsync(out)

    await in_thread(work)


def share(fd: int, out: int) -> bool:
    """Have `out` share all blocks of `fd`, which takes no room and no time; False where the file system cannot."""
    with contextlib.suppress(OSError):
        fcntl.ioctl(out, FICLONE, fd)
        return True
    return False


def data_size(fd: int) -> int:
    """Bytes of data in a file, without its holes."""
    return sum(end - begin for begin, end in _extents(fd, os.fstat(fd).st_size))


def copy_data(fd: int, out: int, stop: threading.Event, tell: Callable[[int], None]) -> None:
    """Only what is data; the size is the one at the beginning, however the file grows. `tell` is told, in any thread,
    how many more bytes are copied. Blocks; ends early when `stop` is set. Raises OSError."""
    size = os.fstat(fd).st_size
    os.ftruncate(out, size)
    pieces = [(at, min(at + PIECE, end)) for begin, end in _extents(fd, size) for at in range(begin, end, PIECE)]
    with ThreadPoolExecutor(AT_ONCE, thread_name_prefix="copy") as pool:
        running = [pool.submit(_copy_piece, fd, out, *piece, stop, tell) for piece in pieces]
        try:
            for each in running:
                each.result()
        except BaseException:
            stop.set()
            raise


def _extents(fd: int, size: int) -> Iterator[tuple[int, int]]:
    """Where the data is: (begin, end), in order."""
    at = 0
    while at < size:
        try:
            at = os.lseek(fd, at, os.SEEK_DATA)
            end = min(os.lseek(fd, at, os.SEEK_HOLE), size)
        except OSError as error:
            if error.errno == errno.ENXIO:  # a hole up to the end
                return
            raise
        if at >= size:
            return
        yield at, end
        at = end


def _copy_piece(fd: int, out: int, at: int, end: int, stop: threading.Event, tell: Callable[[int], None]) -> None:
    in_kernel = True
    while at < end and not stop.is_set():
        done = 0
        wanted = min(BLOCK, end - at)
        if in_kernel:
            try:
                done = os.copy_file_range(fd, out, wanted, at, at)
            except OSError as error:
                if error.errno not in _NO_COPY_IN_KERNEL:
                    raise
                in_kernel = False
        if not in_kernel:
            block = os.pread(fd, wanted, at)
            while done < len(block):
                done += os.pwrite(out, block[done:], at + done)
        if done == 0:
            return  # it became shorter
        at += done
        tell(done)
