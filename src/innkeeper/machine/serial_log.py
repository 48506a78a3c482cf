"""The log of a serial console: bounded without losing a byte that is being written, and readable from anywhere.

QEMU appends to the file for as long as it lives. Instead of renaming it under QEMU's feet, blocks at its beginning
are given back to the file system (`fallocate(FALLOC_FL_PUNCH_HOLE)`, fallocate(2)): the size, and so every reader's
offset, stays right, and what is left on disk is the last `KEPT` bytes.
"""

from __future__ import annotations

import asyncio
import ctypes
import errno
import os
from collections.abc import AsyncIterator
from pathlib import Path

from innkeeper.base.units import MIB

KEPT = 16 * MIB
"""Bytes of console output kept per VM."""
BLOCK = 64 * 1024
POLL = 0.2
"""Seconds between two looks at a log that is being followed."""

_KEEP_SIZE, _PUNCH_HOLE = 1, 2
_libc = ctypes.CDLL(None, use_errno=True)


def bound(path: Path, kept: int = KEPT) -> None:
    """Give back what lies more than `kept` bytes before the end, once that is worth it. Raises `OSError`."""
    fd = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
    try:
        stat = os.fstat(fd)
        length = (stat.st_size - kept) // BLOCK * BLOCK
        # Blocks beyond the end may be allocated too (XFS does), so they alone say nothing.
        if stat.st_blocks * 512 <= 2 * kept or length <= 0:
            return
        if _libc.fallocate(fd, _PUNCH_HOLE | _KEEP_SIZE, ctypes.c_longlong(0), ctypes.c_longlong(length)):
            code = ctypes.get_errno()
            if code != errno.EOPNOTSUPP:
                raise OSError(code, os.strerror(code), str(path))
            # A file system without holes: a plain cut, which can lose what arrives in this very moment.
            os.ftruncate(fd, 0)
    finally:
        os.close(fd)


async def read(path: Path, *, tail: int | None, follow: bool) -> AsyncIterator[bytes]:
    """The log, or its last `tail` lines; with `follow`, what comes after too, until the caller stops.

    What was given back to the file system while a slow reader was on its way is left out.
    """
    offset: int | None = None
    while True:
        try:
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            offset = 0
        else:
            try:
                if offset is None:
                    offset = _start(fd, tail)
                if os.fstat(fd).st_size < offset:
                    offset = 0
                while block := os.pread(fd, BLOCK, offset := _data(fd, offset)):
                    offset += len(block)
                    yield block
            finally:
                os.close(fd)
        if not follow:
            return
        await asyncio.sleep(POLL)


def _data(fd: int, offset: int) -> int:
    """The first byte at or after `offset` that is not in a hole (lseek(2))."""
    try:
        return os.lseek(fd, offset, os.SEEK_DATA)
    except OSError:  # at the end, or a file system that knows no holes
        return offset


def _start(fd: int, tail: int | None) -> int:
    """Where to begin: after the hole, or `tail` lines before the end."""
    if tail is None:
        return 0
    end = begin = os.fstat(fd).st_size
    first = _data(fd, 0)
    if tail <= 0:
        return end
    while begin > first:
        size = min(BLOCK, begin - first)
        begin -= size
        text = os.pread(fd, size, begin)
        # The newline that ends the last line does not begin another.
        at = len(text) - (begin + size == end)
        if (found := text.count(b"\n", 0, at)) < tail:
            tail -= found
            continue
        for _ in range(tail):
            at = text.rfind(b"\n", 0, at)
        return begin + at + 1
    return first
