"""SSH keys on the side of the user: which public keys a new guest gets, which private keys `inn ssh` offers.

`inn` often runs through sudo, and the keys that matter are then those of the person who typed it, not root's.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterable
from pathlib import Path

from innkeeper.base.errors import InvalidInput, ToolFailed, ToolMissing
from innkeeper.cli import terminal


def person() -> tuple[Path, int, int]:
    """Home, uid and gid of who is at the keyboard: the caller of sudo, else this user."""
    name = os.environ.get("SUDO_USER", "")
    if os.geteuid() == 0 and name and name != "root":
        import pwd

        try:
            entry = pwd.getpwnam(name)
            return Path(entry.pw_dir), entry.pw_uid, entry.pw_gid
        except KeyError:
            pass
    return Path.home(), os.geteuid(), os.getegid()


def own_folder() -> Path:
    """`~/.config/innkeeper`, made with mode 0700 and owned by the person."""
    home, uid, gid = person()
    config = home / ".config"
    if uid == os.geteuid() and os.environ.get("XDG_CONFIG_HOME"):
        config = Path(os.environ["XDG_CONFIG_HOME"])
    folder = config / "innkeeper"
    make_folder(folder, uid, gid)
    return folder


def make_folder(folder: Path, uid: int, gid: int) -> None:
    """A private folder with its missing parents, all owned by `uid`."""
    if folder.is_dir():
        return
    if not folder.parent.is_dir():
        make_folder(folder.parent, uid, gid)
    folder.mkdir(mode=0o700, exist_ok=True)
    if os.geteuid() == 0:
        os.chown(folder, uid, gid)


def read_public_key(path: Path) -> tuple[str, Path | None]:
    """The public key line of `path`, a public key or a private one beside its `.pub`; and the private key's path where
    there is one. Raises `InvalidInput`."""
    if not path.is_file():
        raise InvalidInput(f"there is no SSH key {path}")
    text = path.read_text(errors="replace")
    private = path.with_suffix("") if path.suffix == ".pub" else None
    if "PRIVATE KEY-----" in text.partition("\n")[0]:
        private, path = path, path.with_name(path.name + ".pub")
        if not path.is_file():
            raise InvalidInput(
                f"{private} is a private key and has no {path.name} beside it",
                hint=f"make it with: ssh-keygen -y -f {private} > {path}",
            )
        text = path.read_text(errors="replace")
    lines = [line.strip() for line in text.splitlines() if line.strip() and not line.startswith("#")]
    if len(lines) != 1 or len(lines[0].split()) < 2:
        raise InvalidInput(f"{path} is not an SSH public key: it has {len(lines)} lines, and should have one")
    return lines[0], private if private and private.is_file() else None


def public_keys(given: Iterable[str] | None) -> tuple[list[str], list[Path]]:
    """Public keys for a new guest, and the private keys they belong to: those given, else the person's in `~/.ssh`,
    else one made in `~/.config/innkeeper`."""
    if given:
        pairs = [read_public_key(Path(name).expanduser()) for name in given]
    else:
        found = sorted((person()[0] / ".ssh").glob("id_*.pub"))
        found = [path for path in found if not path.name.endswith("-cert.pub")]
        pairs = [read_public_key(path) for path in found] or [read_public_key(_own_key())]
    return [line for line, _ in pairs], [private for _, private in pairs if private]


def private_keys() -> list[Path]:
    """The person's private keys in the usual places, and the one that Innkeeper made."""
    home, _, _ = person()
    names = ("id_ed25519", "id_ecdsa", "id_rsa", "id_ed25519_sk", "id_ecdsa_sk")
    paths = [home / ".ssh" / name for name in names] + [own_folder() / "id_ed25519"]
    return [path for path in paths if path.is_file() and os.access(path, os.R_OK)]


def _own_key() -> Path:
    """`~/.config/innkeeper/id_ed25519.pub`, made where it is missing."""
    path = own_folder() / "id_ed25519"
    public = path.with_suffix(".pub")
    if public.is_file():
        return public
    if not shutil.which("ssh-keygen"):
        raise ToolMissing(
            "there is no SSH key in ~/.ssh, and no ssh-keygen to make one",
            hint="apt-get install openssh-client, or pass --ssh-key",
            package="openssh-client",
        )
    command = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", "innkeeper", "-f", str(path)]
    made = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    if made.returncode:
        raise ToolFailed(f"ssh-keygen could not make {path}: {made.stderr.strip()}")
    _, uid, gid = person()
    for file in (path, public):
        if os.geteuid() == 0:
            os.chown(file, uid, gid)
    terminal.note(f"no SSH key in ~/.ssh: made {path}, which `inn ssh` uses by itself")
    return public
