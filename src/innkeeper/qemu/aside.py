"""Long work on a guest's memory, in a process of its own that goes last, as no thread of the daemon could
(base/priority.py).

    python -m innkeeper.qemu.aside find FILE PATTERN…
    python -m innkeeper.qemu.aside write FROM SIZE TO

FILE, FROM and TO are descriptors, a PATTERN is in hexadecimal. What is found is told as lines of offset and number of
the pattern; what goes wrong as a line with `errno`.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import os
import signal
import sys
from collections.abc import Sequence

from innkeeper.base.child import start_child
from innkeeper.base.errors import QemuFailed
from innkeeper.base.priority import step_back
from innkeeper.qemu.ram import copy_sparse, find_all

_PR_SET_PDEATHSIG = 1


async def find(file: int, patterns: Sequence[bytes]) -> list[tuple[int, int]]:
    """As `ram.find_all`. Raises `OSError`."""
    lines = await _run([file], "find", str(file), *(pattern.hex() for pattern in patterns))
    return [(int(at), int(index)) for at, index in map(str.split, lines)]


async def write(source: int, size: int, target: int) -> None:
    """As `ram.copy_sparse`, and it is on the host's disk then. Raises `OSError`."""
    await _run([source, target], "write", str(source), str(size), str(target))


async def _run(files: Sequence[int], *words: str) -> list[str]:
    command = [sys.executable, "-I", "-m", "innkeeper.qemu.aside", *words]
    pipe = asyncio.subprocess.PIPE
    process = await start_child(*command, pass_fds=files, stdout=pipe, start_new_session=True, cwd="/")
    try:
        said, _ = await process.communicate()
    except BaseException:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await process.wait()
        raise
    lines = said.decode().splitlines()
    if process.returncode == 1 and lines and lines[-1].isdigit():
        raise OSError(int(lines[-1]), os.strerror(int(lines[-1])))
    if process.returncode:
        raise QemuFailed(f"what works on the guest's memory ended with {process.returncode}")
    return lines


def main(what: str, file: str, *words: str) -> None:
    """Raises `OSError`."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)  # nobody wants it any more then
    step_back()
    if what == "find":
        for at, index in find_all(int(file), [bytes.fromhex(pattern) for pattern in words]):
            print(at, index)
    else:
        size, target = map(int, words)
        copy_sparse(int(file), target, size)
        os.fsync(target)


if __name__ == "__main__":
    try:
        main(*sys.argv[1:])
    except OSError as error:
        print(error.errno)
        sys.exit(1)
