"""Captured RAM as forks get it."""

import ctypes
import mmap
import os
import shutil
import subprocess
from dataclasses import replace

import pytest

from innkeeper.base.errors import NotFound
from innkeeper.host.usage import used_by
from innkeeper.plan.rebirth import PREPARE, Rebirth, script
from innkeeper.plan.seed import HostKey
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


@pytest.mark.parametrize("shell", ["dash", "bash", "busybox"])
def test_the_script_is_a_shell_s(shell):
    if not shutil.which(shell):
        pytest.skip(f"{shell} is not installed")
    macs = [("52:54:00:00:00:01", "52:54:00:00:00:02")]
    who = Rebirth("web", "0" * 32, HostKey("PRIVATE'\nKEY\n", "ssh-ed25519 AAAA it's\n"), macs, bytes(range(256)), 1.5)
    command = [shell, "sh", "-n"] if shell == "busybox" else [shell, "-n"]
    for text in (script(who), script(replace(who, nics=[])), PREPARE):
        done = subprocess.run(command, input=text.encode(), capture_output=True)
        assert (done.returncode, done.stderr) == (0, b"")
