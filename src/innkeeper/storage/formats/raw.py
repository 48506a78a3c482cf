"""Raw: the bytes are the disk, whatever they are.

A file that is declared raw stays raw even if it begins like another format: a guest can write any header to its own
disk, and a file that is probed afterwards would let the guest open files of the host.
"""

from __future__ import annotations

from innkeeper.base.errors import ImageFormatUnknown
from innkeeper.base.units import KIB, format_size
from innkeeper.storage.formats.header import ImageHeader, Reader, check_virtual_size

SMALLEST = 64 * KIB
"""A smaller file is taken for a raw disk only if it is declared as one."""

OTHERS = {
    (0, b"\x1f\x8b"): "compressed (gzip): unpack it first",
    (0, b"\xfd7zXZ\0"): "compressed (xz): unpack it first",
    (0, b"\x28\xb5\x2f\xfd"): "compressed (zstd): unpack it first",
    (0, b"BZh"): "compressed (bzip2): unpack it first",
    (0, b"PK\x03\x04"): "a zip archive: unpack it first",
    (0, b"7z\xbc\xaf\x27\x1c"): "a 7-Zip archive: unpack it first",
    (257, b"ustar"): "a tar archive or an OVA: unpack it, and import the disk in it",
    (0, b"LUKS\xba\xbe"): "an encrypted disk (LUKS); if the guest shall open it, declare it raw",
    (0, b"QED\0"): "in QEMU's old QED format: convert it with `qemu-img convert -O qcow2`",
    (0, b"WithoutFreeSpace"): "in Parallels' format: convert it with `qemu-img convert -O qcow2`",
    (0, b"WithouFreSpacExt"): "in Parallels' format: convert it with `qemu-img convert -O qcow2`",
    (0, b"Bochs Virtual HD Image"): "in Bochs' format: convert it with `qemu-img convert -O qcow2`",
    (0, b"\x7fELF"): "a program",
    (0, b"<"): "text",
    (0, b"#"): "text",
    (0, b"{"): "text",
}
"""What else a file can be that someone hands in as an image."""


def parse(reader: Reader) -> ImageHeader:
    """A file declared raw. Its size is rounded up to 512 bytes, as QEMU does."""
    size = -(-reader.size // 512) * 512
    check_virtual_size(size)
    return ImageHeader("raw", size)


def guess(reader: Reader) -> ImageHeader:
    """A file of no known format that nobody declared: raw if it can be a disk, else `ImageFormatUnknown`."""
    for (offset, magic), what in OTHERS.items():
        if reader.peek(offset, len(magic)) == magic:
            raise ImageFormatUnknown(
                f"the file is no disk image; it looks like this: {what}",
                hint="if it is a raw disk all the same, declare it: --format raw",
            )
    if reader.size % 512 or reader.size < SMALLEST:
        raise ImageFormatUnknown(
            f"the file ({format_size(reader.size)}) is in no format that is known here",
            hint="qcow2, raw, vmdk, vdi, vhdx and vpc are; if it is a raw disk, declare it: --format raw",
        )
    return parse(reader)
