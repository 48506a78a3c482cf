"""What a process takes of the host, as the kernel counts it."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple


class Used(NamedTuple):
    """What a process takes of the host's memory, in bytes: pages that are its alone, and its part of those that it
    shares with others, each page counted once over all that share it (proc(5), smaps_rollup: Private_*, Pss)."""

    private: int
    shared: int


def used_by(pid: int) -> Used | None:
    """None when the process is gone, or may not be looked at."""
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:]
    except OSError:
        return None
    sizes = {name: int(value.split()[0]) * 1024 for name, _, value in (line.partition(":") for line in lines)}
    private = sizes["Private_Clean"] + sizes["Private_Dirty"]
    return Used(private, max(0, sizes["Pss"] - private))
