"""VirtualBox's VDI, version 1.1: dynamic and fixed ("static") images.

Format: QEMU's block/vdi.c (little-endian). A differencing image stands on a parent, which VirtualBox finds by its
UUID; QEMU cannot read one, and it is refused.
"""

from __future__ import annotations

import struct

from innkeeper.base.errors import ImageUnsafe
from innkeeper.base.units import MIB
from innkeeper.storage.formats.header import ImageHeader, Reader, check_virtual_size

SIGNATURE = struct.pack("<I", 0xBEDA107F)
_HEADER = struct.Struct("<4sIIII256sIIIIIIIQIIII16s16s16s16s")  # after 64 bytes of text
TYPES = {1: "dynamic", 2: "fixed"}
BLOCK = MIB
"""The one block size that QEMU reads, and VirtualBox writes."""


def matches(reader: Reader) -> bool:
    return reader.peek(64, 4) == SIGNATURE


def parse(reader: Reader) -> ImageHeader:
    """Raises `ImageUnsafe`."""
    (
        _, version, _, kind, _, _, map_offset, data_offset, _, _, _, sector, _, size, block, _, blocks, _,
        _, _, link, parent,
    ) = _HEADER.unpack(reader.read(64, _HEADER.size, "VDI header"))  # fmt: skip
    if version != 0x00010001:
        raise ImageUnsafe(f"VDI version {version >> 16}.{version & 0xFFFF} is not supported, only 1.1 is")
    if any(parent) or any(link) or kind not in TYPES:
        raise ImageUnsafe(
            f"the VDI image stands on another one (type {kind}, a differencing image or snapshot)",
            hint="make one image of it: `VBoxManage clonemedium SOURCE FLAT.vdi`",
        )
    if sector != 512 or block != BLOCK:
        raise ImageUnsafe(f"the VDI image has sectors of {sector} and blocks of {block} bytes, not 512 and 1 MiB")
    check_virtual_size(size)
    if size > blocks * BLOCK:
        raise ImageUnsafe(f"the disk's {size} bytes do not fit in {blocks} blocks of 1 MiB")
    if map_offset < 512 or map_offset % 512 or data_offset % 512 or data_offset < map_offset + blocks * 4:
        raise ImageUnsafe(f"the VDI block map (offset {map_offset}) and data ({data_offset}) are out of place")
    reader.check_inside(map_offset, blocks * 4, "VDI block map")
    return ImageHeader("vdi", -(-size // 512) * 512, {"subformat": TYPES[kind], "cluster_size": BLOCK})
