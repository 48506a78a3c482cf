"""A process's memory as it is at one moment, to be read while the process goes on: a child of it that never runs.

The kernel keeps what the two have in common once, and copies a page when the process writes to it (fork(2)). How it is
made, and why that is safe, is told in `tracer.py`, which does it. Where it cannot be had (no CAP_SYS_ADMIN, not x86-64,
not enough memory by the host's accounting) there are other ways: `guest_memory.py`.
"""

from __future__ import annotations

import asyncio
import os
import platform
import sys
from collections.abc import AsyncIterator, Sequence
from contextlib import suppress
from time import monotonic

from innkeeper.base.child import start_child
from innkeeper.base.errors import QemuFailed

ALLOWED = 10.0
"""Seconds that the tracer gets for its start, and for its end."""
AT_ONCE = 2.0
"""Seconds that it gets while the process stands still."""

ENDS, POLL = 1.0, 0.01
"""Seconds in which a child ends whose tracer was killed; between two looks."""


class Picture:
    """`ready` beforehand; `take` it; `read` what it holds, which is the memory of process `pid`; `close`."""

    def __init__(self, tracer: asyncio.subprocess.Process) -> None:
        self._tracer = tracer
        self.pid = 0

    @staticmethod
    async def ready(pid: int, regions: Sequence[tuple[int, int]]) -> Picture:
        """Get ready for a picture of these parts of a process's memory, (address, size). Raises `QemuFailed`."""
        if platform.machine() != "x86_64":
            raise QemuFailed(f"there is no picture of a process on {platform.machine()}")
        words = [str(pid), *(f"{address}:{size}" for address, size in regions)]
        try:
            tracer = await start_child(
                *(sys.executable, "-I", "-m", "innkeeper.qemu.tracer", *words),
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                start_new_session=True,
                cwd="/",
            )
        except OSError as error:
            raise QemuFailed(f"{sys.executable} does not start: {error.strerror}") from None
        picture = Picture(tracer)
        try:
            await picture._hear("ready", ALLOWED)
        except BaseException:
            await picture.close()
            raise
        return picture

    async def take(self) -> None:
        """Now. Raises `QemuFailed`; the process is as it was then."""
        assert self._tracer.stdin is not None
        with suppress(OSError):  # what it said before it ended is read below
            self._tracer.stdin.write(b"take\n")
        self.pid = int(await self._hear("", AT_ONCE))

    async def read(self, file: int, todo: Sequence[tuple[int, int, int]]) -> AsyncIterator[int]:
        """Copy (offset in the file, address, size) each, while everybody else goes first; how many there are by then.
        Raises `QemuFailed`."""
        assert self._tracer.stdin is not None
        for count, numbers in enumerate(todo, 1):
            words = " ".join(map(str, numbers))
            self._tracer.stdin.write(f"read /proc/{os.getpid()}/fd/{file} {words}\n".encode())
            await self._hear("read", None)
            yield count

    async def _hear(self, wanted: str, seconds: float | None) -> str:
        assert self._tracer.stdout is not None
        try:
            async with asyncio.timeout(seconds):
                said = (await self._tracer.stdout.readline()).decode().strip()
        except TimeoutError:
            said = f"nothing was heard for {seconds:.0f} s"
        if said != wanted if wanted else not said.isdigit():
            raise QemuFailed(f"there is no picture of the process's memory: {said or 'the tracer ended'}")
        return said

    async def close(self) -> None:
        """Nothing is left of it."""
        assert self._tracer.stdin is not None
        self._tracer.stdin.close()
        ending = asyncio.ensure_future(self._end())
        try:
            await asyncio.shield(ending)
        except asyncio.CancelledError:
            await ending
            raise

    async def _end(self) -> None:
        try:
            async with asyncio.timeout(ALLOWED):
                await self._tracer.wait()
        except TimeoutError:
            self._tracer.kill()  # the kernel ends the child then (PTRACE_O_EXITKILL)
            await self._tracer.wait()
        assert self._tracer.stdout is not None
        _, _, unheard = (await self._tracer.stdout.read()).decode().strip().rpartition("\n")
        if child := self.pid or (int(unheard) if unheard.isdigit() else 0):
            deadline = monotonic() + ENDS
            with suppress(ChildProcessError):  # it is ours to reap if the process is
                while os.waitpid(child, os.WNOHANG)[0] == 0 and monotonic() < deadline:  # noqa: ASYNC110, ASYNC222 - at once
                    await asyncio.sleep(POLL)
