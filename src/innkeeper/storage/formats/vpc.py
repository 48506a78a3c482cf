"""VHD, which QEMU calls vpc: fixed and dynamic images of Virtual PC, Hyper-V, Azure, XenServer and VirtualBox.

Format: "Virtual Hard Disk Image Format Specification" 1.0 (Microsoft, 2006) and QEMU's block/vpc.c (big-endian).
A dynamic image begins with a copy of the footer; a fixed one is a raw disk with the footer behind it.

The disk's size is taken from the footer's "current size". QEMU by itself takes the CHS geometry for programs that it
does not know, which cuts off the end of disks that VirtualBox made; so `convert` tells it the same
(`force_size_calc`). A disk of Virtual PC can get a few sectors longer by this, never shorter.
"""

from __future__ import annotations

import struct

from innkeeper.base.errors import ImageUnsafe
from innkeeper.storage.formats.header import ImageHeader, Reader, check_virtual_size, quoted

COOKIE, DYNAMIC_COOKIE = b"conectix", b"cxsparse"
_FOOTER = struct.Struct(">8sIIQI4sHH4sQQHBBI")
_DYNAMIC = struct.Struct(">8sQQIIII16sII")
FIXED, DYNAMIC, DIFFERENCING = 2, 3, 4
MAX_SIZE = 0xFF000000 * 512
"""2040 GiB: the format's own limit."""


def matches(reader: Reader) -> bool:
    """A footer at the beginning, or a valid one at the end."""
    if reader.peek(0, 8) == COOKIE:
        return True
    end = reader.peek(reader.size - 512, 512)
    return end[:8] == COOKIE and _checksum_is_right(end, 64)


def parse(reader: Reader) -> ImageHeader:
    """Raises `ImageUnsafe`."""
    at_start = reader.peek(0, 8) == COOKIE
    footer = reader.read(0 if at_start else reader.size - 512, 512, "VHD footer")
    _, _, _, data_offset, _, creator, _, _, _, _, size, _, _, _, kind = _FOOTER.unpack_from(footer)
    if footer[:8] != COOKIE or not _checksum_is_right(footer, 64):
        raise ImageUnsafe("the VHD footer's checksum is wrong", hint="the file is damaged: get it again")
    if kind == DIFFERENCING:
        raise ImageUnsafe(
            "the VHD image stands on another one (a differencing disk)",
            hint="make one file of it where the other one lies: PowerShell `Convert-VHD`",
        )
    if kind != (DYNAMIC if at_start else FIXED):
        raise ImageUnsafe(f"a VHD of type {kind} does not have its footer where this one has it")
    check_virtual_size(size)
    if size > MAX_SIZE or size % 512:
        raise ImageUnsafe(f"a VHD disk cannot have {size} bytes")
    facts: dict[str, int | str | bool] = {"creator": quoted(creator)[1:-1]}
    if kind == FIXED:
        reader.check_inside(0, size + 512, "VHD disk")
        return ImageHeader("vpc", size, {"subformat": "fixed", **facts})

    header = reader.read(data_offset, 1024, "VHD dynamic disk header")
    cookie, _, table, _, entries, block, _, _, _, _ = _DYNAMIC.unpack_from(header)
    if cookie != DYNAMIC_COOKIE or not _checksum_is_right(header, 36):
        raise ImageUnsafe("the VHD dynamic disk header is damaged")
    if block < 512 or block & (block - 1):
        raise ImageUnsafe(f"the VHD claims blocks of {block} bytes, which is no power of two")
    if entries > MAX_SIZE // block or entries * block < size:
        raise ImageUnsafe(f"the VHD's {entries} blocks of {block} bytes do not fit a disk of {size} bytes")
    reader.check_inside(table, entries * 4, "VHD block table")
    return ImageHeader("vpc", size, {"subformat": "dynamic", "cluster_size": block, **facts})


def _checksum_is_right(block: bytes, at: int) -> bool:
    """One's complement of the sum of all bytes without the four of the checksum itself."""
    if len(block) < at + 4:
        return False
    (stored,) = struct.unpack_from(">I", block, at)
    return bool(stored == ~(sum(block) - sum(block[at : at + 4])) & 0xFFFFFFFF)
