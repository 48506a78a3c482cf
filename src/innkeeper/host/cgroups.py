"""Which kind of cgroups this process can confine VMs with, and where its own group is. Changes nothing.

Groups are made *below the group this process is in*, never beside it: whatever limits somebody has put on the
daemon (a container, a session) then hold for its guests too.
"""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from innkeeper.host.facts import Cgroup

V1_CONTROLLERS = ("cpu", "cpuacct", "pids", "freezer", "memory")
V2_CONTROLLERS = frozenset({"cpu", "pids", "memory"})


@dataclass(frozen=True)
class Hierarchy:
    """One mounted cgroup file system."""

    mount: Path
    own: Path
    """The folder of the group that this process is in."""
    controllers: frozenset[str]
    """Of v1: those mounted together here. Of v2: those that this process's group may hand on."""
    version: int


def hierarchies(process: str = "self") -> list[Hierarchy]:
    """All that are mounted, from /proc/self/mountinfo (proc(5)) and /proc/<process>/cgroup (cgroups(7))."""
    return list(_parse(Path(f"/proc/{process}/cgroup").read_text(), Path("/proc/self/mountinfo").read_text()))


@lru_cache(maxsize=4)  # every start of a VM asks several times
def _parse(own: str, mounts: str) -> tuple[Hierarchy, ...]:
    groups: dict[frozenset[str], str] = {}
    for line in own.splitlines():
        _, controllers, path = line.split(":", 2)
        groups[frozenset(filter(None, controllers.split(",")))] = path
    found = []
    for line in mounts.splitlines():
        fields = line.split(" ")
        kind, _, options = fields[fields.index("-") + 1 :][:3]
        root, mount = _unescape(fields[3]), Path(_unescape(fields[4]))
        if kind == "cgroup2":
            ours = _below(mount, root, groups.get(frozenset(), "/"))
            names = frozenset(_words(ours / "cgroup.controllers"))
            found.append(Hierarchy(mount, ours, names, 2))
        elif kind == "cgroup":
            for names, path in groups.items():
                if names and names <= set(options.split(",")):
                    found.append(Hierarchy(mount, _below(mount, root, path), names, 1))
    return tuple(found)


def detect() -> Cgroup:
    """The mode that VMs are confined with here, and why not a better one."""
    root = os.geteuid() == 0
    if Path("/run/systemd/system").is_dir():
        if not shutil.which("busctl"):
            return Cgroup(mode="none", reason="systemd owns the cgroups of this host, and busctl is missing")
        if root:
            return Cgroup(mode="systemd", reason="systemd owns the cgroups of this host: one scope per VM")
        if (runtime := os.environ.get("XDG_RUNTIME_DIR")) and Path(runtime, "bus").exists():
            return Cgroup(mode="systemd", reason="the user's own systemd makes one scope per VM")
        if not _usable_v2():
            return Cgroup(
                mode="none", reason="systemd owns the cgroups of this host, and this user has no session with it"
            )
    found = hierarchies()
    if not found:
        return Cgroup(mode="none", reason="no cgroup file system is mounted")
    if _usable_v2():
        return Cgroup(mode="v2", reason="the unified hierarchy is ours to divide")
    v1 = sorted({name for each in v1_hierarchies() for name in each.controllers} & set(V1_CONTROLLERS))
    if v1:
        return Cgroup(mode="v1", reason=f"separate hierarchies: {', '.join(v1)}")
    why = "they are mounted read-only" if root else "none is delegated to this user, who is not root"
    return Cgroup(mode="none", reason=f"cgroups are there, but {why}")


def v2_hierarchy() -> Hierarchy | None:
    """The unified hierarchy where it has the controllers we use; in hybrid setups v1 has them."""
    return next((each for each in hierarchies() if each.version == 2 and each.controllers & V2_CONTROLLERS), None)


def v1_hierarchies() -> list[Hierarchy]:
    """The hierarchies that VMs get a group in, where we may make one."""
    return [
        each
        for each in hierarchies()
        if each.version == 1 and each.controllers & set(V1_CONTROLLERS) and _writable(each.own)
    ]


def _usable_v2() -> bool:
    unified = v2_hierarchy()
    # moving a process needs write access to cgroup.procs of the common ancestor (cgroups(7), delegation)
    return unified is not None and _writable(unified.own) and _writable(unified.own / "cgroup.procs")


def _writable(path: Path) -> bool:
    """W_OK, which is false on a read-only mount for root too."""
    return os.access(path, os.W_OK, effective_ids=True)


def _below(mount: Path, root: str, path: str) -> Path:
    """The folder of group `path` on a mount that shows the hierarchy from `root` down."""
    inside = os.path.relpath(path, root) if root != "/" else path.lstrip("/")
    return mount if inside.startswith("..") else mount / inside


def _words(path: Path) -> list[str]:
    try:
        return path.read_text().split()
    except OSError:
        return []


def _unescape(text: str) -> str:
    """mountinfo writes blanks and backslashes as octal escapes."""
    for code, char in (("\\040", " "), ("\\011", "\t"), ("\\012", "\n"), ("\\134", "\\")):
        text = text.replace(code, char)
    return text
