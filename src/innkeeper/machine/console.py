"""The serial console, shared: QEMU's socket takes one client, so one connection serves everybody who looks."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path

QUEUE = 256
"""Blocks of output that wait for a slow viewer before it loses the oldest."""


class Console:
    """Viewers of one VM's console. Connects with the first viewer, disconnects with the last."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._viewers: set[asyncio.Queue[bytes | None]] = set()
        self._writer: asyncio.StreamWriter | None = None
        self._task: asyncio.Task[None] | None = None
        self._lock = asyncio.Lock()

    @asynccontextmanager
    async def view(self) -> AsyncIterator[asyncio.Queue[bytes | None]]:
        """A queue of what the guest prints from now on; None says that the guest is gone. Raises `OSError`."""
        queue: asyncio.Queue[bytes | None] = asyncio.Queue(QUEUE)
        async with self._lock:
            if self._writer is None:
                await self._connect()
            self._viewers.add(queue)
        try:
            yield queue
        finally:
            self._viewers.discard(queue)
            if not self._viewers:
                self.close()

    async def type(self, keys: bytes) -> None:
        """Send what somebody typed."""
        if self._writer is not None:
            self._writer.write(keys)
            with suppress(ConnectionError):
                await self._writer.drain()

    async def _connect(self) -> None:
        folder = os.open(self._folder, os.O_PATH | os.O_DIRECTORY)
        try:
            reader, self._writer = await asyncio.open_unix_connection(f"/proc/self/fd/{folder}/serial.sock")
        finally:
            os.close(folder)
        self._task = asyncio.create_task(self._spread(reader))

    async def _spread(self, reader: asyncio.StreamReader) -> None:
        with suppress(ConnectionError):
            while block := await reader.read(65536):
                for queue in self._viewers:
                    _put(queue, block)
        for queue in self._viewers:
            _put(queue, None)
        if self._writer is not None:
            self._writer.close()
            self._writer = None

    def close(self) -> None:
        """Let go of QEMU's socket."""
        if self._task is not None:
            self._task.cancel()
        if self._writer is not None:
            self._writer.close()
            self._writer = None


def _put(queue: asyncio.Queue[bytes | None], block: bytes | None) -> None:
    if queue.full():
        queue.get_nowait()
    queue.put_nowait(block)
