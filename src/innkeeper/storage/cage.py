"""The cage: every host program that storage needs runs here, with limits, and never outlives its caller.

A program gets its own session, a minimal environment, no stdin, resource limits (set by util-linux `prlimit`
in the child: no Python code runs between fork and exec, which would be unsafe in a program with threads), no
new privileges, another uid if wished, and SIGKILL when the daemon dies. Whatever way a run ends, its process
group is dead and reaped before `run_tool` returns.

Each process carries its job in its environment, so that a daemon that was killed can find leftovers when it
comes back: see `sweep`.
"""

from __future__ import annotations

import asyncio
import os
import select
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from secrets import token_hex
from typing import IO

import structlog

from innkeeper.base.errors import InvalidInput, ToolFailed, ToolMissing, ToolTimeout, Unsupported

log = structlog.get_logger()

PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
KEPT_OUTPUT = 1 << 20
"""Bytes of stdout, and of stderr, that are kept: the last ones."""
LONGEST_LINE = 1 << 16
"""Bytes after which an unended line is handed on as it is."""
PIPE_SECONDS = 2.0
"""How long the pipes may stay open after the program and its group have ended."""
REAP_SECONDS = 10.0
"""How long a process may take to vanish after SIGKILL (it can hang in the kernel on a dead disk)."""

PACKAGES = {
    "blkid": "util-linux",
    "busybox": "busybox-static",
    "cpio": "cpio",
    "debugfs": "e2fsprogs",
    "dpkg-deb": "dpkg",
    "e2fsck": "e2fsprogs",
    "fakeroot": "fakeroot",
    "fdisk": "fdisk",
    "grub-install": "grub2-common",
    "grub-mkimage": "grub-common",
    "mcopy": "mtools",
    "mformat": "mtools",
    "mke2fs": "e2fsprogs",
    "mkfs.ext4": "e2fsprogs",
    "mkfs.vfat": "dosfstools",
    "mmd": "mtools",
    "mmdebstrap": "mmdebstrap",
    "prlimit": "util-linux",
    "qemu-img": "qemu-utils",
    "qemu-io": "qemu-utils",
    "qemu-nbd": "qemu-utils",
    "qemu-system-x86_64": "qemu-system-x86",
    "resize2fs": "e2fsprogs",
    "setpriv": "util-linux",
    "sfdisk": "fdisk",
    "sgdisk": "gdisk",
    "ssh": "openssh-client",
    "ssh-keygen": "openssh-client",
    "tar": "tar",
    "tune2fs": "e2fsprogs",
    "unsquashfs": "squashfs-tools",
    "xorriso": "xorriso",
    "xz": "xz-utils",
    "zstd": "zstd",
}
"""Program → Debian package that has it; a program that is not here is in the package of its own name."""


@dataclass(frozen=True)
class Limits:
    """What one run may take. `None` is no limit of ours."""

    seconds: float
    """Wall-clock time; over it the run is killed and `ToolTimeout` raised."""
    memory: int | None = None
    """Bytes of address space, each process (RLIMIT_AS)."""
    file_size: int | None = None
    """Bytes that a file may grow to (RLIMIT_FSIZE; for a sparse file its apparent size counts)."""
    processes: int | None = None
    """Processes and threads of the uid on the whole host (RLIMIT_NPROC; root is exempt)."""
    open_files: int | None = None
    """File descriptors, each process (RLIMIT_NOFILE)."""


async def run_tool(
    argv: Sequence[str | os.PathLike[str]],
    *,
    limits: Limits,
    cwd: Path | None = None,
    env: Mapping[str, str] | None = None,
    user: int | None = None,
    stdin: bytes | None = None,
    on_line: Callable[[str], None] | None = None,
    job: str = "",
    pass_fds: Collection[int] = (),
    ok_status: Collection[int] = (0,),
    no_new_privs: bool = True,
) -> str:
    """Run a host program and return its stdout (the last MiB of it, undecodable bytes replaced).

    - `env` is added to PATH, LANG, LC_ALL and TZ; nothing is inherited.
    - `user` is the uid, and gid, to run as, without supplementary groups; only root can change it.
    - `on_line` gets each line of stdout and stderr as it comes; '\\r' ends a line too (`qemu-img -p`).
    - `job`, the id of the operation, marks the processes for `sweep`.
    - `pass_fds` are kept open in the program, under the same numbers.
    - `ok_status`: exit statuses that are no failure.
    - `no_new_privs=False` is for programs that need setuid programs (mmdebstrap as a plain user: newuidmap).

    Raises `ToolMissing`, `ToolFailed` (another exit status, or a signal) and `ToolTimeout`. When it
    raises, or is cancelled, the program and its descendants are dead.
    """
    run = token_hex(8)
    environ = {"PATH": PATH, "LANG": "C.UTF-8", "LC_ALL": "C.UTF-8", "TZ": "UTC", **(env or {})}
    environ |= {"INNKEEPER_JOB": job, "INNKEEPER_RUN": run}
    program = Path(os.fspath(argv[0])).name
    command = _caged(argv, environ["PATH"], limits, user, no_new_privs)

    source = _as_file(stdin)
    try:
        process = subprocess.Popen(  # noqa: ASYNC220 (vfork and exec: a millisecond; and we reap it ourselves)
            command,
            stdin=source,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            cwd=cwd,
            env=environ,
            start_new_session=True,
            pass_fds=tuple(pass_fds),
        )
    except ValueError as error:  # a NUL byte in an argument or in the environment
        raise InvalidInput(f"{program}: {error}") from error
    except OSError as error:  # the folder is not there, the arguments are too long, no more processes
        raise ToolFailed(f"{program} could not be started: {error}", program=program) from error
    finally:
        os.close(source)

    tails = (_Tail(on_line), _Tail(on_line))
    on_time = await _attend(process, tails, limits.seconds, run, program)
    out, err = tails
    if on_time and process.returncode in ok_status:
        return out.text()
    last = "\n".join((err.text().strip() or out.text().strip()).splitlines()[-20:])[-4000:]
    facts = {"program": program, "output": last}
    if not on_time:
        raise ToolTimeout(_sentence(f"{program} did not end within {limits.seconds:g} s", last), **facts)
    if process.returncode < 0:
        name = _signal_name(-process.returncode)
        raise ToolFailed(_sentence(f"{program} was killed by {name}", last), signal=name, **facts)
    raise ToolFailed(
        _sentence(f"{program} ended with status {process.returncode}", last), exit=process.returncode, **facts
    )


def sweep(jobs: Collection[str]) -> list[int]:
    """Kill what a killed daemon left running: processes that `run_tool` marked with one of these operations (their
    ids are random, so no other daemon has them), and their process groups. Returns the pids that carried the mark.

    Blocks until they are gone (at most `REAP_SECONDS`).
    """
    return _kill_marked(lambda environ: environ.get("INNKEEPER_JOB", "") in jobs) if jobs else []


def find_tool(name: str, path: str = PATH) -> str:
    """The absolute path of a program, or `ToolMissing` that names the Debian package."""
    if found := shutil.which(name, path=path):
        return str(Path(found).absolute())
    package = PACKAGES.get(Path(name).name, Path(name).name)
    raise ToolMissing(f"{name} is not installed", hint=f"apt install {package}", package=package)


def _caged(
    argv: Sequence[str | os.PathLike[str]], path: str, limits: Limits, user: int | None, no_new_privs: bool
) -> list[str]:
    """The command with its limits before it; each part execs the next, so there is one pid."""
    sizes = {
        "core": 0,
        "as": limits.memory,
        "fsize": limits.file_size,
        "nproc": limits.processes,
        "nofile": limits.open_files,
    }
    command = [
        find_tool("prlimit"),
        *(f"--{name}={size}:{size}" for name, size in sizes.items() if size is not None),
    ]
    command += ["--", find_tool("setpriv"), "--pdeathsig=KILL"]
    if no_new_privs:
        command.append("--no-new-privs")
    if user is not None and (user, user) != (os.geteuid(), os.getegid()):
        if os.geteuid() != 0:
            raise Unsupported(f"only root can run {os.fspath(argv[0])} as uid {user}")
        command += [f"--reuid={user}", f"--regid={user}", "--clear-groups"]
    return [*command, "--", find_tool(os.fspath(argv[0]), path), *(os.fspath(word) for word in argv[1:])]


def _as_file(content: bytes | None) -> int:
    """`content` as a descriptor to read from: a memfd cannot block anybody, which a pipe can."""
    if content is None:
        return os.open(os.devnull, os.O_RDONLY)
    fd = os.memfd_create("stdin")
    with os.fdopen(os.dup(fd), "wb") as file:
        file.write(content)
    os.lseek(fd, 0, os.SEEK_SET)
    return fd


class _Tail:
    """One output pipe: hands on its lines and keeps its end."""

    def __init__(self, on_line: Callable[[str], None] | None) -> None:
        self._kept = bytearray()
        self._line = bytearray()
        self._on_line = on_line
        self.ended = asyncio.Event()

    def read(self, loop: asyncio.AbstractEventLoop, fd: int) -> None:
        """Take what is there, in bites, so that a flood does not starve the event loop."""
        with suppress(BlockingIOError):
            data = os.read(fd, 1 << 16)
            if not data:
                loop.remove_reader(fd)
                self.ended.set()
                return
            self._kept += data
            if len(self._kept) > 2 * KEPT_OUTPUT:
                del self._kept[:-KEPT_OUTPUT]
            if self._on_line is not None:
                self._line += data.replace(b"\r", b"\n")
                *lines, rest = self._line.split(b"\n")
                self._line = rest if len(rest) <= LONGEST_LINE else bytearray()
                for line in lines if self._line is rest else [*lines, rest]:
                    self._emit(line)

    def close(self, loop: asyncio.AbstractEventLoop, pipe: IO[bytes]) -> None:
        """Take what a killed program left in the pipe, and hand on what came after the last line end."""
        self.read(loop, pipe.fileno())
        loop.remove_reader(pipe.fileno())
        pipe.close()
        self._emit(self._line)

    def _emit(self, line: bytearray) -> None:
        if line and self._on_line is not None:
            try:
                self._on_line(line.decode(errors="replace"))
            except Exception:  # a bad report must not leave the tool running or unread
                log.exception("on_line failed")

    def text(self) -> str:
        return bytes(self._kept[-KEPT_OUTPUT:]).decode(errors="replace")


async def _attend(
    process: subprocess.Popen[bytes], tails: tuple[_Tail, _Tail], seconds: float, run: str, program: str
) -> bool:
    """Read the output until the process ends, then see that nothing of it is left. False: out of time."""
    loop = asyncio.get_running_loop()
    exited = asyncio.Event()
    on_time = drained = False
    assert process.stdout is not None and process.stderr is not None
    pipes = (process.stdout, process.stderr)
    with ExitStack() as stack:
        stack.callback(_kill_and_wait, process)
        pidfd = os.pidfd_open(process.pid)
        stack.callback(os.close, pidfd)
        loop.add_reader(pidfd, _once, loop, pidfd, exited)
        stack.callback(loop.remove_reader, pidfd)
        for pipe, tail in zip(pipes, tails, strict=True):
            os.set_blocking(pipe.fileno(), False)
            loop.add_reader(pipe.fileno(), tail.read, loop, pipe.fileno())
            stack.callback(tail.close, loop, pipe)
        try:
            with suppress(TimeoutError):
                async with asyncio.timeout(seconds):
                    await exited.wait()
                    on_time = True
            if on_time:
                # The leader is a zombie that nobody has waited for, so its pid cannot mean another group yet.
                _kill_group(process.pid)
                with suppress(TimeoutError):
                    async with asyncio.timeout(PIPE_SECONDS):
                        for tail in tails:
                            await tail.ended.wait()
                        drained = True
        finally:
            _kill_group(process.pid)
            if not drained:  # killed by us, or a descendant that left the group holds the pipes
                _kill_marked(lambda environ: environ.get("INNKEEPER_RUN") == run)
            await _gone(exited, process, program)
    return on_time


def _once(loop: asyncio.AbstractEventLoop, pidfd: int, exited: asyncio.Event) -> None:
    """The pidfd of a zombie stays readable: look once."""
    loop.remove_reader(pidfd)
    exited.set()


async def _gone(exited: asyncio.Event, process: subprocess.Popen[bytes], program: str) -> None:
    """Wait for a killed process and its group, through further cancellations too: they are passed on at the end."""
    deadline = time.monotonic() + REAP_SECONDS
    cancelled: asyncio.CancelledError | None = None
    while not exited.is_set() or _is_alive(process):
        if (left := deadline - time.monotonic()) <= 0:
            log.error("program survives SIGKILL", program=program, pid=process.pid)
            break
        try:
            with suppress(TimeoutError):
                await asyncio.wait_for(exited.wait(), left)
            if exited.is_set() and _is_alive(process):
                await asyncio.sleep(0.005)
        except asyncio.CancelledError as error:
            cancelled = error
    if cancelled:
        raise cancelled


def _is_alive(process: subprocess.Popen[bytes]) -> bool:
    """Reaps the leader, which has ended; whether others of its group still die."""
    process.wait()
    return _has_members(process.pid)


def _kill_and_wait(process: subprocess.Popen[bytes]) -> None:
    """The last thing that happens to every process; it is reaped already unless something here failed."""
    if process.returncode is None:
        _kill_group(process.pid)
        with suppress(subprocess.TimeoutExpired):
            process.wait(0.5)


def _has_members(group: int) -> bool:
    """Whether a process of the group runs. Zombies do not count: it is for others to reap them."""
    with suppress(PermissionError):
        try:
            os.killpg(group, 0)
        except ProcessLookupError:
            return False
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with suppress(OSError):
                state, _, member_of = (entry / "stat").read_text().rpartition(")")[2].split()[:3]
                if int(member_of) == group and state not in "ZX":
                    return True
    return False


def _kill_group(leader: int) -> None:
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(leader, signal.SIGKILL)


def _marked(wanted: Callable[[Mapping[str, str]], bool]) -> Iterator[tuple[int, int]]:
    """(pid, pidfd) of the processes whose environment is wanted; the pidfd was opened before it was read."""
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit() or int(entry.name) == os.getpid():
            continue
        pidfd = -1
        try:
            pidfd = os.pidfd_open(int(entry.name))
            raw = (entry / "environ").read_bytes()
        except OSError:  # gone, or another user's
            raw = b""
        pairs = (pair.partition("=") for pair in raw.decode(errors="replace").split("\0"))
        if raw and wanted({name: value for name, _, value in pairs}):
            yield int(entry.name), pidfd
        elif pidfd >= 0:
            os.close(pidfd)


def _kill_marked(wanted: Callable[[Mapping[str, str]], bool]) -> list[int]:
    """Kill such processes, with their groups, until a look finds none."""
    killed: list[int] = []
    deadline = time.monotonic() + REAP_SECONDS
    while found := list(_marked(wanted)):
        groups = set()
        for pid, pidfd in found:
            with suppress(OSError):
                if (group := os.getpgid(pid)) != os.getpgrp():
                    os.killpg(group, signal.SIGKILL)
                    groups.add(group)
            with suppress(OSError):
                signal.pidfd_send_signal(pidfd, signal.SIGKILL)
        for pid, pidfd in found:
            select.select([pidfd], [], [], max(0.0, deadline - time.monotonic()))
            os.close(pidfd)
            killed.append(pid)
        while any(map(_has_members, groups)) and time.monotonic() < deadline:
            time.sleep(0.005)
        if time.monotonic() > deadline:
            log.error("processes survive SIGKILL", pids=[pid for pid, _ in found])
            break
    return killed


def _signal_name(number: int) -> str:
    if number == signal.SIGXFSZ:
        return "SIGXFSZ (file size limit)"
    return signal.Signals(number).name if number < signal.SIGRTMIN else f"signal {number}"


def _sentence(what: str, last: str) -> str:
    return f"{what}: {last}" if last else what
