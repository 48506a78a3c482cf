"""What the side of the user remembers about a guest: its host key for ssh, and the private key it was launched with.

~/.config/innkeeper/guests/<vm id>/   0700
  known_hosts                         the host key as the API gives it
  identities                          paths of private keys, one a line
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterable
from pathlib import Path

from innkeeper.cli.keys import make_folder, own_folder, person


def folder(vm_id: str) -> Path:
    """The folder of one guest, made if it is missing."""
    if not re.fullmatch(r"[A-Za-z0-9_-]{1,64}", vm_id):
        raise ValueError(f"{vm_id!r} is not an id")
    path = own_folder() / "guests" / vm_id
    _, uid, gid = person()
    make_folder(path, uid, gid)
    return path


def remember(vm_id: str, private_keys: Iterable[Path]) -> None:
    """Keep which private keys open this guest."""
    _write(folder(vm_id) / "identities", "".join(f"{key.absolute()}\n" for key in private_keys))


def remembered(vm_id: str) -> list[Path]:
    """The keys that `remember` kept and that are still there."""
    try:
        lines = (folder(vm_id) / "identities").read_text().splitlines()
    except FileNotFoundError:
        return []
    return [path for path in map(Path, lines) if path.is_file()]


def forget(vm_id: str) -> None:
    """Keep nothing of a guest that is gone."""
    shutil.rmtree(own_folder() / "guests" / vm_id, ignore_errors=True)


def known_hosts(vm_id: str, alias: str, host_key: str) -> Path:
    """A known_hosts file (sshd(8)) with this guest's key under its alias, and nothing else."""
    path = folder(vm_id) / "known_hosts"
    text = f"{alias} {' '.join(host_key.split()[:2])}\n"
    if not path.is_file() or path.read_text() != text:
        _write(path, text)
    return path


def _write(path: Path, text: str) -> None:
    part = path.with_name(path.name + f".{os.getpid()}")
    part.write_text(text)
    part.chmod(0o600)
    if os.geteuid() == 0:
        _, uid, gid = person()
        os.chown(part, uid, gid)
    part.replace(path)
