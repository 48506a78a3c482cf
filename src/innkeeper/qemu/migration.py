"""Device state into a file and out of it, while RAM stays where it is (QEMU: migration capability x-ignore-shared)."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path
from time import monotonic

from innkeeper.base.errors import QmpFailed
from innkeeper.qemu.monitor import Monitor

POLL = 0.002
"""Seconds between two looks at how far it is; all of it takes a few dozen milliseconds."""
ALLOWED = 60.0
"""Seconds after which it has failed."""


async def save(monitor: Monitor, path: Path) -> None:
    """Write the state of all devices of a stopped guest to a new file. The guest cannot go on in this QEMU."""
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    try:
        await _ignore_ram(monitor)
        await monitor.give("state", fd)
    finally:
        os.close(fd)
    await monitor.execute("migrate", {"uri": "fd:state"})
    await _completed(monitor)


async def load(monitor: Monitor, state: bytes) -> None:
    """Put the state of all devices into a QEMU that waits for it, with the RAM it belongs to."""
    fd = os.memfd_create("innkeeper-devices", os.MFD_CLOEXEC)
    try:
        os.write(fd, state)
        os.lseek(fd, 0, os.SEEK_SET)
        await _ignore_ram(monitor)
        await monitor.give("state", fd)
    finally:
        os.close(fd)
    await monitor.execute("migrate-incoming", {"uri": "fd:state"})
    await _completed(monitor)


async def _ignore_ram(monitor: Monitor) -> None:
    wanted = [{"capability": "x-ignore-shared", "state": True}]
    await monitor.execute("migrate-set-capabilities", {"capabilities": wanted})


async def _completed(monitor: Monitor) -> None:
    begun = monotonic()
    while (answer := await monitor.execute("query-migrate")).get("status") != "completed":
        if answer.get("status") in ("failed", "cancelled"):
            raise QmpFailed(f"the state of the devices could not be moved: {answer.get('error-desc', 'see qemu.log')}")
        if monotonic() - begun > ALLOWED:
            raise QmpFailed(f"the state of the devices was not moved within {ALLOWED:.0f} s")
        await asyncio.sleep(POLL)
