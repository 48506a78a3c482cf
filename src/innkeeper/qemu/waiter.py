"""The process in a captured guest that waits to be told who it is now, on a port of its own (plan/rebirth.py)."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from pathlib import Path

from innkeeper.base.errors import AgentFailed, AgentUnavailable
from innkeeper.base.units import KIB
from innkeeper.qemu.sockets import connect

NAME = "rebirth.sock"
ANSWER = 64 * KIB
"""Bytes of an answer at most: a guest wrote it."""


class Waiter:
    """One connection to the port; while there is none, whoever reads it in the guest sees its end."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader, self._writer = reader, writer

    @staticmethod
    async def dial(folder: Path) -> Waiter:
        """Raises `AgentUnavailable`."""
        try:
            connection = await connect(folder, NAME)
        except OSError as error:
            raise AgentUnavailable(f"{folder / NAME} cannot be used: {error.strerror}") from None
        return Waiter(*await asyncio.open_unix_connection(sock=connection, limit=ANSWER))

    async def line(self, seconds: float) -> str:
        """The next line, without its end; empty when there is none within `seconds`."""
        with suppress(TimeoutError, ValueError, OSError):
            async with asyncio.timeout(seconds):
                return (await self._reader.readline()).decode(errors="replace").strip()
        return ""

    async def ask(self, text: str, last: str, seconds: float) -> str:
        """Write `text`; what comes back up to the line `last`. Raises `AgentFailed` when it does not within
        `seconds`."""
        try:
            async with asyncio.timeout(seconds):
                self._writer.write(text.encode())
                answer = await self._reader.readuntil(f"{last}\n".encode())
        except TimeoutError:
            raise AgentFailed(f"the guest was not done within {seconds:.0f} s") from None
        except asyncio.IncompleteReadError as error:
            return error.partial.decode(errors="replace")
        except (asyncio.LimitOverrunError, OSError) as error:
            raise AgentFailed(f"the guest's answer makes no sense: {error}") from None
        return answer.decode(errors="replace")

    def close(self) -> None:
        self._writer.close()
