"""VMware's VMDK: the kinds that are one file, monolithicSparse and streamOptimized.

Format: VMware "Virtual Disk Format 5.0" and QEMU's block/vmdk.c (little-endian). What QEMU really does, and what is
therefore checked:

- A file that begins with `KDMV` (a sparse extent) is read by its header. The extents in its embedded descriptor are
  not opened, except when the header says capacity 0: then they are, by name, from anywhere. Such a file is refused.
- A header whose grain directory is "at the end" is replaced by the footer.
- The parent is looked for as the text `parentFileNameHint` in the 20 sectors after the first one, wherever the
  header says that the descriptor is. Both places are searched.
- Every other file is taken for a text descriptor, and all files that it names are opened (monolithicFlat,
  twoGbMaxExtentSparse and -Flat, vmfs, vmfsSparse, vmfsRDM, seSparse, fullDevice, …). All of them are refused.
- `COWD` (vmfsSparse extents of ESX) and seSparse extents are parts of a disk, and refused.
"""

from __future__ import annotations

import re
import struct
from dataclasses import dataclass

from innkeeper.base.errors import ImageUnsafe
from innkeeper.base.units import KIB, MIB
from innkeeper.storage.formats.header import ImageHeader, Reader, check_virtual_size, quoted

SPARSE, COWD, SESPARSE = b"KDMV", b"COWD", struct.pack("<Q", 0xCAFEBABE)
_HEADER = struct.Struct("<4xIIQQQQIQQQ5xH")
AT_END = 0xFFFFFFFFFFFFFFFF
MARKER_FOOTER = 3
DESCRIPTOR_SECTORS = 20
"""QEMU reads this much for the parent, from sector 1 on."""
MAX_DESCRIPTOR = MIB
FLAG_COMPRESSED = 1 << 16
ACCEPTED = {"monolithicSparse", "streamOptimized"}

_CONVERT = "make one file of it where its parts lie: `qemu-img convert -O qcow2 DISK.vmdk DISK.qcow2`"
_EXTENT = re.compile(
    rb'^\s*(?:RW|RDONLY|NOACCESS)\s+\d{1,20}\s+(?P<kind>[A-Za-z]{1,20})(?:\s+"(?P<name>[^"\r\n]*)")?', re.MULTILINE
)
_TYPE = re.compile(rb'^\s*createType\s*=\s*"([^"\r\n]{0,60})"', re.MULTILINE | re.IGNORECASE)
_PARENT = re.compile(rb"^\s*parentCID\s*=\s*([0-9a-fA-F]+)", re.MULTILINE | re.IGNORECASE)


@dataclass(frozen=True)
class _Header:
    version: int
    flags: int
    capacity: int
    granularity: int
    descriptor_offset: int
    descriptor_size: int
    entries_per_table: int
    backup_offset: int
    directory_offset: int
    data_offset: int
    compression: int


def matches(reader: Reader) -> bool:
    """Any member of the family, so that each gets its own error."""
    head = reader.peek(0, 4 * KIB)
    return head[:4] in (SPARSE, COWD) or head[:8] == SESPARSE or _is_descriptor(head)


def parse(reader: Reader) -> ImageHeader:
    """Raises `ImageUnsafe`."""
    head = reader.peek(0, 8)
    if head[:4] == COWD or head == SESPARSE:
        kind = "vmfsSparse" if head[:4] == COWD else "seSparse"
        raise ImageUnsafe(f"the file is one part of an ESX disk ({kind} extent)", hint=_CONVERT)
    if head[:4] != SPARSE:
        raise _descriptor_file(reader.peek(0, MAX_DESCRIPTOR))
    header = _header(reader.read(0, 512, "VMDK header"))
    if not header.capacity:
        raise ImageUnsafe("the VMDK header has capacity 0, which makes QEMU open the files it names", hint=_CONVERT)
    create_type = _check_descriptor(reader, header)
    if header.directory_offset == AT_END:
        header = _footer(reader)
    if header.version not in (1, 2, 3):
        raise ImageUnsafe(f"VMDK version {header.version} is not supported")
    check_virtual_size(header.capacity * 512)
    granularity, entries = header.granularity, header.entries_per_table
    if not 1 <= granularity <= 1 << 21 or granularity & (granularity - 1) or not 1 <= entries <= 512:
        raise ImageUnsafe(f"the VMDK claims grains of {granularity} sectors and tables of {entries} entries")
    directory = -(-header.capacity // (granularity * entries)) * 4
    reader.check_inside(header.directory_offset * 512, directory, "VMDK grain directory")
    if header.flags & 2:
        reader.check_inside(header.backup_offset * 512, directory, "VMDK backup grain directory")
    reader.check_inside(0, header.data_offset * 512, "VMDK metadata")
    compressed = header.compression == 1
    if header.compression > 1 or compressed != bool(header.flags & FLAG_COMPRESSED):
        raise ImageUnsafe(f"the VMDK's compression {header.compression} contradicts its flags")
    return ImageHeader(
        "vmdk",
        header.capacity * 512,
        {
            "subformat": create_type,
            "version": header.version,
            "cluster_size": granularity * 512,
            "compression": "deflate" if compressed else "none",
        },
    )


def _header(block: bytes) -> _Header:
    return _Header(*_HEADER.unpack_from(block))


def _footer(reader: Reader) -> _Header:
    """The header's second copy, between two markers at the end of a file that was written as a stream."""
    end = -(-reader.size // 512) * 512
    block = reader.read(end - 1536, 1536, "VMDK footer")
    size, kind = struct.unpack_from("<II", block, 8)
    if block[512:516] != SPARSE or size or kind != MARKER_FOOTER or any(block[1024:1040]):
        raise ImageUnsafe("the VMDK footer is damaged", hint="the file was cut off: get it again")
    footer = _header(block[512:1024])
    if footer.directory_offset == AT_END or not footer.capacity:
        raise ImageUnsafe("the VMDK footer does not say where the grain directory is")
    return footer


def _check_descriptor(reader: Reader, header: _Header) -> str:
    """The create type, once the descriptor names nothing but the file itself."""
    if not header.descriptor_offset or not header.descriptor_size:
        raise ImageUnsafe("the file is one part of a split VMDK disk (a sparse extent)", hint=_CONVERT)
    if header.descriptor_size * 512 > MAX_DESCRIPTOR:
        raise ImageUnsafe(f"the VMDK descriptor claims {header.descriptor_size} sectors")
    text = reader.read(header.descriptor_offset * 512, header.descriptor_size * 512, "VMDK descriptor")
    seen_by_qemu = reader.peek(512, DESCRIPTOR_SECTORS * 512).partition(b"\0")[0]
    for part in (text, seen_by_qemu):
        parent = _PARENT.search(part)
        if b"parentFileNameHint" in part or (parent and parent[1].lower() != b"ffffffff"):
            raise ImageUnsafe("the VMDK image stands on another one (a snapshot or linked clone)", hint=_CONVERT)
    text = text.partition(b"\0")[0]
    found = _TYPE.search(text)
    create_type = found[1].decode("ascii", errors="replace") if found else ""
    if create_type not in ACCEPTED:
        raise ImageUnsafe(f"a VMDK of type {create_type!r} is not one file", hint=_CONVERT)
    extents = list(_EXTENT.finditer(text))
    if len(extents) != 1 or extents[0]["kind"] != b"SPARSE":
        raise ImageUnsafe(f"the VMDK descriptor names {len(extents)} extents, not the file alone", hint=_CONVERT)
    # QEMU does not open it by this name, and people rename files: only a path is a sign of ill will.
    name = extents[0]["name"] or b""
    if re.search(rb"[/\\:]", name):
        raise ImageUnsafe(f"the VMDK descriptor names another file, {quoted(name)}", hint=_CONVERT)
    return create_type


def _is_descriptor(head: bytes) -> bool:
    """As QEMU probes: `version=` after comments and blank lines."""
    for line in head.split(b"\n"):
        line = line.strip(b" \r")
        if line.lower().startswith(b"# disk descriptorfile") or re.fullmatch(rb"version=\d+", line):
            return True
        if line and not line.startswith(b"#"):
            return False
    return False


def _descriptor_file(text: bytes) -> ImageUnsafe:
    """The error for a text file that names the files or devices where the data is."""
    found = _TYPE.search(text)
    kind = quoted(found[1])[1:-1] if found else "unknown"
    extents = [match["name"] or b"" for match in _EXTENT.finditer(text)]
    if not found and not extents:
        return ImageUnsafe("the file is no VMDK image")
    names = ", ".join(quoted(name) for name in extents[:3]) + (", …" if len(extents) > 3 else "")
    hint = _CONVERT
    if kind in ("monolithicFlat", "vmfs") and len(extents) == 1 and re.fullmatch(rb"[\w. -]+", extents[0]):
        hint = f"import {quoted(extents[0])} as raw instead (--format raw), or {_CONVERT}"
    return ImageUnsafe(
        f"the file is only the description of a VMDK disk ({kind}); its data is in {names or 'another place'}",
        hint=hint,
    )
