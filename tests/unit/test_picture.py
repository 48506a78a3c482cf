"""A picture of a process's memory: of one moment, while the process goes on, and nothing is left of it."""

import asyncio
import os
import re
import select
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import pytest

from innkeeper.base.errors import QemuFailed
from innkeeper.base.home import Home
from innkeeper.qemu.guest_memory import HUGE, PAGE, Copy, Region
from innkeeper.qemu.picture import Picture
from innkeeper.qemu.process import MARK_HOME, MARK_VM, find

pytestmark = pytest.mark.skipif(os.geteuid() != 0 or os.uname().machine != "x86_64", reason="needs root on x86-64")

SIZE = 4 * HUGE
FAR = 3 * HUGE
PROGRAM = f"""
import ctypes, mmap, struct, sys
memory = mmap.mmap(-1, {SIZE + HUGE}, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
at = ctypes.addressof(ctypes.c_char.from_buffer(memory))
skip = -at % {HUGE}
memory.madvise(mmap.MADV_DONTFORK)
for page in range({SIZE // PAGE}):
    memory[skip + page * {PAGE}] = 7
print(at + skip, flush=True)
wanted, count = struct.pack("ihh", sys.stdin.fileno(), 1, 0), 0
wanted = ctypes.create_string_buffer(wanted, len(wanted))
while not struct.unpack("ihh", wanted)[2]:
    ctypes.CDLL(None).poll(wanted, 1, 1)
    count += 1
    memory[skip + 8:skip + 16] = memory[skip + {FAR} + 8:skip + {FAR} + 16] = count.to_bytes(8, "little")
    if count % 50 == 0:
        print(count, flush=True)
"""
"""It counts in two places, and never leaves them different while it waits. What poll returns counts for nothing, as in
QEMU (GLib), which looks at what is said of each descriptor: a tracer that is killed may leave any number there."""
CONFINED = """
import ctypes, struct
libc = ctypes.CDLL(None, use_errno=True)
code = [(0x20, 0, 0, 0), (0x15, 2, 0, 56), (0x15, 1, 0, 436), (6, 0, 0, 0x7fff0000), (6, 0, 0, 0x00050001)]
filters = b"".join(struct.pack("HBBI", *each) for each in code)
kept = ctypes.create_string_buffer(filters)
program = struct.pack("HxxxxxxQ", len(code), ctypes.addressof(kept))
assert libc.prctl(38, 1, 0, 0, 0) == 0
assert libc.prctl(22, 2, ctypes.c_char_p(program), 0, 0) == 0
"""
"""Nobody makes clone and close_range (seccomp(2): they fail with EPERM)."""


@contextmanager
def counting(before: str = "", after: str = "", **options):
    words = [sys.executable, "-c", before + PROGRAM + after]
    process = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, **options)
    try:
        yield process, int(process.stdout.readline())
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


def last_words(process: subprocess.Popen) -> str:
    process.stdin.close()
    return process.stdout.read()


def goes_on(process: subprocess.Popen) -> None:
    """It counts, traced by nobody."""
    deadline, seen = time.monotonic() + 10, 0
    while seen < 5 and time.monotonic() < deadline:
        if select.select([process.stdout], [], [], 0.1)[0]:
            os.read(process.stdout.fileno(), 4096)
            seen += 1
    assert seen == 5 and process.poll() is None
    assert re.search(r"^TracerPid:\t0$", Path(f"/proc/{process.pid}/status").read_text(), re.MULTILINE)


def children() -> set[str]:
    return {child for task in Path("/proc/self/task").iterdir() for child in (task / "children").read_text().split()}


def count(pid: int, at: int) -> tuple[int, int]:
    with Path(f"/proc/{pid}/mem").open("rb", buffering=0) as memory:
        return tuple(int.from_bytes(os.pread(memory.fileno(), 8, at + far + 8), "little") for far in (0, FAR))


def test_it_is_of_one_moment_and_the_process_goes_on():
    async def scenario(process, at) -> None:
        picture = await Picture.ready(process.pid, [(at, SIZE)])
        await picture.take()
        one, other = count(picture.pid, at)
        assert one == other > 0
        goes_on(process)
        assert count(picture.pid, at) == (one, one) and min(count(process.pid, at)) > one
        status = Path(f"/proc/{picture.pid}/status").read_text()
        assert f"PPid:\t{os.getpid()}\n" in status and "Threads:\t1\n" in status
        deadline = time.monotonic() + 10
        while list(Path(f"/proc/{picture.pid}/fd").iterdir()):  # once it has time
            assert time.monotonic() < deadline
        assert not Path(f"/proc/{picture.pid}/cmdline").read_bytes()
        child = picture.pid
        await picture.close()
        assert not Path(f"/proc/{child}").exists()

    with counting() as (process, at):
        before = children()
        for _ in range(3):
            asyncio.run(scenario(process, at))
        assert children() == before
        goes_on(process)


def test_a_copy_is_made_of_it(tmp_path):
    async def scenario(process, at) -> None:
        copy = Copy(process.pid, [Region(at, SIZE)])
        told = []
        await copy.prepare(told.append)
        await copy.fix()
        assert not told  # nothing has been copied
        then = count(process.pid, at)
        goes_on(process)
        await copy.finish(told.append)
        one, other = (int.from_bytes(os.pread(copy.fd, 8, far + 8), "little") for far in (0, FAR))
        assert 0 < one == other <= max(then) and told[-1] == 1
        assert os.pread(copy.fd, 1, 2 * HUGE) == b"\7"
        await copy.close()

    with counting() as (process, at):
        before = children()
        for _ in range(2):
            asyncio.run(scenario(process, at))
        assert children() == before


def test_it_is_not_taken_for_a_qemu(tmp_path):
    """It has the environment of one."""
    home = Home(tmp_path, tmp_path / "run", tmp_path)
    marks = {MARK_VM: "a", MARK_HOME: str(tmp_path)}

    async def scenario(process, at) -> None:
        picture = await Picture.ready(process.pid, [(at, SIZE)])
        await picture.take()
        assert [pid.number for pid in find(home)] == [process.pid]
        await picture.close()

    with counting(env=os.environ | marks) as (process, at):
        asyncio.run(scenario(process, at))


def test_a_filter_of_system_calls_is_lifted_for_it_and_holds_again():
    async def scenario(process, at) -> None:
        picture = await Picture.ready(process.pid, [(at, SIZE)])
        await picture.take()
        one, other = count(picture.pid, at)
        assert one == other
        await picture.close()
        goes_on(process)

    with counting(CONFINED, "import os\nos.fork()\n", stderr=subprocess.STDOUT) as (process, at):
        asyncio.run(scenario(process, at))
        assert "PermissionError" in last_words(process)


def test_what_waits_for_nothing_has_no_picture():
    process = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        time.sleep(0.2)
        with pytest.raises(QemuFailed, match="does not come to wait"):
            asyncio.run(Picture.ready(process.pid, [(PAGE, PAGE)]))
        assert process.poll() is None
    finally:
        process.kill()
        process.wait()
    with pytest.raises(QemuFailed, match="No such process"):
        asyncio.run(Picture.ready(process.pid, [(PAGE, PAGE)]))


def test_memory_that_is_not_there_is_an_error_and_the_process_goes_on():
    async def scenario(process) -> None:
        picture = await Picture.ready(process.pid, [(PAGE, PAGE)])
        with pytest.raises(QemuFailed, match="Cannot allocate memory"):
            await picture.take()
        await picture.close()

    with counting() as (process, _):
        before = children()
        asyncio.run(scenario(process))
        goes_on(process)
        assert children() == before


def test_a_signal_that_comes_meanwhile_is_not_lost():
    before = "import signal\nsignal.signal(signal.SIGUSR1, lambda *_: print('signal', flush=True))\n"
    with counting(before) as (process, at):

        async def scenario() -> None:
            for _ in range(5):
                picture = await Picture.ready(process.pid, [(at, SIZE)])
                taking = asyncio.ensure_future(picture.take())
                while not taking.done():
                    process.send_signal(signal.SIGUSR1)
                    await asyncio.sleep(0.0001)
                await taking
                await picture.close()

        asyncio.run(scenario())
        assert "signal" in last_words(process) and process.wait() == 0


@pytest.mark.parametrize("after", [0.0, 0.0003, 0.0006, 0.001, 0.0015, 0.002, 0.004, 0.02, 0.2])
def test_a_tracer_that_is_killed_leaves_the_process_and_no_child(after):
    async def scenario(process, at) -> None:
        picture = await Picture.ready(process.pid, [(at, SIZE)])
        taking = asyncio.ensure_future(picture.take())
        await asyncio.sleep(after)
        picture._tracer.kill()
        try:
            await taking
        except QemuFailed as error:
            assert "tracer" in error.detail
        await picture.close()

    with counting() as (process, at):
        before = children()
        asyncio.run(scenario(process, at))
        goes_on(process)
        deadline = time.monotonic() + 10
        while any(Path(f"/proc/{child}/statm").read_text() != "0 0 0 0 0 0 0\n" for child in children() - before):
            assert time.monotonic() < deadline, "it runs"


def test_whoever_wants_it_may_be_killed():
    """Its end is that of the picture."""
    program = f"""
import asyncio, sys
from innkeeper.qemu.picture import Picture
async def scenario():
    picture = await Picture.ready(int(sys.argv[1]), [(int(sys.argv[2]), {SIZE})])
    await picture.take()
    print(picture._tracer.pid, picture.pid, flush=True)
    await asyncio.sleep(60)
asyncio.run(scenario())
"""
    with counting() as (process, at):
        words = [sys.executable, "-c", program, str(process.pid), str(at)]
        asking = subprocess.Popen(words, stdout=subprocess.PIPE, text=True)
        tracer, child = map(int, asking.stdout.readline().split())
        asking.kill()
        asking.communicate()
        deadline = time.monotonic() + 10
        while Path(f"/proc/{tracer}/fd").exists() and time.monotonic() < deadline:
            time.sleep(0.01)
        assert os.waitpid(child, 0)[0] == child  # of this process, as the other is
        goes_on(process)
