"""What every format parser returns, and the bounded window through which it reads."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field

from innkeeper.base.errors import ImageUnsafe
from innkeeper.base.units import MIB, TIB, format_size

MAX_VIRTUAL_SIZE = 64 * TIB
"""Larger disks are refused: nobody has one, and tables that size exist only to exhaust memory."""
READ_BUDGET = 8 * MIB
"""Bytes that inspecting one image may read in all."""

REPAIR_HINT = "on a copy that you trust, run `qemu-img check -r all FILE`, then import it again"


@dataclass(frozen=True)
class ImageHeader:
    """What an image says about itself, after it was found to be harmless."""

    format: str
    """`qcow2`, `vmdk`, `vdi`, `vhdx`, `vpc` or `raw`: QEMU's driver names."""
    virtual_size: int
    """Bytes that the guest sees."""
    facts: Mapping[str, int | str | bool] = field(default_factory=dict)
    """What else is worth recording, by format: version, cluster_size, compression, subformat, snapshots, …"""


class Reader:
    """An open image file, of which at most `READ_BUDGET` bytes are read, all within its bounds."""

    def __init__(self, fd: int, size: int) -> None:
        self._fd = fd
        self._left = READ_BUDGET
        self.size = size

    def read(self, offset: int, count: int, what: str) -> bytes:
        """Exactly `count` bytes at `offset`, or `ImageUnsafe` that says `what` lies outside the file."""
        self.check_inside(offset, count, what)
        if count > self._left:
            raise ImageUnsafe(f"the {what} is too large to be read ({format_size(count)})")
        self._left -= count
        parts = []
        while count:
            part = os.pread(self._fd, count, offset)
            if not part:  # it became shorter while we read it
                raise ImageUnsafe(f"the {what} ends too soon")
            parts.append(part)
            offset += len(part)
            count -= len(part)
        return b"".join(parts)

    def peek(self, offset: int, count: int) -> bytes:
        """As `read`, of what there is: shorter, or empty, where the file ends."""
        offset = min(max(0, offset), self.size)
        return self.read(offset, max(0, min(count, self.size - offset)), "image")

    def check_inside(self, offset: int, count: int, what: str) -> None:
        """`ImageUnsafe` if a table at `offset` of `count` bytes is not wholly inside the file."""
        if offset < 0 or count < 0 or offset + count > self.size:
            raise ImageUnsafe(
                f"the {what} (offset {offset}, {count} bytes) lies outside the file of {self.size} bytes",
                hint="the file is damaged or was cut off: get it again",
            )


def check_virtual_size(size: int) -> None:
    """`ImageUnsafe` for a disk without a byte, or with more than `MAX_VIRTUAL_SIZE`."""
    if size <= 0:
        raise ImageUnsafe("the disk in the image has no size")
    if size > MAX_VIRTUAL_SIZE:
        raise ImageUnsafe(
            f"the disk claims {size} bytes; at most {format_size(MAX_VIRTUAL_SIZE)} is supported", size=size
        )


def quoted(name: bytes) -> str:
    """A name out of an image, fit for a message: printable ASCII, at most 200 characters."""
    return repr(name[:200].decode("ascii", errors="backslashreplace"))
