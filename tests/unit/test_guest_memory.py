"""The memory of another process, copied out and put in: what it uses, of the moment, and nothing else."""

import asyncio
import os
import subprocess
import sys
from pathlib import Path

import pytest

from innkeeper.base.errors import QemuFailed
from innkeeper.qemu.guest_memory import PAGE, Copy, Region, in_use, put

UNIT = 2 << 20
SIZE = 8 * UNIT
PROGRAM = f"""
import ctypes, mmap, os, sys
file = os.memfd_create("below")
os.ftruncate(file, {SIZE})
os.pwrite(file, b"below", {5 * UNIT})
memory = mmap.mmap(file, {SIZE}, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ | mmap.PROT_WRITE)
print(ctypes.addressof(ctypes.c_char.from_buffer(memory)), flush=True)
for line in sys.stdin:
    exec(line)
    print("done", flush=True)
"""


class Theirs:
    """A process that maps a file privately, as a fork's QEMU does."""

    def __init__(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", PROGRAM], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        assert self.process.stdout
        self.region = Region(int(self.process.stdout.readline()), SIZE)

    def do(self, line: str) -> None:
        assert self.process.stdin and self.process.stdout
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()
        assert self.process.stdout.readline() == "done\n"


@pytest.fixture
def theirs():
    made = Theirs()
    yield made
    made.process.kill()
    made.process.communicate()


def nothing(fraction):
    pass


async def whole(copy: Copy) -> None:
    await copy.prepare(nothing)
    await copy.fix()
    await copy.finish(nothing)


def units(fd: int) -> dict[int, bytes]:
    """The beginnings of the units that a file holds."""
    found = {number: os.pread(fd, 6, number * UNIT).rstrip(b"\0") for number in range(SIZE // UNIT)}
    return {number: text for number, text in found.items() if text}


def test_what_it_uses_is_copied_as_it_is_at_last(theirs):
    """Twice, since a process that reads its input does not wait in poll."""
    pid = theirs.process.pid
    pages = in_use(pid, theirs.region)
    assert (pages.count(b"\1"), pages.find(b"\1")) == (1, 5 * UNIT // PAGE)  # of the file; it never touched that
    theirs.do(f"memory[{UNIT}:{UNIT + 5}] = b'first'; memory[{3 * UNIT}:{3 * UNIT + 4}] = b'gone'")
    copy = Copy(pid, [theirs.region])

    async def scenario() -> None:
        await copy.prepare(nothing)
        assert units(copy.fd) == {1: b"first", 3: b"gone", 5: b"below"}
        theirs.do(f"memory[{UNIT}:{UNIT + 6}] = b'second'; memory.madvise(mmap.MADV_DONTNEED, {3 * UNIT}, {UNIT})")
        theirs.do(f"memory[{5 * UNIT}:{5 * UNIT + 5}] = b'above'")
        await copy.fix()
        assert units(copy.fd) == {1: b"second", 5: b"above"}
        theirs.do(f"memory[{UNIT}:{UNIT + 6}] = b'third '")
        await copy.finish(nothing)
        assert units(copy.fd) == {1: b"second", 5: b"above"}
        copy.append(b"devices")
        sealed = copy.seal()
        await copy.close()
        with pytest.raises(PermissionError):
            os.pwrite(sealed, b"x", 0)
        assert os.pread(sealed, 7, SIZE) == b"devices"
        os.close(sealed)

    asyncio.run(scenario())


def test_it_is_written_to_a_file_and_put_into_another_process(theirs, tmp_path: Path):
    theirs.do(f"memory[{UNIT}:{UNIT + 5}] = b'first'")
    copy = Copy(theirs.process.pid, [theirs.region])
    asyncio.run(whole(copy))
    with (tmp_path / "memory").open("w+b") as file:
        asyncio.run(copy.write(file.fileno()))
        assert units(file.fileno()) == {1: b"first", 5: b"below"} and os.fstat(file.fileno()).st_size == SIZE
        other = Theirs()
        try:
            # From the fourth unit on: what lies before is another region's.
            asyncio.run(put(other.process.pid, Region(other.region.address, SIZE - 4 * UNIT), file.fileno(), 4 * UNIT))
            other.do(f"assert memory[{UNIT}:{UNIT + 5}] == b'below' and not any(memory[:{UNIT}])")
        finally:
            other.process.kill()
            other.process.communicate()
    asyncio.run(copy.close())


def test_a_process_that_is_gone_is_an_error_that_says_so(theirs):
    copy = Copy(theirs.process.pid, [theirs.region])
    theirs.process.kill()
    theirs.process.communicate()
    with pytest.raises(QemuFailed, match=str(theirs.process.pid)):
        asyncio.run(whole(copy))
    asyncio.run(copy.close())


def test_memory_that_is_not_there_is_an_error(theirs, tmp_path: Path):
    with (tmp_path / "memory").open("w+b") as file:
        file.write(b"x" * UNIT)
        file.flush()
        with pytest.raises(QemuFailed, match="Bad address"):
            asyncio.run(put(theirs.process.pid, Region(PAGE, UNIT), file.fileno(), 0))
