"""Macvtaps: a guest on an interface of the host, past the host's own network.

Other than a tap, a macvtap stays when the descriptor of its QEMU is closed. So it is written down before it is made;
whoever sees that QEMU's end removes it, and a daemon that comes later those that it finds without one.
"""

from __future__ import annotations

import asyncio
import ctypes
import fcntl
import os
import socket
import stat
import struct
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from innkeeper.base.errors import InvalidInput, NetworkFailed, Unsupported
from innkeeper.network import firewall
from innkeeper.network.links import TUNSETIFF, UP, disable_ipv6, open_netlink
from innkeeper.network.uplink import ETHERNET, check_wired
from innkeeper.plan import macvtap as rules
from innkeeper.plan.network import MACVTAP, OURS, macvtap_name
from innkeeper.plan.options import Macvtap

FLAGS = 0x2 | 0x1000 | 0x4000
"""linux/if_tun.h: IFF_TAP, IFF_NO_PI, IFF_VNET_HDR."""
ALLMULTI = 0x200
"""linux/if.h. A guest tells nobody which multicast groups it joins, so it gets those of all: neighbour discovery."""
FSOPEN, FSCONFIG, FSMOUNT, CLOEXEC, CREATE = 430, 431, 432, 1, 6
"""System calls (the same on all of QEMU's hosts) and their constants, linux/mount.h."""
MODES = {"private": 1, "vepa": 2, "bridge": 4}
"""linux/if_link.h: enum macvlan_mode."""


async def check_parent(name: str) -> str:
    """A sentence about what is wrong with it at present, or none. Raises `InvalidInput`, `Unsupported` where guests
    cannot be on it."""
    if os.geteuid() != 0:
        raise Unsupported(
            "a macvtap is made by root, and this daemon runs as a plain user",
            hint="the user-mode NAT of a VM needs no privilege",
        )
    hint = "ip -br link shows the host's interfaces"
    async with open_netlink() as netlink:
        links = {link.get("ifname"): link async for link in await netlink.get_links()}
    if (parent := links.get(name)) is None:
        raise InvalidInput(f"this host has no interface {name!r}", hint=hint, field="parent")
    if name.startswith(OURS):
        raise InvalidInput(f"{name} is itself part of a network of Innkeeper's", hint=hint, field="parent")
    if parent["ifi_type"] != ETHERNET:
        raise InvalidInput(f"{name} is no Ethernet interface", hint=hint, field="parent")
    check_wired(name)
    if parent.get("master"):
        owner = next((link.get("ifname") for link in links.values() if link["index"] == parent.get("master")), "")
        raise InvalidInput(
            f"{name} is in {owner}, which takes all that comes in there",
            hint=f"on a bridge: inn network create NAME --parent {owner}; on a bond: --macvtap {owner}",
            field="parent",
        )  # fmt: skip
    firewall.need("nft")
    if not parent["flags"] & UP:
        return f"{name} is down: nothing comes in or goes out there until ip link set {name} up"
    if parent.get("operstate") in ("DOWN", "LOWERLAYERDOWN"):
        return f"{name} has no link: is its cable plugged in?"
    return ""


async def open_macvtap(wanted: Macvtap, records: Path) -> int:
    """Make a macvtap, with its rules in force before its first packet, and return its descriptor. `records` is the
    folder for what is to be removed. Nothing is left where it fails: `NetworkFailed`, `InvalidInput`, `Unsupported`."""
    await check_parent(wanted.parent)
    await remove([wanted.name], records)  # of a QEMU that ended unseen
    try:
        records.mkdir(mode=0o755, parents=True, exist_ok=True)
        _record(records, wanted.name).write_text(wanted.mac)
        async with open_netlink() as netlink:
            (parent,) = await netlink.link_lookup(ifname=wanted.parent)
            how = {"kind": "macvtap", "link": parent, "macvtap_mode": MODES[wanted.mode]}
            await netlink.link("add", ifname=wanted.name, address=wanted.mac, **how)
            await _protect(wanted.name, wanted.mac)
            disable_ipv6(wanted.name)  # the host has nothing to say on it
            (index,) = await netlink.link_lookup(ifname=wanted.name)
            await netlink.link("set", index=index, state="up", flags=UP | ALLMULTI, mask=UP | ALLMULTI)
        return await asyncio.to_thread(_open_device, wanted.name)
    except BaseException:
        with suppress(NetworkFailed):
            await remove([wanted.name], records)
        raise


async def remove(names: Iterable[str], records: Path) -> None:
    """Those of them that were made, and their rules."""
    for name in names:
        if (record := _record(records, name)).exists():
            async with open_netlink() as netlink:
                for index in await netlink.link_lookup(ifname=name):
                    await netlink.link("del", index=index)
            await firewall.apply(rules.removed(name))
            record.unlink(missing_ok=True)


async def leave_only(vm: str, wanted: Collection[str], records: Path) -> None:
    """A VM has no other macvtaps than these."""
    await remove([name for name in _recorded(records, vm) if name not in wanted], records)


async def sweep(running: Collection[str], records: Path) -> None:
    """After a start of the daemon: remove what QEMUs have left that ended meanwhile. `running` are ids of VMs."""
    kept = {name for vm in running for name in _recorded(records, vm)}
    await remove(_recorded(records).keys() - kept, records)


async def heal(records: Path) -> list[str]:
    """Put back rules that somebody has taken away; what that was, in sentences."""
    found, there = [], {name for _, name in socket.if_nameindex()}
    for name, mac in _recorded(records).items():
        if name in there and not await firewall.has(rules.rules(name, mac), ("netdev", name)):
            await _protect(name, mac)
            found.append(f"the rules of {name} had been changed by another program: restored")
    return found


def any_there(records: Path) -> bool:
    """Whether there is something to look after."""
    return bool(_recorded(records))


async def dropped(vm: str, records: Path) -> dict[str, int]:
    """Packets of each macvtap of a VM that its guest had no right to send."""
    return {name: await firewall.packets(("netdev", name), rules.DROPPED) for name in _recorded(records, vm)}


# --- the parts ---


async def _protect(name: str, mac: str) -> None:
    try:
        await firewall.apply(rules.rules(name, mac))
    except NetworkFailed as error:
        raise NetworkFailed(
            f"what the guest on {name} may send cannot be limited: {error.detail}",
            hint="that takes Linux 5.16 or later with CONFIG_NETFILTER_EGRESS",
        ) from None


def _record(records: Path, name: str) -> Path:
    return records / f"{name}.mac"


def _recorded(records: Path, vm: str | None = None) -> dict[str, str]:
    """Name → MAC of all that were made and not removed, or of one VM's."""
    begin = macvtap_name(vm, 0).removesuffix("0") if vm else MACVTAP
    return {path.stem: path.read_text() for path in records.glob(f"{begin}*.mac")}


def _open_device(name: str) -> int:
    """The character device of a macvtap, by a node of our own: /dev has one only where udev runs."""
    with _sysfs() as root:
        folder = f"{root}/class/net/{name}/macvtap"
        try:
            (tap,) = os.listdir(folder)  # noqa: PTH208 - below a descriptor
            major, minor = map(int, Path(folder, tap, "dev").read_text().split(":"))
        except (OSError, ValueError) as error:
            raise NetworkFailed(f"{name} has no device that could be opened: {error}") from None
    node = Path("/dev", name)  # /run may be mounted nodev
    try:
        node.unlink(missing_ok=True)
        os.mknod(node, stat.S_IFCHR | 0o600, os.makedev(major, minor))
        fd = os.open(node, os.O_RDWR | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        raise NetworkFailed(
            f"the device {major}:{minor} of {name} cannot be opened: {error.strerror}",
            hint="in a container: it has to be allowed to make and open device nodes",
        ) from None
    finally:
        node.unlink(missing_ok=True)
    fcntl.ioctl(fd, TUNSETIFF, struct.pack("16sH22x", b"", FLAGS))
    return fd


@contextmanager
def _sysfs() -> Iterator[str]:
    """A path of sysfs as our own network namespace sees it: /sys may be mounted for another. The mount is attached
    nowhere, and gone afterwards (fsopen(2), fsmount(2))."""
    opened: list[int] = []
    try:
        opened.append(_call(FSOPEN, b"sysfs", CLOEXEC))
        _call(FSCONFIG, opened[0], CREATE, None, None, 0)
        opened.append(_call(FSMOUNT, opened[0], CLOEXEC, 0))
        yield f"/proc/self/fd/{opened[-1]}"
    finally:
        for fd in opened:
            os.close(fd)


def _call(number: int, *words: Any) -> int:
    libc = ctypes.CDLL(None, use_errno=True)
    result: int = libc.syscall(number, *words)
    if result < 0:
        error = ctypes.get_errno()
        raise NetworkFailed(f"the kernel's list of devices cannot be read: {os.strerror(error)}")
    return result
