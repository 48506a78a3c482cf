"""Room in a pool's file system."""

from __future__ import annotations

import os
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
