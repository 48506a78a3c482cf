"""The serial log: a real file, with a writer that appends while it is bounded and read."""

from __future__ import annotations

import asyncio
import ctypes
import sys
from pathlib import Path

import pytest

from innkeeper.machine import serial_log
from innkeeper.machine.serial_log import BLOCK, bound, read


@pytest.fixture
def log(tmp_path):
    return tmp_path / "serial.log"


async def all_of(path, tail=None) -> bytes:
    return b"".join([block async for block in read(path, tail=tail, follow=False)])


def lines(first: int, last: int) -> bytes:
    return b"".join(b"line %08d of what a guest says\r\n" % number for number in range(first, last))


def stored(path) -> int:
    return path.stat().st_blocks * 512


async def test_no_file_is_an_empty_log(log):
    assert await all_of(log) == await all_of(log, tail=3) == b""
    log.touch()
    assert await all_of(log) == await all_of(log, tail=3) == b""


async def test_whole_and_tail(log):
    log.write_bytes(lines(0, 100))
    assert await all_of(log) == lines(0, 100)
    assert await all_of(log, tail=10) == lines(90, 100)
    assert await all_of(log, tail=1) == lines(99, 100)
    assert await all_of(log, tail=100) == await all_of(log, tail=10**9) == lines(0, 100)
    assert await all_of(log, tail=0) == b""


async def test_an_unfinished_line_is_a_line(log):
    log.write_bytes(b"one\ntwo\nlogin: ")
    assert await all_of(log, tail=1) == b"login: "
    assert await all_of(log, tail=2) == b"two\nlogin: "
    log.write_bytes(b"\n")
    assert await all_of(log, tail=1) == b"\n"
    log.write_bytes(b"\n\n\nx\n\n")
    assert await all_of(log, tail=2) == b"x\n\n"


async def test_a_spinner_is_one_line(log):
    log.write_bytes(b"begin\n" + b"".join(b"\r%d %%" % n for n in range(1000)) + b"\nend\n")
    assert await all_of(log, tail=2) == (await all_of(log))[len("begin\n") :]


async def test_tail_looks_back_as_far_as_it_must(log):
    long = b"x" * (3 * BLOCK) + b"\n"
    log.write_bytes(lines(0, 50) + long + lines(50, 60))
    assert await all_of(log, tail=11) == long + lines(50, 60)
    assert await all_of(log, tail=12) == lines(49, 50) + long + lines(50, 60)
    for size in range(BLOCK - 3, BLOCK + 4):  # a newline on, before and after a block's edge
        log.write_bytes(b"a\n" + b"b" * size + b"\nc\n")
        assert await all_of(log, tail=2) == b"b" * size + b"\nc\n"
        assert await all_of(log, tail=3) == log.read_bytes()


async def test_bounded_and_the_end_is_intact(log):
    kept = 4 * BLOCK
    log.write_bytes(lines(0, 50_000))
    whole = log.stat().st_size
    bound(log, kept)
    assert log.stat().st_size == whole, "every reader's offset stays right"
    assert kept <= stored(log) <= kept + 2 * BLOCK
    rest = await all_of(log)
    assert lines(0, 50_000).endswith(rest) and kept <= len(rest) <= kept + BLOCK and b"\0" not in rest
    assert await all_of(log, tail=5) == lines(49_995, 50_000)
    assert await all_of(log, tail=10**6) == rest
    bound(log, kept)
    assert await all_of(log) == rest, "nothing to do"
    with log.open("ab") as file:
        file.write(lines(50_000, 50_001))
    assert await all_of(log, tail=1) == lines(50_000, 50_001)


async def test_a_short_log_is_left_alone(log):
    log.write_bytes(b"x" * BLOCK)
    bound(log, BLOCK)
    assert await all_of(log) == b"x" * BLOCK
    with pytest.raises(FileNotFoundError):
        bound(log.with_name("none"))


async def test_blocks_beyond_the_end_do_not_cost_the_log(log):
    """XFS allocates more than a growing file needs; so does `fallocate` with KEEP_SIZE."""
    log.write_bytes(b"what matters\n")
    with log.open("r+b") as file:
        size = ctypes.c_longlong(64 * BLOCK)
        assert serial_log._libc.fallocate(file.fileno(), serial_log._KEEP_SIZE, ctypes.c_longlong(0), size) == 0
    assert stored(log) > 8 * BLOCK
    bound(log, BLOCK)
    assert await all_of(log) == b"what matters\n"


async def test_a_link_is_not_followed(log, tmp_path):
    """The folder is the VM's user's: a link there must not make the daemon cut another file."""
    victim = tmp_path / "victim"
    victim.write_bytes(b"x" * 32 * BLOCK)
    log.symlink_to(victim)
    with pytest.raises(OSError):
        bound(log, BLOCK)
    assert stored(victim) >= 32 * BLOCK


async def test_following(log, monkeypatch):
    monkeypatch.setattr(serial_log, "POLL", 0.002)
    got = b""

    async def follow():
        nonlocal got
        async for block in read(log, tail=1, follow=True):
            got += block

    task = asyncio.create_task(follow())
    try:
        await asyncio.sleep(0.01)
        for number in range(20):  # the file appears only now
            with log.open("ab") as file:
                file.write(lines(number, number + 1))
            await asyncio.sleep(0.003)
        await _until(lambda: got == lines(0, 20))
        log.write_bytes(b"anew\n")  # a file system without holes: cut
        await _until(lambda: got == lines(0, 20) + b"anew\n")
    finally:
        task.cancel()


async def test_a_follower_that_is_overtaken_gets_no_zeros(log):
    log.write_bytes(lines(0, 30_000))
    reader = read(log, tail=None, follow=True)
    first = await anext(reader)
    bound(log, 4 * BLOCK)
    got = b""
    while not got.endswith(lines(29_999, 30_000)):
        got += await anext(reader)
    await reader.aclose()
    assert lines(0, 30_000).startswith(first) and lines(0, 30_000).endswith(got) and b"\0" not in got
    assert len(got) <= 5 * BLOCK


WRITER = """
import os, sys
fd = os.open(sys.argv[1], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
for number in range(int(sys.argv[2])):
    os.write(fd, b"line %08d of what a guest says\\r\\n" % number)
"""


async def test_a_writer_appends_while_it_is_bounded_and_followed(log, monkeypatch):
    """As QEMU does: another process, O_APPEND. Not a byte of what is left is wrong, not a line of the end is lost."""
    monkeypatch.setattr(serial_log, "POLL", 0.001)
    count, kept = 60_000, 4 * BLOCK
    writer = await asyncio.create_subprocess_exec(sys.executable, "-c", WRITER, log, str(count))
    got, most, punched = b"", 0, False

    async def follow():
        nonlocal got
        async for block in read(log, tail=None, follow=True):
            got += block

    task = asyncio.create_task(follow())
    try:
        while writer.returncode is None:
            await asyncio.sleep(0.002)
            if log.exists():
                bound(log, kept)
                most = max(most, stored(log))
                punched |= stored(log) < log.stat().st_size - BLOCK
        bound(log, kept)
        await _until(lambda: got.endswith(lines(count - 1, count)))
    finally:
        task.cancel()
    assert punched and log.stat().st_size == len(lines(0, count))
    assert lines(0, count).endswith(await all_of(log))
    assert b"\0" not in got
    numbers = [int(line[5:13]) for line in got.split(b"\r\n") if len(line) == len(lines(0, 1)) - 2]
    assert numbers == sorted(set(numbers)) and numbers[-1] == count - 1


async def _until(condition) -> None:
    async with asyncio.timeout(30):
        while not condition():  # noqa: ASYNC110 - a file has no event
            await asyncio.sleep(0.002)


def test_no_descriptor_is_left_open(log):
    log.write_bytes(lines(0, 5_000))

    async def some():
        before = len(list(Path("/proc/self/fd").iterdir()))
        for tail in (None, 1, 10**6):
            reader = read(log, tail=tail, follow=True)
            await anext(reader)
            await reader.aclose()
        bound(log, BLOCK)
        return before, len(list(Path("/proc/self/fd").iterdir()))

    before, after = asyncio.run(some())
    assert before == after
