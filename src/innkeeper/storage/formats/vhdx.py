"""VHDX of Hyper-V: fixed and dynamic images.

Format: [MS-VHDX] and QEMU's block/vhdx.c (little-endian). Refused: a disk with a parent (differencing), and one whose
log holds changes that were not applied yet: QEMU opens such an image only for writing, to replay it, and a stranger's
file is opened read-only here.
"""

from __future__ import annotations

import struct
from uuid import UUID

from innkeeper.base.errors import ImageUnsafe
from innkeeper.base.units import KIB, MIB
from innkeeper.storage.formats.header import REPAIR_HINT, ImageHeader, Reader, check_virtual_size

MAGIC = b"vhdxfile"
_HEADER = struct.Struct("<4sIQ16s16s16sHHIQ")
_REGION = struct.Struct("<16sQII")
_ITEM = struct.Struct("<16sIIII")
BAT = UUID("2dc27766-f623-4200-9d64-115e9bfd4a08")
METADATA = UUID("8b7ca206-4790-4b9a-b8fe-575f050f886e")
FILE_PARAMETERS = UUID("caa16737-fa36-4d43-b3b6-33f0aa44e76b")
VIRTUAL_SIZE = UUID("2fa54224-cd1b-4876-b211-5dbed83bf4b8")
LOGICAL_SECTOR = UUID("8141bf1d-a96f-4709-ba47-f233a8faab5f")
PARENT_LOCATOR = UUID("a8d35f2d-b30b-454d-abf7-d3d84834ab0c")
FIXED, HAS_PARENT = 1, 2
"""Flags of the file parameters."""


def matches(reader: Reader) -> bool:
    return reader.peek(0, 8) == MAGIC


def parse(reader: Reader) -> ImageHeader:
    """Raises `ImageUnsafe`."""
    if _log_guid(reader) != bytes(16):
        raise ImageUnsafe("the VHDX image was not closed properly: its log must be replayed", hint=REPAIR_HINT)
    regions = _regions(reader)
    if BAT not in regions or METADATA not in regions:
        raise ImageUnsafe("the VHDX image has no block table or no metadata")
    items = _items(reader, *regions[METADATA])
    if PARENT_LOCATOR in items:
        raise ImageUnsafe(_PARENT, hint=_CONVERT)
    block, flags = struct.unpack("<II", _item(reader, items, FILE_PARAMETERS, 8))
    if flags & HAS_PARENT:
        raise ImageUnsafe(_PARENT, hint=_CONVERT)
    (size,) = struct.unpack("<Q", _item(reader, items, VIRTUAL_SIZE, 8))
    (sector,) = struct.unpack("<I", _item(reader, items, LOGICAL_SECTOR, 4))
    if sector != 512:  # QEMU 7.2 takes such a disk for one of an eighth of its size
        raise ImageUnsafe(f"the VHDX disk has logical sectors of {sector} bytes; only 512 is supported")
    if not MIB <= block <= 256 * MIB or block & (block - 1):
        raise ImageUnsafe(f"the VHDX image claims blocks of {block} bytes; powers of two to 256 MiB are allowed")
    check_virtual_size(size)
    if size % sector:
        raise ImageUnsafe(f"the disk's size, {size} bytes, is not a multiple of {sector}")
    blocks = -(-size // block)
    ratio = (sector << 23) // block
    entries = blocks + (blocks - 1) // ratio
    offset, length = regions[BAT]
    if entries * 8 > length or length > (64 * MIB << 12) // block + MIB:
        raise ImageUnsafe(f"the VHDX block table of {length} bytes does not fit {blocks} blocks")
    reader.check_inside(offset, length, "VHDX block table")
    return ImageHeader("vhdx", size, {"subformat": "fixed" if flags & FIXED else "dynamic", "cluster_size": block})


_PARENT = "the VHDX image stands on another one (a differencing disk)"
_CONVERT = "make one file of it where the other one lies: PowerShell `Convert-VHD`"


def _log_guid(reader: Reader) -> bytes:
    """Of the current one of two headers: valid, and with the higher sequence number."""
    best: tuple[int, bytes] | None = None
    for offset in (64 * KIB, 128 * KIB):
        block = reader.read(offset, 4 * KIB, "VHDX header")
        signature, checksum, sequence, _, _, log, _, version, _, _ = _HEADER.unpack_from(block)
        if signature != b"head" or version != 1 or checksum != crc32c(block[:4] + bytes(4) + block[8:]):
            continue
        if best is None or sequence > best[0]:
            best = sequence, log
    if best is None:
        raise ImageUnsafe("the VHDX image has no valid header", hint="the file is damaged: get it again")
    return best[1]


def _regions(reader: Reader) -> dict[UUID, tuple[int, int]]:
    """Offset and length of each region."""
    table = reader.read(192 * KIB, 64 * KIB, "VHDX region table")
    signature, _, count = struct.unpack_from("<4sII", table)
    if signature != b"regi" or count > 2047:
        raise ImageUnsafe("the VHDX region table is damaged")
    found: dict[UUID, tuple[int, int]] = {}
    for at in range(count):
        guid, offset, length, required = _REGION.unpack_from(table, 16 + at * _REGION.size)
        kind = UUID(bytes_le=guid)
        if kind in found or (required & 1 and kind not in (BAT, METADATA)):
            raise ImageUnsafe(f"the VHDX region {kind} is there twice, or nobody here knows it")
        if offset < MIB:
            raise ImageUnsafe(f"the VHDX region {kind} lies in the header")
        found[kind] = offset, length
    return found


def _items(reader: Reader, offset: int, length: int) -> dict[UUID, tuple[int, int]]:
    """Absolute offset and length of each metadata item."""
    table = reader.read(offset, 64 * KIB, "VHDX metadata table")
    signature, _, count = struct.unpack_from("<8sHH", table)
    if signature != b"metadata" or count > 2047:
        raise ImageUnsafe("the VHDX metadata table is damaged")
    found: dict[UUID, tuple[int, int]] = {}
    for at in range(count):
        guid, where, size, _, _ = _ITEM.unpack_from(table, 32 + at * _ITEM.size)
        kind = UUID(bytes_le=guid)
        if kind in found or where + size > length:
            raise ImageUnsafe(f"the VHDX metadata item {kind} is there twice, or out of bounds")
        found[kind] = offset + where, size
    return found


def _item(reader: Reader, items: dict[UUID, tuple[int, int]], kind: UUID, count: int) -> bytes:
    if kind not in items:
        raise ImageUnsafe(f"the VHDX metadata item {kind} is missing")
    return reader.read(items[kind][0], count, "VHDX metadata item")


def _crc_table() -> tuple[int, ...]:
    table = []
    for value in range(256):
        for _ in range(8):
            value = value >> 1 ^ (0x82F63B78 if value & 1 else 0)
        table.append(value)
    return tuple(table)


_CRC = _crc_table()


def crc32c(data: bytes) -> int:
    """CRC-32C (Castagnoli, RFC 3720 B.4), which zlib does not have."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc = crc >> 8 ^ _CRC[(crc ^ byte) & 0xFF]
    return crc ^ 0xFFFFFFFF
