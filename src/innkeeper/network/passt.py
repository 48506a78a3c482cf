"""passt(1): user-mode NAT outside of QEMU, for a card that asks for it.

It gets one end of a socket pair and QEMU the other, so neither has anything to find or to clean up: it ends when QEMU's
end is closed, however that happens and whoever is there to see it.
"""

from __future__ import annotations

import asyncio
import os
import socket
import subprocess
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from innkeeper.base.errors import NetworkFailed, ToolMissing
from innkeeper.host.gather import find_tool
from innkeeper.plan.options import Passt

MARK, MARK_HOME = "INNKEEPER_PASST", "INNKEEPER_HOME"
"""In its environment: the id of its VM; not QEMU's mark (qemu/process.py)."""
PATIENCE = 10.0
"""Seconds that it gets to bind its ports."""
MOST_WORDS = 4096


def need_passt() -> str:
    """The path of the program. Raises `ToolMissing`."""
    if (program := find_tool("passt")) is None:
        raise ToolMissing(
            "passt is not installed", hint="apt install passt; or leave --nic passt out: QEMU has a NAT of its own",
            package="passt",
        )  # fmt: skip
    return str(program)


async def open_passt(wanted: Passt, vm: str, home: Path) -> int:
    """Start one, with its ports bound, as the VM's user, and return the descriptor for QEMU. Raises `ToolMissing`,
    `NetworkFailed` with what it says, and it is gone then."""
    program = need_passt()
    ours, its = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        with its:
            status, words = await asyncio.to_thread(_start, program, wanted, vm, home, its.fileno())
        if status:
            raise NetworkFailed(f"passt did not start: {words or f'it ended with status {status}'}")
        return ours.detach()
    except BaseException:
        ours.close()
        raise


def processes(vm: str, home: Path) -> Iterable[int]:
    """Pids of those of a VM."""
    marks = {f"{MARK}={vm}".encode(), b"%s=%s" % (MARK_HOME.encode(), os.fsencode(home))}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with suppress(OSError):
                if marks <= set((entry / "environ").read_bytes().split(b"\0")):
                    yield int(entry.name)


def _start(program: str, wanted: Passt, vm: str, home: Path, fd: int) -> tuple[int, str]:
    """(status, what it said): it goes into the background by itself once its ports are bound."""
    said = os.memfd_create("passt", os.MFD_CLOEXEC)
    environment = {"PATH": "/usr/bin:/bin", MARK: vm, MARK_HOME: str(home)}
    uid, groups = wanted.uid, None if wanted.uid is None else list[str | int]()
    try:
        ended = subprocess.run(
            [program, "--fd", str(fd), *wanted.words()], pass_fds=[fd], stdin=subprocess.DEVNULL, stdout=said,
            stderr=said, cwd="/", env=environment, start_new_session=True, timeout=PATIENCE, check=False,
            user=uid, group=uid, extra_groups=groups,
        )  # fmt: skip
        words = os.pread(said, MOST_WORDS, 0).decode(errors="replace").splitlines()
        return ended.returncode, "; ".join(word.strip() for word in words if word.strip() and "syslog" not in word)
    except (OSError, subprocess.TimeoutExpired) as error:
        return -1, str(error)
    finally:
        os.close(said)
