"""Long work on memory in a process of its own."""

import asyncio
import errno
import os
from pathlib import Path

import pytest

from innkeeper.qemu import aside, ram


@pytest.fixture
def memory(tmp_path):
    with (tmp_path / "memory").open("w+b") as file:
        file.truncate(64 << 20)
        for at in (5, 40 << 20):
            os.pwrite(file.fileno(), b"pattern", at)
        yield file.fileno()


def test_it_finds_what_ram_would(memory):
    patterns = [b"nothing", b"pattern"]
    found = asyncio.run(aside.find(memory, patterns))
    assert found == ram.find_all(memory, patterns) == [(5, 1), (40 << 20, 1)]


def test_it_writes_a_part_and_tells_what_goes_wrong(memory, tmp_path):
    with (tmp_path / "copy").open("w+b") as target:
        asyncio.run(aside.write(memory, 8 << 20, target.fileno()))
        found = os.fstat(target.fileno())
        assert found.st_size == 8 << 20 and found.st_blocks * 512 < 1 << 20
        assert os.pread(target.fileno(), 7, 5) == b"pattern"
    with (tmp_path / "copy").open("rb") as target, pytest.raises(OSError) as caught:
        asyncio.run(aside.write(memory, 16 << 20, target.fileno()))
    assert caught.value.errno in (errno.EBADF, errno.EINVAL)


def test_cancelled_it_leaves_no_process(memory):
    async def scenario() -> None:
        finding = asyncio.ensure_future(aside.find(memory, [b"x"] * 2000))
        await asyncio.sleep(0.5)
        assert not finding.done()
        finding.cancel()
        with pytest.raises(asyncio.CancelledError):
            await finding

    def children() -> list[str]:
        return [
            child for task in Path("/proc/self/task").iterdir() for child in (task / "children").read_text().split()
        ]

    before = children()
    asyncio.run(scenario())
    assert children() == before
