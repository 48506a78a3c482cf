"""SSH keys: the guest's host key, made here so that the first connection can already be verified, and the user's own.

A private key is never logged: `HostKey` hides it from `repr`.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat

from innkeeper.base.errors import InvalidInput
from innkeeper.plan.seed import HostKey

__all__ = ["HostKey", "known_hosts_line", "make_host_key", "make_user_key"]


def make_host_key(comment: str) -> HostKey:
    """A new ed25519 key pair in OpenSSH's formats. `InvalidInput` if `comment` is not one line."""
    if any(char < " " or char == "\x7f" for char in comment):
        raise InvalidInput(f"{comment!r} cannot be the comment of an SSH key", field="comment")
    key = Ed25519PrivateKey.generate()
    private = key.private_bytes(Encoding.PEM, PrivateFormat.OpenSSH, NoEncryption()).decode()
    public = key.public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH).decode()
    return HostKey(private=private, public=f"{public} {comment}".rstrip())


def known_hosts_line(alias: str, public: str) -> str:
    """One line of a known_hosts file (sshd(8)): `alias type key`, for ssh's option HostKeyAlias. No line end.

    `InvalidInput` for an alias that would match anything but itself.
    """
    if not alias or any(char in alias for char in "*?!,|# \t\r\n\0") or alias.startswith("@"):
        raise InvalidInput(f"{alias!r} cannot be a name in known_hosts", field="alias")
    kind, key = public.split()[:2]
    return f"{alias} {kind} {key}"


def make_user_key(folder: Path) -> Path:
    """The path of `folder`/id_ed25519 (0600, with its .pub beside it); made if it is not there.

    Whoever calls at the same time gets the same key: the first one wins. Raises OSError if the folder is not writable.
    """
    path = folder / "id_ed25519"
    if path.exists():
        if not path.with_suffix(".pub").exists():
            _write_public(path)
        return path
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    pair = make_host_key("innkeeper")
    staged = _staged(folder, pair.private, 0o600)
    try:
        os.link(staged, path)  # unlike a rename, does not replace a key that someone else has just made
    except FileExistsError:
        pass
    finally:
        staged.unlink()
    _write_public(path)
    return path


def _write_public(path: Path) -> None:
    """The .pub of a private key, from the key itself, so that the two always belong together."""
    from cryptography.hazmat.primitives.serialization import load_ssh_private_key

    key = load_ssh_private_key(path.read_bytes(), password=None)
    public = key.public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH).decode()
    _staged(path.parent, f"{public} innkeeper\n", 0o644).replace(path.with_suffix(".pub"))


def _staged(folder: Path, text: str, mode: int) -> Path:
    """A whole, synced file under a temporary name in `folder`."""
    handle, name = tempfile.mkstemp(prefix=".id_ed25519.", dir=folder)
    try:
        with os.fdopen(handle, "w") as file:
            os.fchmod(file.fileno(), mode)
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
    return Path(name)
