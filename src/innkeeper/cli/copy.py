"""`inn cp`: files and folders between this host and guests.

One way for everything: the source as a tar stream, unpacked on the other side, over SSH where the guest has it and over
the guest agent otherwise (where a single file goes through the API as it is, so that a guest without tar can have it).
Guest to guest goes through a temporary folder here.
"""

from __future__ import annotations

import posixpath
import sys
import tempfile
import time
from argparse import Namespace
from pathlib import Path
from typing import NamedTuple

from innkeeper.base.errors import InvalidInput
from innkeeper.base.units import format_size
from innkeeper.cli import archive, terminal
from innkeeper.cli.guest_shell import AgentShell, SshShell
from innkeeper.cli.parser import usage_error
from innkeeper.client import VM, ApiError, Innkeeper

PROBE = """p=$1
if [ -d "$p" ]; then echo folder
elif [ -f "$p" ]; then stat -L -c 'file %a %s' -- "$p"
elif [ -e "$p" ]; then echo other
elif [ -d "$(dirname -- "$p")" ]; then echo absent; else echo lost; fi"""
"""What a path in the guest is; `lost` where even its folder is missing."""


class Place(NamedTuple):
    """A side of the copy: a path here (`vm` is empty) or in a guest."""

    vm: str
    path: str


def place(text: str) -> Place:
    """`VM:PATH`, or a path here: one with a `/` before its first colon, as scp has it."""
    name, colon, path = text.partition(":")
    if colon and name and "/" not in name:
        return Place(name, path or ".")
    return Place("", text)


def copy(inn: Innkeeper, args: Namespace) -> int:
    """SRC to DST, whichever side is a guest."""
    source, target = place(args.source), place(args.destination)
    if not source.vm and not target.vm:
        raise usage_error(args, "neither side is in a guest: write VM:PATH for one of them")
    if source.vm and target.vm:
        with tempfile.TemporaryDirectory(prefix="inn-cp-") as folder:
            middle = Path(folder) / (posixpath.basename(source.path.rstrip("/")) or "root")
            download(inn.vm(source.vm), _shell(inn, source.vm, args), source.path, middle)
            done = upload(inn.vm(target.vm), _shell(inn, target.vm, args), middle, target.path)
    elif source.vm:
        done = download(inn.vm(source.vm), _shell(inn, source.vm, args), source.path, _local_target(source, target))
    else:
        if not Path(source.path).exists():
            raise InvalidInput(f"there is no {source.path} here")
        done = upload(inn.vm(target.vm), _shell(inn, target.vm, args), Path(source.path), target.path)
    if args.output == "json":
        terminal.emit_json({"source": args.source, "destination": args.destination, "bytes": done})
    return 0


def _shell(inn: Innkeeper, name: str, args: Namespace) -> SshShell | AgentShell:
    vm = inn.vm(name)
    if args.via == "agent":
        return AgentShell(vm)
    from innkeeper.cli.ssh import full_command_line, reachable, wait_for_sshd

    try:
        way = reachable(vm)
    except ApiError as error:
        if error.status == 404 or args.via == "ssh" or error.code not in ("unsupported", "action-refused"):
            raise
        return AgentShell(vm)
    command = full_command_line(way, args.identity)
    command[1:1] = ["-o", "BatchMode=yes"]
    wait_for_sshd(way)
    return SshShell(command)


def _local_target(source: Place, target: Place) -> Path:
    path = Path(target.path)
    if path.is_dir():
        return path / (posixpath.basename(posixpath.normpath(source.path)) or "root")
    if not path.parent.is_dir() or target.path.endswith("/"):
        raise InvalidInput(f"there is no folder {path if target.path.endswith('/') else path.parent} here")
    return path


def upload(vm: VM, shell: SshShell | AgentShell, source: Path, path: str) -> int:
    """`source` into the guest as, or into, `path`; returns the bytes that went. Raises `InvalidInput`."""
    path = _guest_path(shell, path)
    kind = shell.ask(["sh", "-c", PROBE, "sh", path]).split()
    if kind[:1] == ["folder"]:
        path = posixpath.join(path, source.resolve().name)
    elif kind[:1] == ["lost"] or path.endswith("/"):
        folder = path if path.endswith("/") else posixpath.dirname(path)
        raise InvalidInput(f"there is no folder {folder} in {vm.name}", hint=f"make it: inn exec {vm.name} -- mkdir …")
    folder, name = posixpath.split(path)
    size = archive.total_size(source)
    with Meter(f"{source.name} → {vm.name}", size) as meter:
        if isinstance(shell, AgentShell) and source.is_file():
            with source.open("rb") as file:
                blocks = iter(lambda: _passed(file.read(256 * 1024), meter), b"")
                vm.write_file(path, blocks, mode=source.stat().st_mode & 0o777, length=size)
        else:
            with shell.writing(["tar", "-xpof", "-", "-C", folder or "."]) as pipe:
                archive.pack(source, name, pipe, meter.add)
    return size


def download(vm: VM, shell: SshShell | AgentShell, path: str, target: Path) -> int:
    """`path` of the guest as `target`; returns the bytes that came. Raises `InvalidInput`."""
    path = _guest_path(shell, path)
    kind = shell.ask(["sh", "-c", PROBE, "sh", path]).split()
    if kind[:1] in (["absent"], ["lost"]):
        raise InvalidInput(f"there is no {path} in {vm.name}")
    if kind[:1] == ["other"]:
        raise InvalidInput(f"{path} in {vm.name} is neither a file nor a folder")
    size = int(kind[2]) if kind[:1] == ["file"] and len(kind) == 3 else None
    with Meter(f"{vm.name} → {target.name}", size) as meter:
        if isinstance(shell, AgentShell) and size is not None:
            _save(vm, path, target, int(kind[1], 8) & 0o777, meter)
        else:
            folder, name = posixpath.split(posixpath.normpath(path))
            mode = "-chf" if size is not None else "-cf"  # a link that was asked for by name is followed
            with shell.reading(["tar", mode, "-", "-C", folder or ".", _member(name)]) as pipe:
                archive.unpack(pipe, target, meter.add)
    return meter.passed if size is None else size


def _member(name: str) -> str:
    """After ./ a name with a dash in front is no option."""
    return f"./{name}" if name else "."


def _save(vm: VM, path: str, target: Path, mode: int, meter: Meter) -> None:
    """A single file over the API, whole or not at all."""
    with tempfile.NamedTemporaryFile(dir=target.parent, prefix=f".{target.name[:80]}.", delete=False) as part:
        try:
            for block in vm.read_stream(path):
                part.write(_passed(block, meter))
            part.flush()
            Path(part.name).chmod(mode)
            Path(part.name).replace(target)
        except BaseException:
            Path(part.name).unlink(missing_ok=True)
            raise


def _guest_path(shell: SshShell | AgentShell, path: str) -> str:
    """Relative to the login's home over SSH (where the shell starts), to / over the agent."""
    if path.startswith("~/") and isinstance(shell, SshShell):
        return path[2:] or "."
    return posixpath.join("/", path) if isinstance(shell, AgentShell) else path


def _passed(block: bytes, meter: Meter) -> bytes:
    meter.add(len(block))
    return block


class Meter:
    """Progress of a copy on a terminal, once it lasts."""

    def __init__(self, what: str, total: int | None) -> None:
        self._what, self._total = what, total
        self.passed = 0
        self._began = self._last = time.monotonic()
        self._shown = False
        self._live = terminal.interactive(sys.stderr)

    def add(self, count: int) -> None:
        """So many more bytes went through."""
        self.passed += count
        now = time.monotonic()
        if self._live and now - self._last > 0.2 and now - self._began > 0.5:
            self._last, self._shown = now, True
            rate = self.passed / (now - self._began)
            of = f" of {format_size(self._total)}, {min(1, self.passed / self._total):.0%}" if self._total else ""
            what = terminal.clean(self._what)
            sys.stderr.write(f"\r\x1b[K  {what}  {format_size(self.passed)}{of}, {format_size(rate)}/s")
            sys.stderr.flush()

    def __enter__(self) -> Meter:
        return self

    def __exit__(self, *_: object) -> None:
        if self._shown:
            sys.stderr.write("\r\x1b[K")
            sys.stderr.flush()
