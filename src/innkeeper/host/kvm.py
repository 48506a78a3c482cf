"""/dev/kvm as a file: is it there, who may open it. Whether it runs guests is `qemu/probe.py`'s question."""

from __future__ import annotations

import errno
import grp
import os
import pwd
import stat
from dataclasses import dataclass
from pathlib import Path

from innkeeper.host.cpu import cpu_flags

DEVICE = "/dev/kvm"


@dataclass(frozen=True)
class KvmDevice:
    """What can be told about the device without running a guest on it."""

    identity: str
    """`10:232 0:105 0660` (device number, owner, mode), or `missing`; a verdict holds while it stays the same."""
    problem: str = ""
    """Why this process cannot use it, as a sentence; empty where it can."""
    hint: str = ""
    group: int | None = None
    """The gid whose members may open it, where not everybody may."""
    root_only: bool = False
    """Neither its group nor others may open it, so a QEMU without privileges cannot."""


def device(path: str = DEVICE) -> KvmDevice:
    """Look at the device and try to open it (which starts nothing)."""
    try:
        info = Path(path).stat()
    except OSError as error:
        if error.errno not in (errno.ENOENT, errno.ENOTDIR):
            return KvmDevice("unreadable", f"{path} cannot be read: {error.strerror}", "ask the host's owner")
        return KvmDevice("missing", f"{path} is missing: this kernel offers no KVM", _why_missing())
    mode = stat.S_IMODE(info.st_mode)
    identity = f"{os.major(info.st_rdev)}:{os.minor(info.st_rdev)} {info.st_uid}:{info.st_gid} {mode:04o}"
    if not stat.S_ISCHR(info.st_mode):
        return KvmDevice(identity, f"{path} is not a character device", f"remove it, then `modprobe kvm`: {path}")
    everybody = mode & 0o006 == 0o006
    by_group = mode & 0o060 == 0o060 and info.st_gid != 0
    group = info.st_gid if by_group and not everybody else None
    try:
        os.close(os.open(path, os.O_RDWR | os.O_CLOEXEC))
    except OSError as error:
        problem, hint = _why_closed(path, error, group, info.st_uid)
        return KvmDevice(identity, problem, hint, group)
    return KvmDevice(identity, group=group, root_only=not everybody and not by_group)


def _why_missing() -> str:
    flags = cpu_flags()
    if flags & {"vmx", "svm"}:
        return "load the module: `modprobe kvm_intel` or `modprobe kvm_amd`; in a container, pass the device in"
    if "hypervisor" in flags:
        return "this host is itself a virtual machine: turn on nested virtualization for it in its hypervisor"
    return "turn on virtualization (VT-x, AMD-V, SVM) in the firmware setup of this host"


def _why_closed(path: str, error: OSError, group: int | None, owner: int) -> tuple[str, str]:
    if error.errno == errno.EACCES and group is not None:
        name, user = _group_name(group), _user_name(os.geteuid())
        return (
            f"permission denied: {path} is for group {name} (gid {group}), and user {user} is not in it",
            f"`sudo usermod -aG {name} {user}`, then log in again",
        )
    if error.errno == errno.EACCES:
        return (
            f"permission denied: {path} is for user {_user_name(owner)} only",
            f"give it to a group: `sudo chgrp kvm {path} && sudo chmod 660 {path}`, and join that group",
        )
    if error.errno == errno.EPERM:
        return (
            f"{path} is there, but a container's device rules forbid opening it",
            f"start the container with `--device {path}`",
        )
    return f"{path} is there, but does not open: {error.strerror}", "`dmesg | grep -i kvm` may say why"


def _group_name(gid: int) -> str:
    try:
        return grp.getgrgid(gid).gr_name
    except KeyError:
        return str(gid)


def _user_name(uid: int) -> str:
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return str(uid)
