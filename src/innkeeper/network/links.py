"""Bridges and taps, through netlink. Touches only links of our names (plan/network.py)."""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import struct
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

from innkeeper.base.errors import NetworkFailed
from innkeeper.plan.network import BRIDGE, Network, Subnet
from innkeeper.plan.path import Way
from innkeeper.plan.sender import SMALLEST_BURST
from innkeeper.plan.survey import Link, Route

TUNSETIFF, IFF_TAP, IFF_NO_PI, IFF_VNET_HDR = 0x400454CA, 0x2, 0x1000, 0x4000
"""linux/if_tun.h."""
NODAD, UP, MAIN, UNICAST, PERMANENT = 0x2, 0x1, 254, 1, 0x80
"""linux/if_addr.h: do not look whether others have the address; linux/if.h; linux/rtnetlink.h; a device's own MAC
(linux/neighbour.h)."""
LOCAL, UNREACHED = 2, 0x01 | 0x20
"""linux/rtnetlink.h: an address of this host; linux/neighbour.h: NUD_INCOMPLETE, NUD_FAILED."""
ROOT = 0xFFFFFFFF
"""linux/pkt_sched.h: what a device's own queue stands below."""
LATENCY = "100ms"
DEVICES = Path("/sys/class/net")


@asynccontextmanager
async def open_netlink() -> AsyncIterator[Any]:
    """A connection to the kernel, whose refusals become `NetworkFailed`."""
    # Imported here: it takes a third of a second, and a host without networks never needs it.
    from pyroute2 import AsyncIPRoute
    from pyroute2.netlink.exceptions import NetlinkError

    try:
        async with AsyncIPRoute() as netlink:
            yield netlink
    except NetlinkError as error:
        raise NetworkFailed(f"the kernel refused a change of the network: {error}") from None


async def ensure_bridge(network: Network) -> bool:
    """The bridge is there, up and has its addresses. True where something of that was missing."""
    missing = False
    assert network.subnet and network.gateway
    wanted = {(network.gateway, network.subnet.prefixlen)}
    if network.prefix:
        wanted.add((str(network.gateway6), network.prefix.prefixlen))
    async with open_netlink() as netlink:
        index = await _index(netlink, network.bridge)
        if index is None:
            missing = True
            await netlink.link(
                "add", ifname=network.bridge, kind="bridge", address=network.mac, br_stp_state=0, br_forward_delay=0
            )
            index = await _index(netlink, network.bridge)
        _set(f"ipv6/conf/{network.bridge}/accept_ra", "0")
        _set(f"ipv6/conf/{network.bridge}/accept_dad", "0")
        # What the host publishes on its loopback only: its answers come back through the bridge.
        _set(f"ipv4/conf/{network.bridge}/route_localnet", "1" if network.mode == "nat" else "0")
        (link,) = await netlink.link("get", index=index)
        if network.mtu and link.get("mtu") != network.mtu:
            missing = True
            await netlink.link("set", index=index, mtu=network.mtu)
        if not link["flags"] & UP:
            missing = True
            await netlink.link("set", index=index, state="up")
        there = {(found.get("address"), found["prefixlen"]) async for found in await netlink.get_addr(index=index)}
        for address, length in wanted - there:
            missing = True
            flags = {"flags": NODAD} if ":" in address else {}
            await netlink.addr("replace", index=index, address=address, prefixlen=length, **flags)
    return missing


async def ensure_attached(taps: Mapping[str, str]) -> list[str]:
    """Each tap that is there, by name, is up and a port of its bridge, with its MTU: the smallest of its ports becomes
    that of a bridge that has been told none. Returns those that were not."""
    changed = []
    async with open_netlink() as netlink:
        links = {link.get("ifname"): link async for link in await netlink.get_links()}
        for tap, bridge in taps.items():
            link, master = links.get(tap), links.get(bridge)
            if link is None or master is None or (link.get("master") == master["index"] and link["flags"] & UP):
                continue
            disable_ipv6(tap)  # the host has nothing to say on it
            await netlink.link("set", index=link["index"], mtu=master.get("mtu"))
            await netlink.link("set", index=link["index"], master=master["index"], state="up")
            changed.append(tap)
    return changed


async def ensure_limits(limits: Mapping[str, int | None]) -> list[str]:
    """Each tap that is there, by name, hands its guest at most so many bits per second; None: whatever comes. What is
    too much waits in a queue, up to `LATENCY`. Returns those for which that was not so."""
    from pyroute2.netlink.exceptions import NetlinkError

    changed = []
    async with open_netlink() as netlink:
        indices = {link["index"]: link.get("ifname") async for link in await netlink.get_links()}
        there = {}
        async for qdisc in await netlink.get_qdiscs():
            if qdisc.get("kind") == "tbf" and qdisc["parent"] == ROOT:
                there[qdisc["index"]] = qdisc.get(("options", "TCA_TBF_PARMS"))["rate"] * 8
        for index, tap in indices.items():
            if tap not in limits or there.get(index) == (limit := _whole_bytes(limits[tap])):
                continue
            if limit is None:
                await netlink.tc("del", index=index, parent=ROOT)
            else:
                # what comes for a guest does so in pieces of up to 64 KiB
                burst = max(limit // 8 // 100, SMALLEST_BURST)
                try:
                    await netlink.tc("replace", "tbf", index, "1:", rate=limit // 8, burst=burst, latency=LATENCY)
                except NetlinkError as error:
                    if error.code != errno.ENOENT:
                        raise
                    raise NetworkFailed(
                        "this kernel cannot limit a card: it has no token bucket filter (sch_tbf)",
                        hint="leave the limit out, or load that module",
                    ) from None
            changed.append(str(tap))
    return changed


def _whole_bytes(limit: int | None) -> int | None:
    return limit and limit // 8 * 8


async def remove_bridge(name: str) -> None:
    """The bridge away, if it is there."""
    async with open_netlink() as netlink:
        if (index := await _index(netlink, name)) is not None:
            await netlink.link("del", index=index)


async def bridges() -> list[str]:
    """Names of all bridges of ours."""
    async with open_netlink() as netlink:
        names = [link.get("ifname") async for link in await netlink.get_links()]
    return [name for name in names if name.startswith(BRIDGE)]


async def routes() -> dict[Subnet, str]:
    """IPv4 destinations of the main routing table, with the device that each leads through."""
    found = {}
    async with open_netlink() as netlink:
        names = {link["index"]: link.get("ifname") async for link in await netlink.get_links()}
        async for route in await netlink.get_routes(family=2):
            if route.get("table") == MAIN and route.get("dst"):
                found[Subnet(f"{route.get('dst')}/{route['dst_len']}")] = names.get(route.get("oif")) or "no device"
    return found


async def everything() -> tuple[dict[str, Link], tuple[Route, ...], tuple[tuple[str, str, str], ...]]:
    """All devices of the host by name, the main routing tables, and (bridge, port, MAC) of whom our bridges have heard:
    for the doctor."""
    async with open_netlink() as netlink:
        found = [link async for link in await netlink.get_links()]
        names = {link["index"]: str(link.get("ifname")) for link in found}
        addresses: dict[int, list[str]] = {}
        async for address in await netlink.get_addr():
            addresses.setdefault(address["index"], []).append(f"{address.get('address')}/{address['prefixlen']}")
        links = {
            names[link["index"]]: Link(
                name=names[link["index"]], kind=link.get(("linkinfo", "kind")) or "", up=bool(link["flags"] & UP),
                mtu=link.get("mtu"), mac=link.get("address") or "", master=names.get(link.get("master")),
                wireless=is_wireless(names[link["index"]]), addresses=tuple(addresses.get(link["index"], ())),
            )
            for link in found
        }  # fmt: skip
        routes = []
        async for route in await netlink.get_routes():
            if route.get("table") == MAIN and route["type"] == UNICAST:
                to = f"{route.get('dst') or ('0.0.0.0' if route['family'] == 2 else '::')}/{route['dst_len']}"
                device = names.get(route.get("oif"), "no device")
                routes.append(Route(to, device, route.get("gateway"), route.get("priority") or 0))
        learned = []
        async for entry in await netlink.fdb("dump"):
            bridge, port = names.get(entry.get("master"), ""), names.get(entry["ifindex"])
            if bridge.startswith(BRIDGE) and port and not entry["state"] & PERMANENT:
                learned.append((bridge, port, entry.get("lladdr")))
    return links, tuple(routes), tuple(learned)


async def way_to(address: str) -> Way | None:
    """By which device, next hop and source address the host sends there, and what it knows of that hop; None where it
    has no route."""
    from pyroute2.netlink.exceptions import NetlinkError

    async with open_netlink() as netlink:
        names = {link["index"]: str(link.get("ifname")) async for link in await netlink.get_links()}
        try:
            (route,) = await netlink.route("get", dst=address)
        except NetlinkError as error:
            if error.code in (errno.ENETUNREACH, errno.EHOSTUNREACH, errno.EACCES, errno.EINVAL):
                return None
            raise
        hop = route.get("gateway") or address
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        known = [entry async for entry in await netlink.get_neighbours(family=family) if entry.get("dst") == hop]
        state = next((entry["state"] for entry in known if entry["ifindex"] == route.get("oif")), 0)
        local = route["type"] == LOCAL
        return Way(
            names.get(route.get("oif"), "no device"), hop, route.get("prefsrc") or "", bool(state & UNREACHED), local
        )


async def neighbours() -> dict[str, str]:
    """MAC → IPv4 address of those in its networks that the host has spoken with of late."""
    async with open_netlink() as netlink:
        entries = [entry async for entry in await netlink.get_neighbours(family=socket.AF_INET)]
    heard = [entry for entry in entries if not entry["state"] & UNREACHED and entry.get("lladdr")]
    return {entry.get("lladdr"): entry.get("dst") for entry in heard}


async def sent(tap: str) -> int | None:
    """Frames that the guest has sent into a tap; None where it is not there."""
    async with open_netlink() as netlink:
        if (index := await _index(netlink, tap)) is None:
            return None
        (link,) = await netlink.link("get", index=index)
        return int(link.get("stats64")["rx_packets"])


def is_wireless(name: str) -> bool:
    """Whether the kernel has it as a Wi-Fi device."""
    return any((DEVICES / name / mark).exists() for mark in ("wireless", "phy80211"))


def open_tap(name: str) -> int:
    """Make a tap and return its descriptor. It lives as long as somebody has that descriptor open: QEMU, which outlives
    the daemon; so none is left behind when a guest ends, however it ends."""
    fd = os.open("/dev/net/tun", os.O_RDWR | os.O_CLOEXEC)
    try:
        flags = IFF_TAP | IFF_NO_PI | IFF_VNET_HDR
        fcntl.ioctl(fd, TUNSETIFF, struct.pack("16sH22x", name.encode(), flags))
    except OSError as error:
        os.close(fd)
        raise NetworkFailed(f"tap {name} cannot be made: {error.strerror}") from None
    return fd


def disable_ipv6(name: str) -> None:
    """The host gives itself no IPv6 address on a device."""
    _set(f"ipv6/conf/{name}/disable_ipv6", "1")


async def _index(netlink: Any, name: str) -> int | None:
    found: list[int] = await netlink.link_lookup(ifname=name)
    return found[0] if found else None


def _set(path: str, value: str) -> None:
    with suppress(OSError):  # no IPv6 in this kernel
        Path("/proc/sys/net", path).write_text(value)
