"""Files and folders as a tar stream, in both directions.

What comes out of a guest is data from a stranger: unpacking never writes outside the destination, whatever names and
links the stream holds. Python's own `data` filter is not in every 3.11 and refuses absolute symbolic links, which are
ordinary in a guest's folders; here a link is made last, when nothing can be written through it any more.
"""

from __future__ import annotations

import os
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

from innkeeper.base.errors import InvalidInput

Count = Callable[[int], object]
"""Told the number of bytes that have passed."""


class Counted:
    """A file object that tells how many bytes went through it."""

    def __init__(self, file: IO[bytes], count: Count) -> None:
        self._file, self._count = file, count

    def read(self, size: int = -1) -> bytes:
        data = self._file.read(size)
        self._count(len(data))
        return data

    def write(self, data: Any) -> int:
        self._count(len(data))
        return self._file.write(data)


def total_size(source: Path) -> int:
    """Bytes of all files in `source`."""
    if not source.is_dir():
        return source.stat().st_size
    sizes = (Path(folder, name).lstat().st_size for folder, _, names in os.walk(source) for name in names)
    return sum(sizes)


def pack(source: Path, name: str, out: IO[bytes], count: Count) -> None:
    """Write `source` as a tar stream in which it is called `name`. A symbolic link given as the source is followed, as
    with `cp`; those inside a folder stay links. Sockets and devices are left out."""

    def plain(member: tarfile.TarInfo) -> tarfile.TarInfo | None:
        member.uid = member.gid = 0
        member.uname = member.gname = ""
        return None if member.isdev() else member

    with tarfile.open(fileobj=Counted(out, count), mode="w|", format=tarfile.PAX_FORMAT) as archive:  # type: ignore[call-overload]
        archive.add(source.resolve(), arcname=name, filter=plain)


def unpack(stream: IO[bytes], destination: Path, count: Count) -> int:
    """Unpack a stream with one root (a file or folder of any name) as `destination`; returns the number of files.

    Raises `InvalidInput` for a member that is outside its root, and for a path that leads through a symbolic link.
    """
    links: list[tuple[Path, str]] = []
    folders: list[tuple[Path, int]] = []
    files = 0
    root = ""
    with tarfile.open(fileobj=Counted(stream, count), mode="r|") as archive:  # type: ignore[call-overload]
        for member in archive:
            parts = [part for part in member.name.split("/") if part not in ("", ".")]
            if ".." in parts or member.name.startswith("/") or (parts and root and parts[0] != root):
                raise InvalidInput(f"the guest's archive names {member.name!r}, which is outside of what was asked for")
            root = root or (parts[0] if parts else "")
            path = destination.joinpath(*parts[1:])
            _no_links_above(destination, path)
            if member.isdir():
                if path.is_symlink() or (path.exists() and not path.is_dir()):
                    raise InvalidInput(f"{path} is in the way: it is not a folder")
                path.mkdir(exist_ok=True)
                folders.append((path, member.mode))
            elif member.issym():
                links.append((path, member.linkname))
            elif member.islnk():
                _unlink(path)
                other = [part for part in member.linkname.split("/") if part not in ("", ".")]
                if ".." in other or not other or other[0] != root:
                    raise InvalidInput(f"the guest's archive links {member.name!r} to a file outside of it")
                _no_links_above(destination, destination.joinpath(*other[1:]))
                os.link(destination.joinpath(*other[1:]), path, follow_symlinks=False)
                files += 1
            elif member.isreg():
                _write(archive.extractfile(member), path, member.mode)
                files += 1
    for path, target in links:
        _no_links_above(destination, path)
        _unlink(path)
        path.symlink_to(target)
        files += 1
    for path, mode in reversed(folders):
        path.chmod(mode & 0o777)
    return files


def _write(source: IO[bytes] | None, path: Path, mode: int) -> None:
    _unlink(path)
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
    with os.fdopen(descriptor, "wb") as out:
        if source:
            shutil.copyfileobj(source, out, 256 * 1024)
        os.fchmod(out.fileno(), mode & 0o777)


def _unlink(path: Path) -> None:
    """Make room for a file: what is there goes, unless it is a folder."""
    if path.is_dir() and not path.is_symlink():
        raise InvalidInput(f"{path} is in the way: it is a folder")
    path.unlink(missing_ok=True)


def _no_links_above(destination: Path, path: Path) -> None:
    """An earlier copy may have left a link that leads elsewhere; nothing is written through one."""
    while path != destination and path.parent != path:
        path = path.parent
        if path != destination.parent and path.is_symlink():
            raise InvalidInput(f"{path} is a symbolic link; nothing is written through it", hint="remove it first")
        if path == destination:
            return
