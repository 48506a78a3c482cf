"""All of a guest, memory and devices, in one file, and out of it.

Three ways, of which the first two are hardly noticed. `background`: devices are saved first, and memory as it was then
behind the guest's back (QEMU write-protects it with userfaultfd(2)). `rounds`, where QEMU may not do that: memory is
saved while the guest runs, again and again what it has changed since (precopy), and the devices at the end. `stopped`:
all of it while the guest stands still. Software emulation never takes rounds: before QEMU 9.0 it loses track of some of
what a guest writes meanwhile (fixed by «physmem: Fix migration dirty bitmap coherency with TCG memory access»), and its
author knew of more; of 90 guests saved so with QEMU 7.2, two died at once when they went on.

There is a moment in which the guest stands still, and what is to be of that very moment, its disks, is frozen then.
QEMU: qapi/migration.json, migration/migration.c.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Awaitable, Callable
from typing import Any

from innkeeper.base.errors import QmpFailed
from innkeeper.qemu.migration import capabilities
from innkeeper.qemu.monitor import Monitor

DOWNTIME = 50
"""Milliseconds that the last round of a precopy may take, as QEMU reckons."""
THROTTLE = {"cpu-throttle-initial": 20, "cpu-throttle-increment": 20, "max-cpu-throttle": 80}
"""Percent of its time that is taken from a guest which changes memory faster than it is saved; at 80 it stands still
for 40 ms at a time."""
MOST_COPIES = 2.0
"""How often the size of its RAM may be written before a guest that changes it faster is stopped for the rest."""
BANDWIDTH = 1 << 50
"""Bytes per second: as fast as the host's disk is."""
POLL, POLL_SLOW = 0.003, 0.1
"""Seconds between two looks: where the guest stands still or will soon, and elsewhere."""
SWITCHOVER = 60.0
"""Seconds in which a migration that only waits for QEMU has to get on."""

Progress = Callable[[float | None], None]
Deed = Callable[[], Awaitable[None]]
_RUNNING = ("setup", "active", "pre-switchover", "device", "cancelling")


async def behind_its_back(monitor: Monitor) -> str | None:
    """Have the next `migrate` be a background snapshot; why not, where QEMU cannot."""
    try:
        await capabilities(monitor, "background-snapshot")
    except QmpFailed as error:
        return error.detail
    return None


def otherwise(accelerator: str) -> str:
    """The way where QEMU cannot save memory behind the guest's back."""
    return "rounds" if accelerator == "kvm" else "stopped"


async def touch(monitor: Monitor) -> None:
    """Have all of a running guest's RAM read once. Otherwise it would stand still while QEMU brings in the pages that
    it never used, each of which has to be there. The first round of a save to nowhere does it."""
    await capabilities(monitor, "pause-before-switchover")
    await monitor.execute("migrate-set-parameters", {"max-bandwidth": BANDWIDTH, "downtime-limit": 0})
    nowhere = os.open(os.devnull, os.O_WRONLY | os.O_CLOEXEC)
    try:
        await _migrate(monitor, nowhere)
    finally:
        os.close(nowhere)
    while (found := await look(monitor))["status"] in ("setup", "active"):
        if found.get("ram", {}).get("dirty-sync-count", 0) > 1:
            break
        await asyncio.sleep(POLL)
    await abandon(monitor)


async def save_behind(monitor: Monitor, fd: int, progress: Progress) -> None:
    """Of a guest that is stopped, and whose disks are frozen already: its state goes to `fd`, and it goes on by itself
    as soon as its memory is protected. Returns when all is written."""
    await _migrate(monitor, fd)
    begun = False
    while True:
        found = await look(monitor)
        pages = found.get("ram", {}).get("normal", 0) + found.get("ram", {}).get("duplicate", 0)
        if not begun and (pages or found["status"] == "completed"):
            begun = True  # pages are written only once all are protected: from here on it may run
            if not (await monitor.execute("query-status"))["running"]:  # QEMU from 8.2 on leaves that to us
                await monitor.execute("cont")
        if found["status"] == "completed":
            return
        _check(found)
        progress(_fraction(found))
        await asyncio.sleep(POLL_SLOW if begun else POLL)


async def save_stopped(monitor: Monitor, fd: int, progress: Progress) -> None:
    """Of a guest that is stopped, and whose disks are frozen already; it stays stopped."""
    await capabilities(monitor)
    await monitor.execute("migrate-set-parameters", {"max-bandwidth": BANDWIDTH})
    await _migrate(monitor, fd)
    await finish(monitor, progress)


async def save_rounds(monitor: Monitor, fd: int, freeze: Deed, progress: Progress) -> None:
    """Of a guest that runs; it is left stopped, with `freeze` done at the moment of which its state is. Raises
    `QmpFailed`; then it goes on by itself."""
    await capabilities(monitor, "pause-before-switchover", "auto-converge")
    limits = {"max-bandwidth": BANDWIDTH, "downtime-limit": DOWNTIME, **THROTTLE}
    await monitor.execute("migrate-set-parameters", limits)
    await _migrate(monitor, fd)
    patient = True
    while (found := await look(monitor))["status"] != "pre-switchover":
        _check(found)
        ram = found.get("ram", {})
        if patient and ram.get("transferred", 0) > MOST_COPIES * ram.get("total", 0) > 0:
            patient = False
            await monitor.execute("stop")
        progress(_fraction(found))
        soon = not patient or ram.get("dirty-sync-count", 0) > 1
        await asyncio.sleep(POLL if soon else POLL_SLOW)
    await freeze()
    await finish(monitor)


async def finish(monitor: Monitor, progress: Progress = lambda fraction: None) -> None:
    """Of a guest whose disks have been frozen: until the rest is written. Raises `QmpFailed` if that does not come."""
    found = await look(monitor)
    if found["status"] == "pre-switchover":
        await monitor.execute("migrate-continue", {"state": "pre-switchover"})
    while (found := await look(monitor))["status"] != "completed":
        _check(found)
        progress(_fraction(found))
        await asyncio.sleep(POLL)


async def abandon(monitor: Monitor) -> None:
    """End a save that nobody goes on with; the guest goes on if that had not stopped it for good."""
    async with asyncio.timeout(SWITCHOVER):
        while (found := await look(monitor))["status"] in _RUNNING:
            if found["status"] != "cancelling":
                await monitor.execute("migrate_cancel")
            await asyncio.sleep(POLL)


async def load(monitor: Monitor, fd: int, progress: Progress) -> None:
    """Into a QEMU that was started to wait for it: the guest is as it was, and stopped."""
    await capabilities(monitor)
    await monitor.give("state", fd)
    await monitor.execute("migrate-incoming", {"uri": "fd:state"})
    while (found := await look(monitor))["status"] != "completed":
        _check(found)
        progress(None)
        await asyncio.sleep(POLL)


async def look(monitor: Monitor) -> dict[str, Any]:
    """What QEMU tells of its last migration (qapi/migration.json, MigrationInfo), with a `status`."""
    found: dict[str, Any] = await monitor.execute("query-migrate")
    return {"status": "none"} | found


async def _migrate(monitor: Monitor, fd: int) -> None:
    await monitor.give("state", fd)
    await monitor.execute("migrate", {"uri": "fd:state"})


def _check(found: dict[str, Any]) -> None:
    if found["status"] in ("failed", "cancelled", "none"):
        why = found.get("error-desc") or {"cancelled": "it was broken off"}.get(found["status"], "see qemu.log")
        raise QmpFailed(f"the guest's memory could not be moved: {why}")


def _fraction(found: dict[str, Any]) -> float | None:
    ram = found.get("ram")
    return 1 - ram["remaining"] / ram["total"] if ram and ram["total"] else None
