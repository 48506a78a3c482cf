"""A child process is started, or leaves nothing behind, whenever its starter is cancelled."""

import asyncio
from asyncio.subprocess import PIPE

import psutil
import pytest

from innkeeper.base.child import start_child


async def test_a_child_is_started():
    process = await start_child("cat", stdin=PIPE, stdout=PIPE)
    assert await process.communicate(b"hello") == (b"hello", None)


async def test_a_program_that_is_not_there():
    with pytest.raises(FileNotFoundError):
        await start_child("/no/such/program")


@pytest.mark.parametrize("turns", range(12))
async def test_cancelled_at_any_turn_of_the_loop(turns):
    before = set(psutil.Process().children())
    task = asyncio.create_task(start_child("sleep", "60", stdin=PIPE, stdout=PIPE, stderr=PIPE))
    for _ in range(turns):
        await asyncio.sleep(0)
    if task.done():  # it was quicker
        task.result().kill()
        await task.result().wait()
    elif task.cancel():
        with pytest.raises(asyncio.CancelledError):
            async with asyncio.timeout(20):
                await task
    assert set(psutil.Process().children()) <= before
