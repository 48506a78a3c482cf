"""Confine VMs with cgroups: v2, v1, a systemd scope, or not at all (`host/cgroups.py` says which and why).

    v2, v1    <the daemon's own group>/innkeeper-<hash of the data folder>/vm-<id>
    systemd   innkeeper.slice/innkeeper-<hash>.slice/innkeeper-vm-<id>.scope

The hash keeps two daemons with different data folders out of each other's groups. A daemon that comes back may be in
another group than before, so what is ours is searched for in the whole hierarchy, never assumed to be below us.
"""

from __future__ import annotations

import asyncio
import errno
import hashlib
import os
import re
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from innkeeper.base.child import start_child
from innkeeper.base.errors import InvalidInput
from innkeeper.base.home import Home
from innkeeper.host.cgroups import detect, hierarchies, v1_hierarchies, v2_hierarchy

__all__ = ["Limits", "detect", "list_ours", "place", "remove"]

REMOVE_SECONDS = 2.0
"""How long `remove` waits for the last process to be gone."""
BUSCTL_SECONDS = 5.0


@dataclass(frozen=True)
class Limits:
    """What a VM's group may use."""

    cpu_weight: int = 100
    """Share of the CPU when all want it, 1-10000 with 100 as everybody's default (v2 scale; v1 gets
    1024 shares per 100)."""
    pids: int = 4096
    """Processes and threads, at most."""
    memory: int | None = None
    """Bytes, at most; None for no limit. A guest over it is killed: leave room for QEMU itself."""

    def __post_init__(self) -> None:
        if not 1 <= self.cpu_weight <= 10_000:
            raise InvalidInput(f"cpu_weight {self.cpu_weight} is not within 1 and 10000", field="cpu_weight")
        for name, value in (("pids", self.pids), ("memory", self.memory)):
            if value is not None and value < 1:
                raise InvalidInput(f"{name} limit {value} is not positive", field=name)


async def place(home: Home, vm_id: str, pid: int, limits: Limits | None = None) -> str:
    """Put a process in the VM's own group, with limits. To be called once it has spawned, and safe to repeat.

    Returns an empty text, or a sentence about what of this was not possible: a VM that is not confined is a warning,
    not a failed start. Raises `InvalidInput` for an id that cannot be a group's name, nothing else.
    """
    group = f"vm-{_checked(vm_id)}"
    limits = limits or Limits()
    found = detect()
    if found.mode == "none":
        return f"VM {vm_id} is not confined: {found.reason}"
    if found.mode == "systemd":
        problems = await _place_systemd(home, vm_id, pid, limits)
    elif found.mode == "v2":
        problems = await asyncio.to_thread(_place_v2, _parent(home), group, pid, limits)
    else:
        problems = await asyncio.to_thread(_place_v1, _parent(home), group, pid, limits)
    return f"VM {vm_id} is not fully confined: {'; '.join(problems)}" if problems else ""


async def remove(home: Home, vm_id: str) -> bool:
    """Remove the VM's groups once its processes are gone; True when none is left. Kills nothing.

    Waits shortly while a group is busy. Repeating it is safe, and so is a VM that never had a group.
    """
    _checked(vm_id)
    deadline = time.monotonic() + REMOVE_SECONDS
    while True:
        left = await asyncio.to_thread(_remove_once, home, vm_id)
        if not left or time.monotonic() > deadline:
            return not left
        await asyncio.sleep(0.02)


async def list_ours(home: Home) -> set[str]:
    """The ids of all VMs that have a group of this data folder's daemon, whatever mode made it."""
    return {vm_id for vm_id, _ in await asyncio.to_thread(lambda: list(_groups(home)))}


# --- names ------------------------------------------------------------------------------------------------------


def _parent(home: Home) -> str:
    return f"innkeeper-{hashlib.sha256(os.fsencode(home.data)).hexdigest()[:8]}"


def _checked(vm_id: str) -> str:
    if not re.fullmatch(r"[a-z0-9][a-z0-9-]{0,63}", vm_id):
        raise InvalidInput(f"{vm_id!r} cannot be a cgroup's name", field="id")
    return vm_id


def _groups(home: Home) -> Iterator[tuple[str, Path]]:
    """(VM id, folder) of every group of ours in every hierarchy."""
    parent = _parent(home)
    for mount in {each.mount for each in hierarchies()}:
        for folder, children, _ in os.walk(mount):
            if Path(folder).name in (parent, f"{parent}.slice"):
                for name in children:
                    if match := re.fullmatch(r"(?:innkeeper-)?vm-(.+?)(?:\.scope)?", name):
                        yield match[1], Path(folder, name)
                children.clear()


def _remove_once(home: Home, vm_id: str) -> bool:
    """Remove what can be removed now; whether something is left."""
    left = False
    for found, folder in list(_groups(home)):
        if found != vm_id:
            continue
        if folder.suffix == ".scope":  # systemd's to remove, as soon as it is empty
            left = True
            continue
        try:
            folder.rmdir()
        except FileNotFoundError:
            continue
        except OSError:
            left = True
            continue
        with suppress(OSError):  # the parent goes with the last VM; it is busy while others are in it
            folder.parent.rmdir()
    return left


# --- v2 and v1 --------------------------------------------------------------------------------------------------


def _place_v2(parent: str, group: str, pid: int, limits: Limits) -> list[str]:
    unified = v2_hierarchy()
    if unified is None:
        return ["the unified hierarchy is gone"]
    problems = []
    folder = unified.own / parent / group
    wanted = {"cpu.weight": str(limits.cpu_weight), "pids.max": str(limits.pids)}
    if limits.memory:
        wanted["memory.max"] = str(limits.memory)
    try:
        _make(folder)
        for above in (unified.own, folder.parent):
            for name in {file.partition(".")[0] for file in wanted}:
                with suppress(OSError):  # what is not handed down shows below, as a missing file
                    _write(above / "cgroup.subtree_control", f"+{name}")
        for file, value in wanted.items():
            try:
                _write(folder / file, value)
            except OSError as error:
                problems.append(f"{file} is not set: {_reason_v2(error)}")
        _write(folder / "cgroup.procs", str(pid))
    except OSError as error:
        problems.append(f"{folder}: {error.strerror}")
    return problems


def _reason_v2(error: OSError) -> str:
    if error.errno in (errno.ENOENT, errno.EACCES):
        # cgroups(7): a group with processes of its own cannot hand controllers down, unless it is the root
        return "the daemon's own group does not hand this controller down (it has processes of its own)"
    return error.strerror or str(error)


def _place_v1(parent: str, group: str, pid: int, limits: Limits) -> list[str]:
    # v1 shares: 1024 stands for a weight of 100; the kernel takes 2 to 262144
    wanted = {
        "cpu": {"cpu.shares": str(max(2, limits.cpu_weight * 1024 // 100))},
        "cpuacct": {},
        "pids": {"pids.max": str(limits.pids)},
        "freezer": {},
    }
    if limits.memory:  # joined on demand only: accounting costs, and a limit above us should keep seeing us
        wanted["memory"] = {"memory.limit_in_bytes": str(limits.memory)}
    problems = []
    for hierarchy in v1_hierarchies():
        names = hierarchy.controllers & wanted.keys()
        if not names:
            continue
        folder = hierarchy.own / parent / group
        try:
            _make(folder)
            for name in names:
                for file, value in wanted.pop(name).items():
                    _write(folder / file, value)
            _write(folder / "cgroup.procs", str(pid))
        except OSError as error:
            problems.append(f"{folder}: {error.strerror}")
    problems += [f"controller {name} is not there" for name in wanted if wanted[name]]
    return problems


def _make(folder: Path) -> None:
    for _ in range(10):
        # another VM's removal may take the parent away between the two steps
        with suppress(FileNotFoundError):
            return folder.mkdir(parents=True, exist_ok=True)
    folder.mkdir(parents=True, exist_ok=True)


def _write(path: Path, text: str) -> None:
    """One write(2) to a file of the kernel's; unlike `Path.write_text` it never creates one."""
    fd = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
    try:
        os.write(fd, text.encode())
    finally:
        os.close(fd)


# --- systemd ----------------------------------------------------------------------------------------------------


async def _place_systemd(home: Home, vm_id: str, pid: int, limits: Limits) -> list[str]:
    """A transient scope (org.freedesktop.systemd1(5), StartTransientUnit), of the user's systemd if not root."""
    scope = f"innkeeper-vm-{vm_id}.scope"
    if _is_in(pid, scope):
        return []
    properties = [
        ("PIDs", "au", "1", str(pid)),
        ("Slice", "s", f"{_parent(home)}.slice"),
        ("Description", "s", f"Innkeeper VM {vm_id}"),
        ("CollectMode", "s", "inactive-or-failed"),
        ("CPUWeight", "t", str(limits.cpu_weight)),
        ("TasksMax", "t", str(limits.pids)),
    ]
    if limits.memory:
        properties.append(("MemoryMax", "t", str(limits.memory)))
    error = await _busctl(
        *("org.freedesktop.systemd1", "/org/freedesktop/systemd1", "org.freedesktop.systemd1.Manager"),
        *("StartTransientUnit", "ssa(sv)a(sa(sv))", scope, "fail"),
        *(str(len(properties)), *(word for each in properties for word in each), "0"),
    )
    if error:
        return [f"systemd made no {scope}: {error}"]
    deadline = time.monotonic() + BUSCTL_SECONDS
    while not _is_in(pid, scope):  # the answer is a job; it moves the process a little later
        if time.monotonic() > deadline:
            return [f"systemd did not move process {pid} into {scope}"]
        await asyncio.sleep(0.01)
    return []


def _is_in(pid: int, group: str) -> bool:
    try:
        return f"/{group}\n" in Path(f"/proc/{pid}/cgroup").read_text()
    except OSError:
        return False


async def _busctl(*words: str) -> str:
    """Make one D-Bus call; empty when it went well, else what busctl said."""
    bus = "--system" if os.geteuid() == 0 else "--user"
    try:
        process = await start_child(
            *("busctl", bus, "--quiet", f"--timeout={BUSCTL_SECONDS:.0f}", "call", *words),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.DEVNULL,
            stderr=asyncio.subprocess.PIPE,
        )
    except OSError as error:
        return f"busctl does not start: {error.strerror}"
    try:
        async with asyncio.timeout(BUSCTL_SECONDS + 1):
            _, stderr = await process.communicate()
    except TimeoutError:
        return "no answer"
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    return (stderr.decode(errors="replace").strip() or "busctl failed") if process.returncode else ""
