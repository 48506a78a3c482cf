"""Files in a VM's folder, which is that of a QEMU that runs as somebody else and may have been taken over.

No name in it is followed to another place, whoever put what there."""

from __future__ import annotations

import os
import shutil
import stat
from pathlib import Path
from typing import BinaryIO

from innkeeper.base.errors import ImageUnsafe


def open_file(path: Path, most: int) -> BinaryIO:
    """A regular file of at most `most` bytes, to read. Raises `ImageUnsafe` for anything else, `FileNotFoundError`."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        raise
    except OSError as error:
        raise ImageUnsafe(f"{path} is not a file: {error.strerror}") from None
    found = os.fstat(fd)
    if not stat.S_ISREG(found.st_mode) or found.st_size > most:
        os.close(fd)
        raise ImageUnsafe(f"{path} is no regular file, or has more than {most} bytes")
    return os.fdopen(fd, "rb")


def write_file(path: Path, source: BinaryIO, uid: int | None = None) -> None:
    """Make or replace a file, mode 0600, at once and whole; it is `uid`'s (None: ours)."""
    staged = path.with_name(f"{path.name}.new")
    staged.unlink(missing_ok=True)
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    try:
        with os.fdopen(os.open(staged, flags, 0o600), "wb") as writing:
            shutil.copyfileobj(source, writing)
            if uid is not None:
                os.fchown(writing.fileno(), uid, uid)
            writing.flush()
            os.fsync(writing.fileno())
        staged.replace(path)
    except BaseException:
        staged.unlink(missing_ok=True)
        raise


def take_file(source: Path, target: Path) -> None:
    """Move a regular file here, which is nobody's but ours then. Its QEMU has ended. Raises `ImageUnsafe`."""
    if not stat.S_ISREG(source.lstat().st_mode):
        raise ImageUnsafe(f"{source} is no regular file")
    source.rename(target)
    os.chown(target, os.geteuid(), os.getegid())
    target.chmod(0o600)
