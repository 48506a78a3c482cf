"""What QEMU is sent over QMP, and when."""

from __future__ import annotations

import asyncio
import json
import os
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest

from innkeeper.base.errors import QmpFailed
from innkeeper.qemu.monitor import Monitor

GREETING = {"QMP": {"version": {"qemu": {"micro": 0, "minor": 2, "major": 7}, "package": ""}, "capabilities": []}}


class Qmp:
    """QEMU's end of a connection. Descriptors are dropped: the words matter."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection

    async def say(self, what: dict[str, Any]) -> None:
        await asyncio.get_running_loop().sock_sendall(self._connection, json.dumps(what).encode() + b"\n")

    async def hear(self, seconds: float = 5.0) -> dict[str, Any]:
        async with asyncio.timeout(seconds):
            heard = b""
            while not heard.strip():  # a descriptor comes with a space
                heard = await asyncio.get_running_loop().sock_recv(self._connection, 4096)
            return json.loads(heard)

    async def hears_nothing(self) -> bool:
        try:
            return not await self.hear(0.1)
        except TimeoutError:
            return True

    async def answer(self, to: dict[str, Any], what: object) -> None:
        await self.say({"return": what} | {key: to[key] for key in ("id",) if key in to})


@asynccontextmanager
async def connected() -> AsyncIterator[tuple[Monitor, Qmp]]:
    ours, theirs = socket.socketpair()
    ours.setblocking(False)
    theirs.setblocking(False)
    qmp = Qmp(theirs)
    connecting = asyncio.create_task(Monitor.over(ours))
    await qmp.say(GREETING)
    await qmp.answer(await qmp.hear(), {})
    monitor = await connecting
    try:
        yield monitor, qmp
    finally:
        theirs.close()
        await monitor.close()


async def test_nothing_is_sent_while_qemu_takes_a_descriptor():
    async with connected() as (monitor, qmp):
        fd = os.memfd_create("x")
        giving = asyncio.create_task(monitor.give("x", fd))
        adding = asyncio.create_task(monitor.add(fd))
        asking = asyncio.create_task(monitor.execute("query-status"))
        given = await qmp.hear()
        assert given["execute"] == "getfd"
        assert await qmp.hears_nothing()
        await qmp.answer(given, {})
        await giving
        added = await qmp.hear()
        assert added["execute"] == "add-fd"
        assert await qmp.hears_nothing()
        await qmp.answer(added, {"fdset-id": 3, "fd": 4})
        asked = await qmp.hear()
        assert asked["execute"] == "query-status"
        await qmp.answer(asked, {"status": "running"})
        assert (await adding, await asking) == (3, {"status": "running"})
        os.close(fd)


async def test_a_descriptor_that_is_refused_lets_others_speak():
    async with connected() as (monitor, qmp):
        fd = os.memfd_create("x")
        giving = asyncio.create_task(monitor.give("x", fd))
        given = await qmp.hear()
        await qmp.say({"error": {"class": "GenericError", "desc": "no"}, "id": given["id"]})
        with pytest.raises(QmpFailed, match="getfd"):
            await giving
        asking = asyncio.create_task(monitor.execute("query-status"))
        await qmp.answer(await qmp.hear(), {})
        await asking
        os.close(fd)
