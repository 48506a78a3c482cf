"""The process in a captured guest that waits to be told who it is now, on a port of its own (plan/waiting.py)."""

from __future__ import annotations

import asyncio
from pathlib import Path

from innkeeper.base.errors import AgentFailed, AgentUnavailable
from innkeeper.base.units import KIB
from innkeeper.qemu.sockets import connect

NAME = "rebirth.sock"
ANSWER = 256 * KIB
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

    async def ask(self, message: bytes, last: str, seconds: float) -> str:
        """Write `message`; what comes back up to the line `last`. Raises `AgentFailed` when it does not within
        `seconds`."""
        try:
            async with asyncio.timeout(seconds):
                self._writer.write(message)
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
