"""Virtual functions of SR-IOV cards, given to QEMUs and taken back.

What a function was like is written down before it is changed, so that whoever sees its QEMU's end can put it back, and
a daemon that comes later, too. One that is in such a record is nobody else's. No such card was at hand when this was
written: tests have a sysfs of their own, and netlink's messages were looked at, not answered.
"""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import Collection, Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

from innkeeper.base.errors import InvalidInput, NetworkFailed, Unsupported
from innkeeper.host import sriov as host
from innkeeper.network.links import open_netlink
from innkeeper.plan.sriov import VFIO, Card, Function, Wanted, check, choose

SYSFS, VFIO_DEVICES = Path("/sys"), Path("/dev/vfio")
NOBODY = "00:00:00:00:00:00"
"""A function with this MAC has the one that its driver makes up."""
RECORD = ".function"
TRIES, PAUSE = 50, 0.02
"""How often, and seconds between two looks, whether the kernel has made the device of a group."""


def read_card(name: str) -> Card:
    """A physical function as it is now. Raises `InvalidInput` where there is no such network device."""
    most = host.most_functions(name, SYSFS)
    if most is None:
        raise InvalidInput(
            f"this host has no interface {name!r}", hint="ip -br link shows the host's interfaces", field="parent"
        )
    functions = [
        Function(
            index, device.name, host.driver(device), host.override(device), host.group(device), host.beside(device),
            host.up(device),
        )
        for index, device in host.functions(name, SYSFS)
    ]  # fmt: skip
    return Card(name, most, tuple(functions))


def check_parent(name: str) -> None:
    """Raises `InvalidInput`, `Unsupported` where a guest cannot have a function of it. That one is free is not asked:
    it may be, once the VM starts."""
    if os.geteuid() != 0:
        raise Unsupported(
            "a PCI device is given to a guest by root, and this daemon runs as a plain user",
            hint="the user-mode NAT of a VM needs no privilege",
        )
    check(read_card(name), vfio=host.has_driver(VFIO, SYSFS))


async def take(wanted: Wanted, records: Path) -> str:
    """Choose a function, make it the guest's and return its PCI address. Raises `InvalidInput`, `Unsupported`,
    `NetworkFailed`, and has changed nothing then."""
    await give_back([_name(wanted.vm, wanted.index)], records)  # of a QEMU that ended unseen
    taken = {found["address"]: f"VM {found['vm']}" for found in _recorded(records).values()}
    function = choose(read_card(wanted.parent), taken, vfio=host.has_driver(VFIO, SYSFS))
    record = records / (_name(wanted.vm, wanted.index) + RECORD)
    records.mkdir(mode=0o755, parents=True, exist_ok=True)
    before = {"vm": wanted.vm, "parent": wanted.parent, "index": function.index, "address": function.address}
    _write_record(record, before | {"override": function.override, "driver": function.driver})
    try:
        await set_function(wanted.parent, function.index, mac=wanted.mac, vlan=wanted.vlan or 0, spoofchk=1)
        await asyncio.to_thread(_drive, function.address, VFIO, VFIO)
        node = await _node(function)
        if wanted.uid is not None:
            os.chown(node, wanted.uid, -1)
    except BaseException:
        with suppress(NetworkFailed):
            await asyncio.shield(give_back([_name(wanted.vm, wanted.index)], records))
        raise
    return function.address


async def give_back(names: Iterable[str], records: Path) -> None:
    """These functions are the host's again, as they were. Raises `NetworkFailed`."""
    there = _recorded(records)
    for name in names:
        if (before := there.get(name)) is None:
            continue
        if (SYSFS / "bus/pci/devices" / before["address"]).exists():  # else the card, or the host, was away
            await asyncio.to_thread(_drive, before["address"], before["override"], before["driver"])
            with suppress(NetworkFailed):  # no device of that name any more
                await set_function(before["parent"], before["index"], mac=NOBODY, vlan=0)
        (records / (name + RECORD)).unlink(missing_ok=True)


async def leave_only(vm: str, wanted: Collection[int], records: Path) -> None:
    """A VM has no other functions than those of these cards."""
    kept = {_name(vm, index) for index in wanted}
    names = [name for name, found in _recorded(records).items() if found["vm"] == vm and name not in kept]
    await give_back(names, records)


async def sweep(running: Collection[str], records: Path) -> None:
    """After a start of the daemon: take back what QEMUs had that ended meanwhile. `running` are ids of VMs."""
    await give_back([name for name, found in _recorded(records).items() if found["vm"] not in running], records)


def functions_of(vm: str, records: Path) -> dict[int, str]:
    """PCI addresses of what a VM has now, by card."""
    return {
        int(name.rpartition("-")[2]): found["address"]
        for name, found in _recorded(records).items()
        if found["vm"] == vm
    }


async def set_function(parent: str, index: int, **settings: Any) -> None:
    """The card itself sees to these, whatever the guest does. Raises `NetworkFailed`."""
    async with open_netlink() as netlink:
        for link in await netlink.link_lookup(ifname=parent):
            await netlink.link("set", index=link, vf={"vf": index} | settings)


# --- the parts ---


def _drive(address: str, override: str, driver: str) -> None:
    """Have a PCI device driven by `driver`, with this override; by what the kernel finds where both are empty."""
    device = SYSFS / "bus/pci/devices" / address
    if (now := host.driver(device)) and now != driver:
        write(device / "driver/unbind", address)
    if host.override(device) != override:
        write(device / "driver_override", override or "\n")
    if driver and host.driver(device) != driver:
        write(SYSFS / "bus/pci/drivers_probe", address)
        if (now := host.driver(device)) != driver:
            raise NetworkFailed(f"the kernel has not bound {address} to {driver}, but to {now or 'nothing'}")


def write(path: Path, text: str) -> None:
    """To a file of the kernel's."""
    try:
        fd = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
        try:
            os.write(fd, text.encode())
        finally:
            os.close(fd)
    except OSError as error:
        raise NetworkFailed(f"{path} does not take {text.strip()!r}: {error.strerror}") from None


async def _node(function: Function) -> Path:
    node = VFIO_DEVICES / str(function.group)
    for _ in range(TRIES):
        if node.exists():
            return node
        await asyncio.sleep(PAUSE)
    raise NetworkFailed(
        f"{node} is not there, though {function.address} is bound to {VFIO}",
        hint="udev or devtmpfs makes it; a container has to be given it",
    )


def _name(vm: str, index: int) -> str:
    return f"{vm}-{index}"


def _recorded(records: Path) -> dict[str, dict[str, Any]]:
    return {path.name.removesuffix(RECORD): json.loads(path.read_text()) for path in records.glob(f"*{RECORD}")}


def _write_record(record: Path, what: dict[str, Any]) -> None:
    staged = record.with_name(f"{record.name}.new")
    staged.write_text(json.dumps(what))
    staged.replace(record)
