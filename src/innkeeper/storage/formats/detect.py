"""The one way in: an image file's header, or an error that says why it is not taken."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable
from pathlib import Path

from innkeeper.base.errors import InvalidInput, NotFound
from innkeeper.storage.formats import qcow2, raw, vdi, vhdx, vmdk, vpc
from innkeeper.storage.formats.header import ImageHeader, Reader

_PROBED: dict[str, tuple[Callable[[Reader], bool], Callable[[Reader], ImageHeader]]] = {
    "qcow2": (qcow2.matches, qcow2.parse),
    "vhdx": (vhdx.matches, vhdx.parse),
    "vdi": (vdi.matches, vdi.parse),
    "vmdk": (vmdk.matches, vmdk.parse),
    "vpc": (vpc.matches, vpc.parse),
}
FORMATS = (*_PROBED, "raw")
"""QEMU's driver names; `vhd` is taken for `vpc`."""


def inspect(path: Path, declared: str | None = None) -> ImageHeader:
    """Read an image's header. Opens no other file, reads at most `header.READ_BUDGET` bytes, and never blocks.

    With `declared` the file must be of that format (and `raw` is always believed); without, the format is found by
    its magic. Raises `ImageUnsafe`, `ImageFormatUnknown`, `InvalidInput` (no regular file, empty, not readable, or
    not what was declared) and `NotFound`.
    """
    fd = open_image(path)
    try:
        return inspect_fd(fd, declared)
    finally:
        os.close(fd)


def inspect_fd(fd: int, declared: str | None = None) -> ImageHeader:
    """As `inspect`, of an open file."""
    kind = {"vhd": "vpc"}.get(declared or "", declared)
    if kind is not None and kind not in FORMATS:
        raise InvalidInput(
            f"image format {declared!r} is not known", hint=f"one of {', '.join(FORMATS)}", field="format"
        )
    state = os.fstat(fd)
    if not stat.S_ISREG(state.st_mode):
        raise InvalidInput("the image is not a regular file")
    if not state.st_size:
        raise InvalidInput("the image file is empty")
    reader = Reader(fd, state.st_size)
    if kind == "raw":
        return raw.parse(reader)
    found = next((name for name, (matches, _) in _PROBED.items() if matches(reader)), None)
    if kind is not None and found != kind:
        raise InvalidInput(
            f"the image was declared as {kind}, and is {found or 'nothing that is known here'}", field="format"
        )
    if found is None:
        return raw.guess(reader)
    return _PROBED[found][1](reader)


def open_image(path: Path) -> int:
    """A descriptor to read from, of a regular file that is no symbolic link; a FIFO or a device is not waited for."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
    except FileNotFoundError as error:
        raise NotFound(f"there is no file {str(path)!r}") from error
    except (OSError, ValueError) as error:
        link = " (it is a symbolic link)" if path.is_symlink() else ""
        reason = error.strerror if isinstance(error, OSError) else error
        raise InvalidInput(f"the image {str(path)!r} cannot be opened{link}: {reason}") from error
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise InvalidInput(f"{str(path)!r} is not a regular file", hint="a device is copied with dd first")
    return fd
