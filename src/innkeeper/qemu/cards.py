"""Network cards of a QEMU that runs: plugged in and out, and the ports of its own NAT."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Collection, Mapping
from contextlib import suppress
from typing import Any

from innkeeper.base.errors import QemuGone, QmpFailed, UnplugRefused
from innkeeper.qemu.monitor import Monitor

POLL = 0.02
"""Seconds between two looks whether the guest has let go of a card."""
_NETDEV = re.compile(r"Hub -?\d+ \((?P<name>\w+)\):")
_FORWARD = re.compile(
    r"\s*(?P<protocol>TCP|UDP)\[HOST_FORWARD\]\s+\d+\s+(?P<address>\S+)\s+(?P<host>\d+)\s+\S+\s+(?P<guest>\d+)\s"
)


async def present(monitor: Monitor) -> set[int]:
    """Numbers of the cards that it has."""
    found = await monitor.execute("qom-list", {"path": "/machine/peripheral"})
    names = [re.fullmatch(r"nic(\d+)", item["name"]) for item in found]
    return {int(name[1]) for name in names if name}


async def plug(monitor: Monitor, device: Mapping[str, Any], netdev: Mapping[str, Any] | None) -> None:
    """A card and what it is plugged into. Raises `QmpFailed`, and has done nothing then."""
    if netdev is not None:
        await _drop_netdev(monitor, netdev["id"])  # of one that came half-way
        await monitor.execute("netdev_add", dict(netdev))
    try:
        await monitor.execute("device_add", dict(device))
    except BaseException:
        if netdev is not None:
            await _drop_netdev(monitor, netdev["id"])
        raise


async def unplug(monitor: Monitor, index: int, seconds: float) -> None:
    """A card away, once the guest has let go of it. Raises `UnplugRefused` where it has not after `seconds`."""
    if index in await present(monitor):
        with suppress(QmpFailed):  # asked for before
            await monitor.execute("device_del", {"id": f"nic{index}"})
    try:
        async with asyncio.timeout(seconds):
            while True:
                if index not in await present(monitor):
                    break
                await asyncio.sleep(POLL)
    except TimeoutError:
        raise UnplugRefused(f"the guest has not let go of card {index} within {seconds:.0f} s") from None
    await _drop_netdev(monitor, f"net{index}")


async def set_link(monitor: Monitor, index: int, *, up: bool) -> None:
    """The cable of a card in or out."""
    await monitor.execute("set_link", {"name": f"nic{index}", "up": up})


async def _drop_netdev(monitor: Monitor, name: str) -> None:
    try:
        await monitor.execute("netdev_del", {"id": name})
    except QemuGone:
        raise
    except QmpFailed:  # there is none
        return


async def forwards(monitor: Monitor) -> dict[str, set[str]]:
    """Ports that lead in, by netdev, as `-netdev` writes them: `tcp:127.0.0.1:8080-:80`. QMP has no words for this."""
    said = await monitor.execute("human-monitor-command", {"command-line": "info usernet"})
    found: dict[str, set[str]] = {}
    name = ""
    for line in said.splitlines():
        if head := _NETDEV.match(line):
            name = head["name"]
            found[name] = set()
        elif port := _FORWARD.match(line):
            address = "0.0.0.0" if port["address"] == "*" else port["address"]
            found[name].add(f"{port['protocol'].lower()}:{address}:{port['host']}-:{port['guest']}")
    return found


async def forward(monitor: Monitor, netdev: str, wanted: Collection[str]) -> None:
    """Have exactly these ports lead in. Raises `QmpFailed` where QEMU cannot listen on one."""
    there = (await forwards(monitor)).get(netdev, set())
    for port in there - set(wanted):
        await _say(monitor, f"hostfwd_remove {netdev} {port.rpartition('-:')[0]}")
    for port in sorted(set(wanted) - there):
        if await _say(monitor, f"hostfwd_add {netdev} {port}"):
            raise QmpFailed(
                f"QEMU cannot listen on {port.rpartition('-:')[0]}",
                hint="somebody else took it in this moment, or it is below 1024, which QEMU's user may not have",
            )


async def _say(monitor: Monitor, line: str) -> str:
    return str(await monitor.execute("human-monitor-command", {"command-line": line})).strip()
