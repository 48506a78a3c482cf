"""The program that makes a process fork, as Redis does for its BGSAVE, so that its memory of one moment can be read
while it goes on. It is run by `picture.py`, and outlives a daemon that is killed in the middle of it.

Nobody but a process can fork it, so ptrace(2) makes it do so: its main thread, which waits in poll, makes other system
calls at that very instruction and waits anew then. Broken off anywhere, it is a poll that returned early. Everything
but the wanted memory is kept from the child (madvise(2), MADV_DONTFORK): what has no stack cannot run on, whatever
becomes of us, has no environment to be recognised by (`process.find`), and is made in a moment. Its descriptors, among
them locks and sockets, are closed. All other memory of the process keeps that mark, which means nothing to a QEMU: it
may not fork (-sandbox spawn=deny; PTRACE_O_SUSPEND_SECCOMP lifts that meanwhile, for the one thread). Of x86-64 alone.

    python -m innkeeper.qemu.tracer PID ADDRESS:SIZE…

It tries the thread, and writes `ready`; reads `take`, and writes the child's pid; reads `read FILE OFFSET ADDRESS
SIZE`, copies that part of the child's memory into the file, and writes `read`; kills the child at the end of stdin.
What goes wrong is written in place of those. It copies with the lowest priority there is: guests run beside it.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from innkeeper.base.priority import step_back
from innkeeper.qemu.process_memory import move, readv

PATIENCE = 0.25
"""Seconds in which the thread comes to where it waits: it stands still for less when it does."""
POLL = 0.0005
TOP = (1 << 47) - mmap.PAGESIZE
"""The end of a process's addresses (Linux, Documentation/arch/x86/x86_64/mm.rst)."""

_PEEK, _CONT, _GET_REGISTERS, _SET_REGISTERS, _DETACH, _TO_SYSTEM_CALL = 1, 7, 12, 13, 17, 24
_SET_OPTIONS, _GET_MESSAGE, _SEIZE, _INTERRUPT = 0x4200, 0x4201, 0x4206, 0x4207
_GET_RSEQ = 0x420F
_TELL_SYSTEM_CALLS, _TRACE_FORK, _EXIT_KILL, _SUSPEND_SECCOMP = 1, 2, 1 << 20, 1 << 21
_OPTIONS = _TELL_SYSTEM_CALLS | _TRACE_FORK | _SUSPEND_SECCOMP
_FORKED = 1
"""linux/ptrace.h: PTRACE_…, PTRACE_O_…, PTRACE_EVENT_FORK."""
_FAULTS = frozenset({signal.SIGSEGV, signal.SIGBUS, signal.SIGILL, signal.SIGFPE, signal.SIGTRAP})
_ALL_THREADS = 0x40000000
"""waitpid(2): __WALL."""
_CLONE_PARENT = 0x8000
_DONTFORK, _DOFORK = 10, 11
_POLL, _MADVISE, _CLONE, _PPOLL, _CLOSE_RANGE = 7, 28, 56, 271, 436
"""Numbers of system calls (asm/unistd_64.h)."""
_SYSCALL = 0x050F
"""The instruction, as a number of two bytes."""
_NONE = (1 << 64) - 1
_WORST_ERROR = -4095
_ERESTARTNOINTR = 513
"""What a clone comes to where a signal is on its way (linux/errno.h): it is to be made again once that is taken."""


_REGISTERS = (
    "r15", "r14", "r13", "r12", "rbp", "rbx", "r11", "r10", "r9", "r8", "rax", "rcx", "rdx", "rsi", "rdi", "orig_rax",
    "rip", "cs", "eflags", "rsp", "ss", "fs_base", "gs_base", "ds", "es", "fs", "gs",
)  # fmt: skip


class Registers(ctypes.Structure):
    """`struct user_regs_struct` (asm/user_64.h)."""

    _fields_ = tuple((name, ctypes.c_ulonglong) for name in _REGISTERS)

    def changed(self, **values: int) -> Registers:
        new = Registers.from_buffer_copy(self)
        for name, value in values.items():
            setattr(new, name, value)
        return new


_libc = ctypes.CDLL(None, use_errno=True)
_libc.ptrace.argtypes = [ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p]
_libc.ptrace.restype = ctypes.c_long


def _ptrace(request: int, pid: int, address: int = 0, data: int = 0) -> int:
    ctypes.set_errno(0)
    result = int(_libc.ptrace(request, pid, address, data))
    if result == -1 and ctypes.get_errno():
        raise OSError(ctypes.get_errno(), f"ptrace: {os.strerror(ctypes.get_errno())}")
    return result


class Traced:
    """The thread of a process that is traced and stands still, in front of the instruction that makes system calls."""

    def __init__(self, pid: int, registers: Registers, held: list[int]) -> None:
        self.pid, self._registers, self._held = pid, registers, held

    @staticmethod
    def waiting(pid: int) -> Traced:
        """The main thread of a process, once it waits. Raises `OSError`, `TimeoutError`."""
        _ptrace(_SEIZE, pid, 0, _OPTIONS)
        held: list[int] = []
        deadline = time.monotonic() + PATIENCE
        while True:
            _ptrace(_INTERRUPT, pid)
            while not _stop(pid, held)[1]:  # a signal that was quicker
                _ptrace(_CONT, pid)
            traced = Traced(pid, _registers(pid), held)
            at = traced._registers
            if at.orig_rax in (_POLL, _PPOLL) and _ptrace(_PEEK, pid, at.rip - 2) & 0xFFFF == _SYSCALL:
                return traced
            if time.monotonic() > deadline:
                _ptrace(_DETACH, pid)
                traced._send_held()
                raise TimeoutError(f"process {pid} does not come to wait for anything")
            _ptrace(_CONT, pid)
            time.sleep(POLL)

    def call(self, number: int, *arguments: int) -> int:
        """Make a system call; what it returns. A child that it makes stands still, and is its answer. Raises
        `OSError`."""
        values = dict(zip(("rdi", "rsi", "rdx", "r10", "r8", "r9"), (*arguments, *[0] * 6), strict=False))
        answer = -_ERESTARTNOINTR
        while answer == -_ERESTARTNOINTR:
            self._set(rax=number, **values)
            self._on()
            if forked := self._on():
                self._on()
            answer = ctypes.c_longlong(_registers(self.pid).rax).value
        if _WORST_ERROR <= answer < 0:
            raise OSError(-answer, f"system call {number}: {os.strerror(-answer)}")
        return forked or answer

    def keep(self, *parts: tuple[int, int]) -> None:
        """Of all its memory a child gets these parts, (address, size), alone."""
        with contextlib.suppress(OSError):  # ENOMEM: not all of it is mapped
            self.call(_MADVISE, 0, TOP, _DONTFORK)
        for address, size in parts:
            self.call(_MADVISE, address, size, _DOFORK)

    def fork(self, regions: Sequence[tuple[int, int]]) -> int:
        """A child with this memory, and no other than what a system call takes: the instruction, and where the kernel
        itself writes (rseq)."""
        rseq = (ctypes.c_uint64 * 3)()
        with contextlib.suppress(OSError):  # none, in a kernel before 5.13
            _ptrace(_GET_RSEQ, self.pid, ctypes.sizeof(rseq), ctypes.addressof(rseq))
        pages = {at & -mmap.PAGESIZE for at in (self._registers.rip - 2, rseq[0]) if at}
        try:
            self.keep(*regions, *((page, mmap.PAGESIZE) for page in pages))
            # A child of the process's own parent: it would not reap one.
            return self.call(_CLONE, _CLONE_PARENT | signal.SIGCHLD)
        finally:
            self.keep()

    def let_go(self) -> None:
        """It waits anew."""
        self._set(rax=self._registers.orig_rax)
        _ptrace(_DETACH, self.pid)
        self._send_held()

    def _set(self, **values: int) -> None:
        # Without orig_rax the kernel has no system call to restart.
        new = self._registers.changed(rip=self._registers.rip - 2, orig_rax=_NONE, **values)
        _ptrace(_SET_REGISTERS, self.pid, 0, ctypes.addressof(new))

    def _on(self) -> int:
        """To the beginning or the end of a system call, or to a new child, which is returned."""
        while True:
            _ptrace(_TO_SYSTEM_CALL, self.pid)
            kind, event = _stop(self.pid, self._held)
            if kind == signal.SIGTRAP | 0x80:
                return 0
            if event == _FORKED:
                child = ctypes.c_ulong()
                _ptrace(_GET_MESSAGE, self.pid, 0, ctypes.addressof(child))
                return child.value

    def _send_held(self) -> None:
        for number in self._held:
            os.kill(self.pid, number)


def _stop(pid: int, held: list[int]) -> tuple[int, int]:
    """(signal, event) with which it stands still. A signal for itself it gets later."""
    _, status = os.waitpid(pid, _ALL_THREADS)
    if not os.WIFSTOPPED(status):
        raise ProcessLookupError(f"process {pid} has ended")
    kind, event = os.WSTOPSIG(status), status >> 16
    if not event and kind in _FAULTS:
        raise InterruptedError(f"process {pid} has met with {signal.Signals(kind).name}")
    if not event and kind != signal.SIGTRAP | 0x80:
        held.append(kind)
    return kind, event


def _registers(pid: int) -> Registers:
    found = Registers()
    _ptrace(_GET_REGISTERS, pid, 0, ctypes.addressof(found))
    return found


def _still(child: int) -> Traced:
    """What has just been made, and dies with us."""
    _stop(child, [])
    _ptrace(_SET_OPTIONS, child, 0, _OPTIONS | _EXIT_KILL)
    return Traced(child, _registers(child), [])


def _end(child: int) -> None:
    with contextlib.suppress(ProcessLookupError, ChildProcessError):
        os.kill(child, signal.SIGKILL)
        while os.WIFSTOPPED(os.waitpid(child, _ALL_THREADS)[1]):
            pass


def read(child: int, file: str, offset: int, address: int, size: int) -> None:
    """Copy a part of its memory into a file. Raises `OSError`."""
    target = os.open(file, os.O_RDWR | os.O_CLOEXEC)
    try:
        into = mmap.mmap(target, size, offset=offset)
    finally:
        os.close(target)
    move(readv, child, ctypes.addressof(ctypes.c_char.from_buffer(into)), address, size)


def main(pid: int, regions: Sequence[tuple[int, int]]) -> None:
    """Raises `OSError`."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    Traced.waiting(pid).let_go()
    print("ready", flush=True)
    if not sys.stdin.readline():
        return
    thread = Traced.waiting(pid)
    try:
        child = thread.fork(regions)
    finally:
        thread.let_go()
    try:
        print(child, flush=True)
        _still(child).call(_CLOSE_RANGE, 0, (1 << 32) - 1)
        Path(f"/proc/{child}/oom_score_adj").write_text("1000")  # where memory is short, it goes first
        step_back()
        for line in sys.stdin:
            _, file, *numbers = line.split(" ")
            read(child, file, *map(int, numbers))
            print("read", flush=True)
    finally:
        _end(child)


if __name__ == "__main__":
    try:
        first, *others = sys.argv[1:]
        main(int(first), [(int(at), int(size)) for at, size in (each.split(":") for each in others)])
    except OSError as error:
        with contextlib.suppress(BrokenPipeError):
            print(error, flush=True)
        sys.exit(1)
