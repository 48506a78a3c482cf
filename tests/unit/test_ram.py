"""Captured RAM as forks get it."""

import asyncio
import ctypes
import mmap
import os
import subprocess
import sys

import pytest

from innkeeper.base.errors import NotFound, QemuFailed
from innkeeper.host.usage import used_by
from innkeeper.qemu import ram
from innkeeper.qemu.ram import RamImages, extents

PUNCH_HOLE = 0x02 | 0x01  # FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE


@pytest.fixture
def image(tmp_path):
    """8 MiB, of which two parts hold data."""
    path = tmp_path / "ram"
    with path.open("wb") as file:
        file.write(b"begin" * 1000)
        file.seek(5 << 20)
        file.write(b"later" * 1000)
        file.truncate(8 << 20)
    return path


async def test_the_copy_is_whole_and_as_sparse(image):
    images = RamImages()
    fd = await images.get("one", image)
    assert os.pread(fd, 8 << 20, 0) == image.read_bytes()
    assert sum(end - begin for begin, end in extents(fd, 8 << 20)) < 1 << 20
    assert await images.get("one", image) == fd
    images.close()
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(fd)


async def test_nobody_can_change_it(image):
    images = RamImages()
    ours = await images.get("one", image)
    fd = os.open(f"/proc/self/fd/{ours}", os.O_RDWR)  # as QEMU opens it
    try:
        for change in (lambda: os.pwrite(fd, b"x", 0), lambda: os.ftruncate(fd, 0)):
            with pytest.raises(PermissionError):
                change()
        libc = ctypes.CDLL(None, use_errno=True)
        assert libc.fallocate(fd, PUNCH_HOLE, ctypes.c_long(0), ctypes.c_long(4096)) == -1
        with mmap.mmap(fd, 8 << 20, flags=mmap.MAP_PRIVATE) as private:
            private[:5] = b"other"
            assert os.pread(fd, 5, 0) == b"begin"
    finally:
        os.close(fd)
        images.close()


def test_what_a_process_takes():
    """A child that shares our memory, and then writes to some."""
    shared = mmap.mmap(-1, 32 << 20, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    for at in range(0, 32 << 20, 4096):
        shared[at] = 1
    before = used_by(os.getpid())
    ask, tell = os.pipe(), os.pipe()
    if not (child := os.fork()):
        os.write(ask[1], b"x")
        os.read(tell[0], 1)
        for at in range(0, 16 << 20, 4096):
            shared[at] = 2
        os.write(ask[1], b"x")
        os.read(tell[0], 1)
        os._exit(0)
    try:
        os.read(ask[0], 1)
        first = used_by(child)
        os.write(tell[1], b"x")
        os.read(ask[0], 1)
        second = used_by(child)
        assert before and first and second
        assert first.shared > 12 << 20 and before.private > 30 << 20
        assert second.private - first.private > 15 << 20
    finally:
        os.kill(child, 9)
        os.waitpid(child, 0)
    assert used_by(child) is None


async def test_a_file_that_is_gone(tmp_path):
    images = RamImages()
    for _ in range(2):
        with pytest.raises(NotFound, match="cannot be read"):
            await images.get("gone", tmp_path / "gone")


def test_what_is_looked_for_is_found_everywhere(tmp_path, monkeypatch):
    monkeypatch.setattr(ram, "SEARCHED", 4096)
    file = tmp_path / "ram"
    with file.open("wb") as target:
        target.truncate(1 << 20)
        for at in (0, 4090, 8192, 500_000, (1 << 20) - 16):  # the second across two searches
            target.seek(at)
            target.write(b"0123456789abcdef")
        target.seek(70_000)
        target.write(b"other")
    places = [(0, 0), (4090, 0), (8192, 0), (70_000, 1), (500_000, 0), ((1 << 20) - 16, 0)]
    with file.open("rb") as opened:
        assert ram.find_all(opened.fileno(), [b"0123456789abcdef", b"other"]) == places


def test_memory_of_another_process_is_overwritten_where_it_maps_the_copy(tmp_path):
    file = tmp_path / "ram"
    file.write_bytes(bytes(1 << 20))

    async def copy() -> int:
        return await RamImages().get("x", file)

    fd = asyncio.run(copy())
    program = "import mmap,sys; m = mmap.mmap(int(sys.argv[1]), 0, access=mmap.ACCESS_COPY); print(flush=True); "
    program += "input(); print(m[70000:70004], m[0], flush=True)"
    argv = [sys.executable, "-c", program, str(fd)]
    with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, pass_fds=[fd], text=True) as process:
        assert process.stdin and process.stdout
        process.stdout.readline()
        ram.overwrite(process.pid, [(70_000, b"mine")])
        process.stdin.write("\n")
        process.stdin.flush()
        assert process.stdout.readline() == "b'mine' 0\n"
    assert os.pread(fd, 4, 70_000) == bytes(4)
    with pytest.raises(QemuFailed):
        ram.overwrite(process.pid, [(0, b"gone")])
    os.close(fd)
