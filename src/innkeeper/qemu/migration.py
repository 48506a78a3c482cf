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
CAPABILITIES = ("x-ignore-shared", "background-snapshot", "pause-before-switchover", "auto-converge")
"""Those of QEMU's migration capabilities that Innkeeper uses."""


async def save(monitor: Monitor, path: Path) -> None:
    """Write the state of all devices of a stopped guest to a new file. The guest cannot go on in this QEMU."""
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    try:
        await capabilities(monitor, "x-ignore-shared")
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
        await capabilities(monitor, "x-ignore-shared")
        await monitor.give("state", fd)
    finally:
        os.close(fd)
    await monitor.execute("migrate-incoming", {"uri": "fd:state"})
    await _completed(monitor)


async def capabilities(monitor: Monitor, *wanted: str) -> None:
    """Have these capabilities, and of those that Innkeeper uses no other: they outlast a migration. Raises `QmpFailed`
    where QEMU or its host lacks one."""
    every = [{"capability": name, "state": name in wanted} for name in CAPABILITIES]
    await monitor.execute("migrate-set-capabilities", {"capabilities": every})


async def _completed(monitor: Monitor) -> None:
    begun = monotonic()
    while (answer := await monitor.execute("query-migrate")).get("status") != "completed":
        if answer.get("status") in ("failed", "cancelled"):
            raise QmpFailed(f"the state of the devices could not be moved: {answer.get('error-desc', 'see qemu.log')}")
        if monotonic() - begun > ALLOWED:
            raise QmpFailed(f"the state of the devices was not moved within {ALLOWED:.0f} s")
        await asyncio.sleep(POLL)
