"""qcow2, versions 2 and 3: reading a stranger's header, and writing empty images and overlays of our own.

Format: QEMU's docs/interop/qcow2.txt (big-endian). Limits are those of QEMU's block/qcow2.c and block/qcow2.h.

Internal snapshots are accepted and counted in the facts: conversion reads the active state only, so they are left
behind, and nothing in them names another file.
"""

from __future__ import annotations

import os
import struct
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from innkeeper.base.errors import ImageFormatUnknown, ImageUnsafe, InvalidInput
from innkeeper.base.units import MIB
from innkeeper.storage.formats.header import REPAIR_HINT, ImageHeader, Reader, check_virtual_size, quoted

MAGIC = b"QFI\xfb"
_V2 = struct.Struct(">4sIQIIQIIQQIIQ")  # 72 bytes
_V3 = struct.Struct(">QQQII")  # 32 bytes after it

DIRTY, CORRUPT, EXTERNAL_DATA, COMPRESSION, EXTENDED_L2 = (1 << bit for bit in range(5))
KNOWN_INCOMPATIBLE = DIRTY | CORRUPT | EXTERNAL_DATA | COMPRESSION | EXTENDED_L2
RAW_EXTERNAL = 1 << 1
"""An autoclear feature."""

EXT_END, EXT_BACKING_FORMAT, EXT_DATA_FILE = 0, 0xE2792ACA, 0x44415441
EXT_ENCRYPTION, EXT_BITMAPS = 0x0537BE77, 0x23852875

MAX_L1_BYTES = 32 * MIB
MAX_REFCOUNT_TABLE_BYTES = 8 * MIB
MAX_SNAPSHOTS = 65536
SNAPSHOT_HEADER_BYTES = 40
MAX_EXTENSIONS = 64
MAX_BACKING_NAME = 1023

CLUSTER_BITS = 16
CLUSTER = 1 << CLUSTER_BITS
"""Cluster size of the images that we write: 64 KiB, QEMU's default."""


@dataclass(frozen=True)
class _Header:
    version: int
    backing_offset: int
    backing_size: int
    cluster_bits: int
    size: int
    encryption: int
    l1_size: int
    l1_offset: int
    refcount_offset: int
    refcount_clusters: int
    snapshots: int
    snapshots_offset: int
    incompatible: int = 0
    compatible: int = 0
    autoclear: int = 0
    refcount_order: int = 4
    length: int = 72


def matches(reader: Reader) -> bool:
    return reader.peek(0, 4) == MAGIC


def parse(reader: Reader) -> ImageHeader:
    """Raises `ImageUnsafe`, or `ImageFormatUnknown` for the old version 1."""
    header = _read(reader)
    cluster = 1 << header.cluster_bits
    _refuse_references(reader, header)
    _check_features(header)
    if header.version == 3 and (not 104 <= header.length <= cluster or header.length % 8):
        raise ImageUnsafe(f"the qcow2 header claims a length of {header.length} bytes")
    extensions = _extensions(reader, header)
    if EXT_DATA_FILE in extensions:
        name = quoted(extensions[EXT_DATA_FILE])
        raise ImageUnsafe(f"the image keeps its data in another file, {name}", hint=_FLATTEN)
    if EXT_ENCRYPTION in extensions:
        raise ImageUnsafe("the image is encrypted", hint="decrypt it with `qemu-img convert` first")
    compression = 0
    if header.length > 104:
        compression = reader.read(104, 1, "qcow2 header")[0]
    if compression > 1 or bool(compression) != bool(header.incompatible & COMPRESSION):
        raise ImageUnsafe(f"the image's compression type {compression} contradicts its feature bits")

    check_virtual_size(header.size)
    if header.size % 512:
        raise ImageUnsafe(f"the disk's size, {header.size} bytes, is not a multiple of 512")
    entry = 16 if header.incompatible & EXTENDED_L2 else 8
    needed = -(-header.size // (cluster * (cluster // entry)))
    if header.l1_size < needed:
        raise ImageUnsafe(f"the L1 table has {header.l1_size} entries; the disk's size needs {needed}")
    if not 0 < header.refcount_clusters * cluster <= MAX_REFCOUNT_TABLE_BYTES:
        raise ImageUnsafe(f"the refcount table claims {header.refcount_clusters} clusters")
    if header.snapshots > MAX_SNAPSHOTS:
        raise ImageUnsafe(f"the image claims {header.snapshots} snapshots")
    for what, offset, count, most in (
        ("L1 table", header.l1_offset, header.l1_size * 8, MAX_L1_BYTES),
        ("refcount table", header.refcount_offset, header.refcount_clusters * cluster, 1 << 32),
        ("snapshot table", header.snapshots_offset, header.snapshots * SNAPSHOT_HEADER_BYTES, 1 << 32),
    ):
        if not count:
            continue
        if count > most:
            raise ImageUnsafe(f"the {what} claims {count} bytes; at most {most} are allowed")
        if offset < cluster or offset % cluster:
            raise ImageUnsafe(f"the {what}'s offset, {offset}, is not that of a cluster")
        reader.check_inside(offset, count, what)
    return ImageHeader(
        "qcow2",
        header.size,
        {
            "version": header.version,
            "cluster_size": cluster,
            "compression": ("zlib", "zstd")[compression],
            "refcount_bits": 1 << header.refcount_order,
            "lazy_refcounts": bool(header.compatible & 1),
            "extended_l2": bool(header.incompatible & EXTENDED_L2),
            "snapshots": header.snapshots,
            "bitmaps": EXT_BITMAPS in extensions,
        },
    )


def read_size(fd: int) -> int:
    """The virtual size in bytes of a qcow2 of ours, which may have a backing file."""
    size = _read(Reader(fd, os.fstat(fd).st_size)).size
    check_virtual_size(size)
    return size


_FLATTEN = "make one file of it where the other one lies: `qemu-img convert -O qcow2 IMAGE FLAT.qcow2`"


def _read(reader: Reader) -> _Header:
    head = reader.read(0, _V2.size, "qcow2 header")
    magic, *fields = _V2.unpack(head)
    if magic != MAGIC:
        raise ImageFormatUnknown("the file is not a qcow2 image")
    header = _Header(*fields)
    if header.version == 1:
        raise ImageFormatUnknown(
            "the file is in the old qcow format (version 1)", hint="convert it: `qemu-img convert -O qcow2`"
        )
    if header.version not in (2, 3):
        raise ImageUnsafe(f"qcow2 version {header.version} does not exist")
    if not 9 <= header.cluster_bits <= 21:
        raise ImageUnsafe(f"the image claims clusters of 2^{header.cluster_bits} bytes; 2^9 to 2^21 are allowed")
    if header.version == 3:
        header = _Header(*fields, *_V3.unpack(reader.read(_V2.size, _V3.size, "qcow2 header")))
    return header


def _refuse_references(reader: Reader, header: _Header) -> None:
    if header.backing_offset:
        count = min(header.backing_size, MAX_BACKING_NAME)
        name = quoted(reader.peek(header.backing_offset, count))
        raise ImageUnsafe(f"the image stands on another file, {name} (its backing file)", hint=_FLATTEN)
    if header.encryption:
        raise ImageUnsafe("the image is encrypted", hint="decrypt it with `qemu-img convert` first")
    if header.incompatible & EXTERNAL_DATA or header.autoclear & RAW_EXTERNAL:
        raise ImageUnsafe("the image keeps its data in another file (external data file)", hint=_FLATTEN)


def _check_features(header: _Header) -> None:
    if unknown := header.incompatible & ~KNOWN_INCOMPATIBLE:
        bits = ", ".join(str(bit) for bit in range(64) if unknown >> bit & 1)
        raise ImageUnsafe(f"the image needs features that nobody here knows (incompatible bits {bits})")
    if header.incompatible & CORRUPT:
        raise ImageUnsafe("the image is marked as corrupt", hint=REPAIR_HINT)
    if header.incompatible & DIRTY:
        raise ImageUnsafe("the image was not closed properly (dirty bit)", hint=REPAIR_HINT)
    if header.incompatible & EXTENDED_L2 and header.cluster_bits < 14:
        raise ImageUnsafe("extended L2 entries need clusters of at least 16 KiB")
    if header.refcount_order > 6:
        raise ImageUnsafe(f"refcounts of 2^{header.refcount_order} bits do not exist")


def _extensions(reader: Reader, header: _Header) -> dict[int, bytes]:
    """The header extensions by type; they lie between the header and the end of the first cluster."""
    area = reader.peek(header.length, (1 << header.cluster_bits) - header.length)
    found: dict[int, bytes] = {}
    at = 0
    while at + 8 <= len(area):
        kind, length = struct.unpack_from(">II", area, at)
        if kind == EXT_END:
            break
        if at + 8 + length > len(area):
            raise ImageUnsafe(f"header extension {kind:#x} ({length} bytes) leaves the first cluster")
        if kind in found:
            raise ImageUnsafe(f"header extension {kind:#x} appears twice")
        found[kind] = area[at + 8 : at + 8 + length]
        if len(found) > MAX_EXTENSIONS:
            raise ImageUnsafe(f"the image has more than {MAX_EXTENSIONS} header extensions")
        at += 8 + (length + 7) // 8 * 8
    return found


def write_empty(target: Path, size: int, *, mode: int = 0o600, durable: bool = True) -> None:
    """A new qcow2 (v3, 64 KiB clusters) of `size` bytes, rounded up to 512, that reads as zeros.

    The file appears under its name at once: call it for a staged name. Raises `FileExistsError`, and leaves
    nothing behind when it fails. `durable` syncs the file.
    """
    _write(target, size, b"", "", mode, durable)


def write_overlay(
    target: Path, base: Path, base_format: str, size: int, *, mode: int = 0o600, durable: bool = True
) -> None:
    """As `write_empty`, standing on `base` (absolute) with its format recorded, so that it is never probed."""
    if not base.is_absolute():
        raise InvalidInput(f"backing file {str(base)!r} is not absolute")
    name = os.fsencode(base)
    if len(name) > MAX_BACKING_NAME:
        raise InvalidInput(f"the path of the backing file is longer than {MAX_BACKING_NAME} bytes: {base}")
    _write(target, size, name, base_format, mode, durable)


def _write(target: Path, size: int, base: bytes, base_format: str, mode: int, durable: bool) -> None:
    """Clusters: 0 header, 1 refcount table, 2 refcount block, 3… L1 table; of the last two only what is not 0.

    One refcount block counts 32768 clusters, so it is enough for the L1 table of any allowed size.
    """
    check_virtual_size(size)
    size = -(-size // 512) * 512
    l1_entries = -(-size // (CLUSTER * (CLUSTER // 8)))
    clusters = 3 + -(-l1_entries * 8 // CLUSTER)
    extension = b""
    if base_format:
        name = base_format.encode("ascii")
        extension = struct.pack(">II", EXT_BACKING_FORMAT, len(name)) + name.ljust(-(-len(name) // 8) * 8, b"\0")
    extension += bytes(8)
    base_offset = 112 + len(extension) if base else 0
    head = _V2.pack(MAGIC, 3, base_offset, len(base), CLUSTER_BITS, size, 0, l1_entries, 3 * CLUSTER, CLUSTER, 1, 0, 0)
    head += _V3.pack(0, 0, 0, 4, 112) + bytes(8) + extension + base
    fd = os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, mode)
    try:
        os.ftruncate(fd, clusters * CLUSTER)
        os.pwrite(fd, head, 0)
        os.pwrite(fd, struct.pack(">Q", 2 * CLUSTER), CLUSTER)
        os.pwrite(fd, b"\0\1" * clusters, 2 * CLUSTER)
        if durable:
            os.fsync(fd)
    except BaseException:
        with suppress(OSError):
            target.unlink()
        raise
    finally:
        os.close(fd)
