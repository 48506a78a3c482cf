"""QMP: one connection to one QEMU."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from qemu.qmp import EventListener, ExecuteError, QMPClient, QMPError
from qemu.qmp.protocol import Runstate

from innkeeper.base.errors import QemuGone, QmpFailed
from innkeeper.qemu.sockets import connect

CONNECT_POLL = 0.002
"""Seconds between two looks for the socket of a QEMU that is just starting (it takes about 40 ms to appear)."""
ALLOWED = 30.0
"""Seconds for an answer."""


class Monitor:
    """A negotiated QMP connection. Events arrive through `events`, which ends when the connection does."""

    def __init__(self, client: QMPClient, listener: EventListener) -> None:
        self._client = client
        self._listener = listener
        self._may_send = asyncio.Event()
        self._may_send.set()

    @staticmethod
    async def connect(folder: Path, seconds: float = 10.0) -> Monitor:
        """Connect to `folder`/qmp.sock, waiting for it to appear. Raises `QmpFailed` after `seconds`."""
        try:
            async with asyncio.timeout(seconds):
                while True:
                    try:
                        return await Monitor.over(await connect(folder, "qmp.sock"), folder.name)
                    except (FileNotFoundError, ConnectionRefusedError):
                        await asyncio.sleep(CONNECT_POLL)
        except TimeoutError:
            raise QmpFailed(f"QEMU did not answer on its QMP socket within {seconds:.0f} s") from None
        except OSError as error:
            raise QmpFailed(f"QEMU's QMP socket cannot be used: {error.strerror}") from None

    @staticmethod
    async def over(connection: socket.socket, name: str = "errand") -> Monitor:
        """The same over a socket that is connected already. Raises `QmpFailed`."""
        # The listener is registered before connecting, so that no event is missed.
        client, listener = QMPClient(name), EventListener()
        client.register_listener(listener)
        try:
            async with asyncio.timeout(10.0):
                await client.connect(connection)
        except BaseException as error:
            connection.close()
            if isinstance(error, QMPError | TimeoutError):
                raise QmpFailed(f"QMP negotiation failed: {error}") from None
            raise
        return Monitor(client, listener)

    @property
    def connected(self) -> bool:
        return self._client.runstate == Runstate.RUNNING

    async def execute(self, command: str, arguments: dict[str, Any] | None = None, seconds: float = ALLOWED) -> Any:
        """The command's return value. Raises `QmpFailed` when QEMU refuses or takes too long, `QemuGone` when it is."""
        await self._turn()
        return await self._ask(command, arguments, seconds)

    async def _ask(self, command: str, arguments: dict[str, Any] | None, seconds: float) -> Any:
        try:
            async with asyncio.timeout(seconds):
                return await self._client.execute(command, arguments)
        except ExecuteError as error:
            raise QmpFailed(f"QEMU refused {command}: {error}", command=command) from None
        except TimeoutError:
            raise QmpFailed(f"QEMU did not answer {command} within {seconds:.0f} s", command=command) from None
        except (QMPError, EOFError, OSError) as error:
            raise QemuGone(f"QEMU is gone: {command} was not answered ({error})", command=command) from None

    async def give(self, name: str, fd: int) -> None:
        """Let QEMU have a copy of `fd` under a name, for the one command that uses it (`getfd`)."""
        await self._hand_over(fd, "getfd", {"fdname": name})

    async def add(self, fd: int) -> int:
        """Let QEMU have a copy of `fd` as the file /dev/fdset/N, and give N; `remove-fd` takes it away."""
        return int((await self._hand_over(fd, "add-fd"))["fdset-id"])

    async def _hand_over(self, fd: int, command: str, arguments: dict[str, Any] | None = None) -> Any:
        """Nothing else is sent until QEMU has it. Its main thread takes the descriptor from the socket's list while
        another thread reads what comes next, and walks that list without a lock: a segfault now and then (7.2,
        chardev/char-socket.c: tcp_get_msgfds, tcp_chr_recv)."""
        await self._turn()
        self._may_send.clear()
        try:
            self._client.send_fd_scm(fd)
            return await self._ask(command, arguments, ALLOWED)
        except (QMPError, OSError) as error:
            raise QmpFailed(f"QEMU did not take a descriptor: {error}") from None
        finally:
            self._may_send.set()

    async def _turn(self) -> None:
        while not self._may_send.is_set():
            await self._may_send.wait()

    async def events(self) -> AsyncIterator[dict[str, Any]]:
        """Events as QEMU sends them, until the connection ends."""
        gone = asyncio.ensure_future(self._gone())
        try:
            while True:
                arrival = asyncio.ensure_future(self._listener.get())
                done, _ = await asyncio.wait({arrival, gone}, return_when=asyncio.FIRST_COMPLETED)
                if arrival in done:
                    yield dict(arrival.result())
                    continue
                arrival.cancel()
                while not self._listener.empty():
                    yield dict(await self._listener.get())
                return
        finally:
            gone.cancel()

    async def _gone(self) -> None:
        while self._client.runstate == Runstate.RUNNING:
            await self._client.runstate_changed()

    async def close(self) -> None:
        """End the connection; QEMU goes on."""
        # The library raises what ended the connection, an EOFError when QEMU closed it first.
        with suppress(Exception):
            await self._client.disconnect()
