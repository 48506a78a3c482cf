"""A QEMU process: spawn it confined, recognise it again, wait for its end, kill it.

QEMU runs in its own session with its output in a file, so it outlives the daemon. A process is recognised after a
restart by pid + start time (a pid alone is reused), and found without any record by two marks in its environment.
"""

from __future__ import annotations

import asyncio
import ctypes
import os
import resource
import signal
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from innkeeper.base.errors import InvalidInput, QemuFailed
from innkeeper.base.home import Home
from innkeeper.plan.options import Option, Plan

MARK_VM, MARK_HOME = "INNKEEPER_VM", "INNKEEPER_HOME"
LOG = "qemu.log"
OPEN_FILES = 65536
_SET_THP_DISABLE, _GET_THP_DISABLE = 41, 42
"""prctl(2): PR_SET_THP_DISABLE, PR_GET_THP_DISABLE."""
_libc = ctypes.CDLL(None)


@dataclass(frozen=True)
class Pid:
    """A process id that cannot be mistaken for a later process with the same number.

    `started` is field 22 of /proc/<pid>/stat: clock ticks after boot (proc(5)).
    """

    number: int
    started: int

    @staticmethod
    def of(number: int) -> Pid | None:
        """The process that has this number now, None if there is none or it is a zombie."""
        try:
            fields = Path(f"/proc/{number}/stat").read_text().rpartition(")")[2].split()
        except (FileNotFoundError, ProcessLookupError):
            return None
        return None if fields[0] in "ZX" else Pid(number, int(fields[19]))

    def alive(self) -> bool:
        return Pid.of(self.number) == self


class Process:
    """One live QEMU, held by a pidfd. `ended` resolves to a sentence about how it ended."""

    def __init__(self, pid: Pid) -> None:
        """Raises `ProcessLookupError` when `pid` has ended."""
        self.pid = pid
        self._pidfd = os.pidfd_open(pid.number)
        if not pid.alive():  # between reading the record and opening it
            os.close(self._pidfd)
            raise ProcessLookupError(pid.number)
        self.ended: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        asyncio.get_running_loop().add_reader(self._pidfd, self._reap)

    def _reap(self) -> None:
        asyncio.get_running_loop().remove_reader(self._pidfd)
        how = "QEMU ended"  # of an adopted process, which is somebody else's child, no more is known
        with suppress(ChildProcessError):
            status = os.waitid(os.P_PIDFD, self._pidfd, os.WEXITED | os.WNOHANG)
            if status is not None:
                how = _ending(status.si_code, status.si_status)
        os.close(self._pidfd)
        if not self.ended.done():
            self.ended.set_result(how)

    def kill(self) -> None:
        """SIGKILL; `ended` tells when it is over."""
        with suppress(ProcessLookupError, OSError):
            signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)

    async def end(self, seconds: float = 10.0) -> str:
        """Kill it and wait until it is gone."""
        self.kill()
        async with asyncio.timeout(seconds):
            return await asyncio.shield(self.ended)


def _ending(code: int, status: int) -> str:
    if code == os.CLD_EXITED:
        return "QEMU exited" if status == 0 else f"QEMU exited with status {status}"
    try:
        return f"QEMU was killed by {signal.Signals(status).name}"
    except ValueError:
        return f"QEMU was killed by signal {status}"


def spawn(plan: Plan, home: Home, vm_id: str, ram: int | None = None, taps: Sequence[int] = ()) -> Process:
    """Start QEMU as the plan says, in the VM's folder. `ram` is the descriptor for `plan.ram`, `taps` are those for
    `plan.taps`; they stay the caller's. Raises `QemuFailed`, `InvalidInput` for an unreadable ISO."""
    cwd = home.vm(vm_id)
    environment = {
        "PATH": "/usr/sbin:/usr/bin:/sbin:/bin",
        "LANG": "C.UTF-8",
        MARK_VM: vm_id,
        MARK_HOME: str(home.data),
    }
    opened: list[int] = []
    try:
        arguments = plan.argv()
        for index, path in enumerate(plan.fdsets, start=1):
            opened.append(_open_regular(path, followed=not Path(path).is_relative_to(home.vms)))
            arguments += Option("-add-fd", f"fd={opened[-1]},set={index}").words()
        if plan.ram is not None:
            assert ram is not None
            arguments += plan.ram.option(ram).words()
        for tap, fd in zip(plan.taps, taps, strict=True):
            arguments += tap.option(fd).words()
        with (cwd / LOG).open("ab") as log, _may_lock(plan.locked), _in_small_pages(plan.ram is not None):
            child = subprocess.Popen(
                arguments,
                cwd=cwd,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                pass_fds=[*opened, *taps, *([] if ram is None else [ram])],
                start_new_session=True,
                umask=0o077,
                **_privileges(plan),
            )
    except OSError as error:
        raise QemuFailed(f"{plan.binary} could not be started: {error}") from None
    finally:
        for fd in opened:
            os.close(fd)
    # From here the process is held by its pidfd; Popen must not warn about, or reap, a child it was told to forget.
    child.returncode = 0
    pid = Pid.of(child.pid)
    if pid is None:
        raise QemuFailed(f"QEMU ended at once: {last_words(cwd)}", log=str(cwd / LOG))
    with suppress(OSError):
        resource.prlimit(pid.number, resource.RLIMIT_NOFILE, (OPEN_FILES, OPEN_FILES))
        resource.prlimit(pid.number, resource.RLIMIT_CORE, (0, 0))
    return Process(pid)


@contextmanager
def _may_lock(size: int) -> Iterator[None]:
    """What is started meanwhile may lock so many bytes of memory: it has its limit from the daemon, which as root needs
    none itself. Raises `QemuFailed`."""
    before = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    if size:
        let_lock(0, size)
    try:
        yield
    finally:
        if size:
            with suppress(ValueError, OSError):
                resource.setrlimit(resource.RLIMIT_MEMLOCK, before)


@contextmanager
def _in_small_pages(wanted: bool) -> Iterator[None]:
    """What is started meanwhile gets no transparent huge pages; it inherits that from the daemon. Of a fork's memory
    they make more without making it faster: it has its RAM from a file, and beside that many small areas of which it
    uses little."""
    if not wanted or _libc.prctl(_GET_THP_DISABLE, 0, 0, 0, 0):  # or nobody on this host gets any
        yield
        return
    _libc.prctl(_SET_THP_DISABLE, 1, 0, 0, 0)
    try:
        yield
    finally:
        _libc.prctl(_SET_THP_DISABLE, 0, 0, 0, 0)


def let_lock(pid: int, size: int) -> None:
    """The same for a QEMU that runs; 0 is the daemon itself."""
    _, hard = resource.prlimit(pid, resource.RLIMIT_MEMLOCK)
    hard = hard if hard == resource.RLIM_INFINITY else max(hard, size)
    try:
        resource.prlimit(pid, resource.RLIMIT_MEMLOCK, (size, hard))
    except (OSError, ValueError):
        raise QemuFailed(
            f"QEMU cannot be allowed to lock {size} bytes of memory, which a PCI device of the host's needs",
            hint="innkeeperd needs CAP_SYS_RESOURCE, or a LimitMEMLOCK of that size",
        ) from None


def _privileges(plan: Plan) -> dict[str, Any]:
    if plan.uid is None:
        return {}
    return {"user": plan.uid, "group": plan.uid, "extra_groups": list(plan.groups)}


def _open_regular(path: str, *, followed: bool) -> int:
    """`followed`: it may be a link; in a VM's folder, which is that of another QEMU, it may not."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | (0 if followed else os.O_NOFOLLOW))
    except OSError as error:
        raise InvalidInput(f"{path} cannot be read: {error.strerror}") from None
    if not os.path.isfile(f"/proc/self/fd/{fd}"):  # noqa: PTH113 - follows the descriptor, not a name
        os.close(fd)
        raise InvalidInput(f"{path} is not a regular file")
    return fd


def last_words(folder: Path, lines: int = 5) -> str:
    """The end of what QEMU wrote to stderr, for an error message."""
    try:
        with (folder / LOG).open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - 4096))
            text = file.read().decode(errors="replace")
    except OSError:
        return "(no output)"
    return "\n".join(text.strip().splitlines()[-lines:]) or "(no output)"


def find(home: Home) -> dict[Pid, str]:
    """All QEMU processes of this data folder, with the id of their VM: also those that no record knows."""
    found: dict[Pid, str] = {}
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            environment = (entry / "environ").read_bytes().split(b"\0")
        except OSError:
            continue
        marks = dict(pair.split(b"=", 1) for pair in environment if pair.startswith(b"INNKEEPER_") and b"=" in pair)
        if marks.get(MARK_HOME.encode()) == os.fsencode(home.data) and MARK_VM.encode() in marks:
            pid = Pid.of(int(entry.name))
            if pid is not None:
                found[pid] = marks[MARK_VM.encode()].decode()
    return found
