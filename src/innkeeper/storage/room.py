"""Room in a pool's file system."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from innkeeper.base.errors import PoolFull
from innkeeper.base.units import MIB, format_size


def room_for(folder: Path) -> int:
    """Bytes that may still be written in the folder's file system; a reserve stays free for everybody else."""
    state = os.statvfs(folder)
    reserve = min(state.f_blocks * state.f_frsize // 20, 256 * MIB)
    return max(0, state.f_bavail * state.f_frsize - reserve)


def pool_full(folder: Path, what: str, room: int | None = None) -> PoolFull:
    """The error that says what there is no room for, and how much there is."""
    left = room_for(folder) if room is None else room
    return PoolFull(f"{what}; {format_size(left)} may be used in {folder}", free=left)


@contextmanager
def full_pool_is(what: str, folder: Path) -> Iterator[None]:
    """`PoolFull` with these words, where a write inside finds the folder's file system full, or its quota used up."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise pool_full(folder, what) from error
        raise


def reserve(path: Path, size: int) -> None:
    """Have the first `size` bytes of a file on the disk, so that they can be written when the pool is full; what they
    hold stays. Raises `PoolFull`, `OSError`; also for what is no file."""
    fd = os.open(path, os.O_WRONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        with full_pool_is(f"no room for the head of {path.name}", path.parent):
            os.posix_fallocate(fd, 0, size)
    finally:
        os.close(fd)
