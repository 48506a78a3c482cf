"""The state of a guest's devices, out of QEMU and into one, while its RAM goes another way.

`save` is a migration that leaves out RAM which is shared on a file (capability x-ignore-shared); the guest cannot go on
after it. `Devices` are of any guest that stands still: it may go on.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from time import monotonic

from innkeeper.base.errors import QemuGone, QmpFailed
from innkeeper.plan.device_state import without_announcing
from innkeeper.qemu.monitor import Monitor

POLL = 0.002
"""Seconds between two looks at how far it is; all of it takes a few dozen milliseconds."""
ALLOWED = 60.0
"""Seconds after which it has failed."""
_CONFIGURATION, _DESCRIPTION = b"\x07", b"\x06"
"""Sections of a migration stream (migration/savevm.c: QEMU_VM_CONFIGURATION, QEMU_VM_VMDESCRIPTION)."""
_HEADER = 8
"""Bytes before the first section: magic, version."""


async def save(monitor: Monitor, path: Path) -> None:
    """Write the state of all devices of a stopped guest to a new file. The guest cannot go on in this QEMU."""
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    try:
        await _ignore_shared(monitor)
        await monitor.give("state", fd)
    finally:
        os.close(fd)
    await monitor.execute("migrate", {"uri": "fd:state"})
    await _completed(monitor)


class Devices:
    """The state of all devices of a guest that stands still, and may go on. What they have of memory that is not RAM,
    as a screen's, is not in it.

    QEMU's `xen-save-devices-state` needs no Xen, and writes a migration stream without the sections that tell the
    machine type and describe the rest; `load` wants those.
    """

    def __init__(self, monitor: Monitor, file: int, fdset: int) -> None:
        self._monitor, self._file, self._fdset = monitor, file, fdset

    async def save(self) -> None:
        """As they are now. Raises `QmpFailed`."""
        arguments = {"filename": f"/dev/fdset/{self._fdset}", "live": False}
        await self._monitor.execute("xen-save-devices-state", arguments)

    def state(self, machine_type: str) -> bytes:
        """What was saved, for `load`."""
        state = os.pread(self._file, os.fstat(self._file).st_size, 0)
        name, nothing = machine_type.encode(), b"{}"
        configuration = _CONFIGURATION + len(name).to_bytes(4, "big") + name
        description = _DESCRIPTION + len(nothing).to_bytes(4, "big") + nothing
        return state[:_HEADER] + configuration + state[_HEADER:] + description


@asynccontextmanager
async def room_for_devices(monitor: Monitor) -> AsyncIterator[Devices]:
    """Where their state can be saved without further words. Raises `QmpFailed`."""
    file = os.memfd_create("innkeeper-devices", os.MFD_CLOEXEC)
    try:
        handed = os.open(f"/proc/self/fd/{file}", os.O_WRONLY | os.O_CLOEXEC)
        try:
            fdset = await monitor.add(handed)
        finally:
            os.close(handed)
        try:
            yield Devices(monitor, file, fdset)
        finally:
            with suppress(QemuGone):
                await monitor.execute("remove-fd", {"fdset-id": fdset})
    finally:
        os.close(file)


async def load(monitor: Monitor, state: bytes, *, saved: bool = False) -> None:
    """Put the state of all devices into a QEMU that waits for it, with the RAM it belongs to. `saved`: it is of `save`,
    not of `Devices`.

    No card announces itself, as after a migration to another host: a guest has better things to do in its first moment,
    and Linux (6.12) hangs for good where its link is taken down meanwhile (virtnet_close waits for work that waits for
    the lock that it holds).
    """
    fd = os.memfd_create("innkeeper-devices", os.MFD_CLOEXEC)
    try:
        os.write(fd, without_announcing(state))
        os.lseek(fd, 0, os.SEEK_SET)
        # Asked for at once: QEMU does them in this order, and what fails makes the loading fail.
        await asyncio.gather(
            *([_ignore_shared(monitor)] if saved else []),
            monitor.execute("migrate-set-parameters", {"announce-rounds": 0}),
            monitor.give("state", fd),
            monitor.execute("migrate-incoming", {"uri": "fd:state"}),
        )
    finally:
        os.close(fd)
    await _completed(monitor)


async def _ignore_shared(monitor: Monitor) -> None:
    capability = {"capability": "x-ignore-shared", "state": True}
    await monitor.execute("migrate-set-capabilities", {"capabilities": [capability]})


async def _completed(monitor: Monitor) -> None:
    begun = monotonic()
    while (answer := await monitor.execute("query-migrate")).get("status") != "completed":
        if answer.get("status") in ("failed", "cancelled"):
            raise QmpFailed(f"the state of the devices could not be moved: {answer.get('error-desc', 'see qemu.log')}")
        if monotonic() - begun > ALLOWED:
            raise QmpFailed(f"the state of the devices was not moved within {ALLOWED:.0f} s")
        await asyncio.sleep(POLL)
