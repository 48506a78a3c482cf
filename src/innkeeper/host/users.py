"""The unprivileged users that QEMU runs as: numbers only, with no entry in /etc/passwd."""

from __future__ import annotations

import os
from pathlib import Path

FIRST, COUNT = 1_900_000_000, 65_536
"""Above what systemd hands out to containers (524288-1879048191) and below 2^31; see systemd's UIDS-GIDS text."""


def uid_range() -> tuple[int, int] | None:
    """(first uid, count), gid = uid; None unless this process is root and its user namespace maps the range."""
    if os.geteuid() != 0:
        return None
    for name in ("uid_map", "gid_map"):
        if not covers(Path("/proc/self", name).read_text(), FIRST, COUNT):
            return None
    return FIRST, COUNT


def errand_uid() -> int | None:
    """The user for QEMUs that only answer a question: the last of the range, which no VM is given."""
    span = uid_range()
    return span[0] + span[1] - 1 if span else None


def covers(table: str, first: int, count: int) -> bool:
    """Whether one line of a uid_map (inside, outside, length; user_namespaces(7)) holds the whole range."""
    for line in table.splitlines():
        inside, _, length = (int(field) for field in line.split())
        if inside <= first and first + count <= inside + length:
            return True
    return False
