"""The log of a serial console: bounded without losing a byte that is being written, and readable from anywhere.

QEMU appends to the file for as long as it lives. Instead of renaming it under QEMU's feet, blocks at its beginning
are given back to the file system (`fallocate(FALLOC_FL_PUNCH_HOLE)`, fallocate(2)): the size, and so every reader's
offset, stays right, and what is left on disk is the last `KEPT` bytes.
"""

from __future__ import annotations

import asyncio
import ctypes
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
        if stat.st_blocks * 512 <= 2 * kept:
            return
        length = (stat.st_size - kept) // BLOCK * BLOCK
        if _libc.fallocate(fd, _PUNCH_HOLE | _KEEP_SIZE, ctypes.c_longlong(0), ctypes.c_longlong(length)):
            # A file system without holes: a plain cut, which can lose what arrives in this very moment.
            os.ftruncate(fd, 0)
    finally:
        os.close(fd)


async def read(path: Path, *, tail: int | None, follow: bool) -> AsyncIterator[bytes]:
    """The log, or its last `tail` lines; with `follow`, what comes after too, until the caller stops."""
    offset = _start(path, tail)
    while True:
        try:
            with path.open("rb") as file:
                if os.fstat(file.fileno()).st_size < offset:
                    offset = 0
                file.seek(offset)
                while block := file.read(BLOCK):
                    offset += len(block)
                    yield block
        except FileNotFoundError:
            offset = 0
        if not follow:
            return
        await asyncio.sleep(POLL)


def _start(path: Path, tail: int | None) -> int:
    """Where to begin: after the hole, or `tail` lines before the end."""
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            if not size:
                return 0
            try:
                first = os.lseek(file.fileno(), 0, os.SEEK_DATA)
            except OSError:
                first = 0
            if tail is None:
                return first
            begin = max(first, size - max(BLOCK, tail * 400))
            file.seek(begin)
            text = file.read()
    except FileNotFoundError:
        return 0
    lines = text.splitlines(keepends=True)
    return size - sum(len(line) for line in lines[max(0, len(lines) - tail) :]) if tail else size
