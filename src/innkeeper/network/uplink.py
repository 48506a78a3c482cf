"""An interface of the host taken into a bridge of ours, so that guests are on the network outside.

The host's own addresses and routes go from the interface to the bridge, and back when the network is removed. What they
are is written down before anything is touched, with the id of this boot, so that a daemon that was killed half-way
finishes or undoes it. Where the move fails the host gets its interface back at once: it is never cut off.

A bridge of somebody else's is not touched at all: guests are just plugged into it.
"""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path
from typing import Any

from innkeeper.base.errors import InvalidInput, NetworkFailed, Unsupported
from innkeeper.host.gather import boot_id
from innkeeper.network.links import NODAD, UP, open_netlink
from innkeeper.plan.network import OURS, Network

ETHERNET = 1
"""ARPHRD_ETHER (linux/if_arp.h)."""
LOCAL_TABLE, FROM_ADVERTISEMENT, UNICAST, UNIVERSE = 255, 9, 1, 0
"""linux/rtnetlink.h: RT_TABLE_LOCAL, RTPROT_RA, RTN_UNICAST, RT_SCOPE_UNIVERSE."""
FOR_EVER = 0xFFFFFFFF
KEPT_FLAGS = NODAD | 0x100 | 0x200
"""linux/if_addr.h: IFA_F_NODAD, IFA_F_MANAGETEMPADDR, IFA_F_NOPREFIXROUTE."""
SYSFS = Path("/sys/class/net")
IPV6 = Path("/proc/sys/net/ipv6/conf")
HOW_IT_LEARNS = ("disable_ipv6", "accept_ra", "autoconf", "addr_gen_mode", "use_tempaddr")
"""How the host gets IPv6 addresses on an interface: the bridge does it likewise."""

Moved = dict[str, Any]


async def check_parent(name: str) -> bool:
    """Whether it is a bridge, which guests can just be plugged into. Raises `InvalidInput`, `Unsupported` where it can
    be no parent."""
    hint = "ip -br link shows the host's interfaces"
    async with open_netlink() as netlink:
        links = await _links(netlink)
        if (parent := links.get(name)) is None:
            raise InvalidInput(f"this host has no interface {name!r}", hint=hint, field="parent")
        kind = parent.get("linkinfo").get("kind") if parent.get("linkinfo") else None
        if name.startswith(OURS):
            raise InvalidInput(f"{name} is itself part of a network of Innkeeper's", hint=hint, field="parent")
        if kind == "bridge":
            return True
        if parent["ifi_type"] != ETHERNET:
            raise InvalidInput(f"{name} is no Ethernet interface, so it has no place in a bridge", field="parent")
        check_wired(name)
        if parent.get("master"):
            owner = next((link.get("ifname") for link in links.values() if link["index"] == parent.get("master")), "")
            raise InvalidInput(
                f"{name} is in {owner} already", hint=f"if that is a bridge: --parent {owner}", field="parent"
            )
        await _found(netlink, parent)
    return False


def check_wired(name: str, sysfs: Path = SYSFS) -> None:
    """Raise `Unsupported` for a wireless interface."""
    if any((sysfs / name / mark).exists() for mark in ("wireless", "phy80211")):
        raise Unsupported(
            f"{name} is wireless, and a Wi-Fi access point takes frames from one MAC only: guests behind it would get"
            " no answer",
            hint="--mode nat reaches out through it; inn publish lets others in", parent=name,
        )  # fmt: skip


async def ensure(network: Network, record: Path) -> bool:
    """The bridge is there and has taken the interface in. True where something of that was missing. An interface that
    is not there (unplugged) is taken in once it is. Raises `NetworkFailed`, and then the host has it back."""
    assert network.parent
    async with open_netlink() as netlink:
        links = await _links(netlink)
        bridge, parent = links.get(network.bridge), links.get(network.parent)
        is_up = bridge is not None and bridge["flags"] & UP
        joined = parent is None or (bridge is not None and parent.get("master") == bridge["index"])
        if is_up and joined and ((before := _recorded(record)) is None or before["whole"]):
            return False
        try:
            if parent is None:
                await _make(netlink, network.bridge, network.mac)
                return bridge is None
            if (before := _recorded(record)) is None:
                before = await _found(netlink, parent)
                _write(record, before)
            await _take_in(netlink, network, parent, before)
            _write(record, before | {"whole": True})
            return True
        except BaseException:
            with suppress(Exception):  # the first one tells why
                await _give_back(netlink, network, record)
            raise


async def give_back(network: Network, record: Path) -> None:
    """The bridge is gone, and the interface has what the bridge had."""
    async with open_netlink() as netlink:
        await _give_back(netlink, network, record)


# --- the parts ---


async def _make(netlink: Any, name: str, mac: str) -> int:
    """The index of the bridge, up, with the MAC of the interface: DHCP and SLAAC of the host go on as before."""
    if not await netlink.link_lookup(ifname=name):
        await netlink.link("add", ifname=name, kind="bridge", address=mac, br_stp_state=0, br_forward_delay=0)
    (index,) = await netlink.link_lookup(ifname=name)
    await netlink.link("set", index=index, address=mac, state="up")
    return int(index)


async def _take_in(netlink: Any, network: Network, parent: Any, before: Moved) -> None:
    index = await _make(netlink, network.bridge, parent.get("address"))
    await netlink.link("set", index=index, mtu=parent.get("mtu"))
    for name in HOW_IT_LEARNS:
        with suppress(OSError):  # no IPv6 in this kernel
            (IPV6 / network.bridge / name).write_text((IPV6 / str(network.parent) / name).read_text())
    await _strip(netlink, parent["index"], before)
    await netlink.link("set", index=parent["index"], master=index, state="up")
    await _settle(netlink, index, before, more_flags=NODAD)


async def _give_back(netlink: Any, network: Network, record: Path) -> None:
    links = await _links(netlink)
    bridge, parent, before = links.get(network.bridge), links.get(str(network.parent)), _recorded(record)
    if bridge is not None:
        if before is not None and before["whole"]:  # the host's administrator may have changed it meanwhile
            now = await _found(netlink, bridge, lasting=False)
            labels = {address["address"]: address["label"] for address in before["addresses"]}
            for address in now["addresses"]:
                address |= {"label": labels.get(address["address"])}
                address |= {"flags": _flags(before, address["address"])}
            before = now
            _write(record, before)
        await netlink.link("del", index=bridge["index"])
    if before is not None and parent is not None:
        await netlink.link("set", index=parent["index"], master=0)
        await _settle(netlink, parent["index"], before)
    record.unlink(missing_ok=True)


def _flags(before: Moved, address: str) -> int:
    return next((int(each["flags"]) for each in before["addresses"] if each["address"] == address), 0)


async def _found(netlink: Any, link: Any, *, lasting: bool = True) -> Moved:
    """What the host has on an interface and would lose with it. Raises `Unsupported` with `lasting` where that has an
    owner who would not know where it went."""
    name, addresses, routes = link.get("ifname"), [], []
    async for address in await netlink.get_addr(index=link["index"]):
        if address["scope"] != UNIVERSE:
            continue  # link-local: the kernel makes its own
        if address.get("cacheinfo")["ifa_valid"] != FOR_EVER:
            if address["family"] == 10 or not lasting:
                continue  # the bridge learns it from the router, as the interface did
            raise Unsupported(
                f"{name} has {address.get('address')} from DHCP, whose client would go on to renew it on {name}",
                hint=f"make a bridge with {name} in it in the host's own configuration, and give that as --parent",
                parent=name,
            )  # fmt: skip
        addresses.append(
            {
                "address": address.get("address"), "local": address.get("local"), "prefixlen": address["prefixlen"],
                "broadcast": address.get("broadcast"), "label": address.get("label"),
                "flags": address.get("flags") & KEPT_FLAGS,
            }
        )  # fmt: skip
    for family in (2, 10):
        async for route in await netlink.get_routes(family=family):
            hops = [hop["oif"] for hop in route.get("multipath") or ()]
            if link["index"] in hops and lasting:
                raise Unsupported(f"a route of this host has several ways, of which {name} is one", parent=name)
            if route.get("oif") == link["index"] and _is_the_hosts(route):
                routes.append(_route(route))
    return {"boot": boot_id(), "whole": False, "addresses": addresses, "routes": routes}


def _is_the_hosts(route: Any) -> bool:
    link_local = str(route.get("dst")).startswith("fe80:")
    return (
        route["type"] == UNICAST
        and route.get("table") != LOCAL_TABLE
        and route["proto"] != FROM_ADVERTISEMENT
        and not link_local
    )


def _route(route: Any) -> Moved:
    default = "0.0.0.0/0" if route["family"] == 2 else "::/0"
    dst = f"{route.get('dst')}/{route['dst_len']}" if route.get("dst") else default
    fields = {"family": route["family"], "dst": dst, "proto": route["proto"], "table": route.get("table")}
    fields |= {"tos": route["tos"]} if route["tos"] else {}
    fields |= {"scope": route["scope"]} if route["family"] == 2 else {}
    fields |= {"flags": route["flags"] & 0x4} if route["flags"] & 0x4 else {}  # RTNH_F_ONLINK
    for name in ("gateway", "priority", "prefsrc"):
        if route.get(name) is not None:
            fields[name] = route.get(name)
    if metrics := route.get("metrics"):
        fields["metrics"] = {name.removeprefix("RTAX_").lower(): value for name, value in metrics["attrs"]}
    return fields


async def _strip(netlink: Any, index: int, before: Moved) -> None:
    """The interface without its addresses and routes. With the addresses the kernel takes most of the routes away."""
    for route in before["routes"]:
        await _unless(("No such process",), netlink.route("del", **route, oif=index))
    for address in before["addresses"]:
        gone = netlink.addr("del", index=index, address=address["address"], prefixlen=address["prefixlen"])
        await _unless(("Cannot assign",), gone)


async def _settle(netlink: Any, index: int, what: Moved, more_flags: int = 0) -> None:
    """Addresses, then the routes that need them."""
    for address in what["addresses"]:
        fields = {key: value for key, value in address.items() if value is not None and key not in ("flags", "label")}
        if address["label"] and not more_flags:
            fields["label"] = address["label"]
        flags = address["flags"] | (more_flags if ":" in address["address"] else 0)
        await netlink.addr("replace", index=index, **fields, **({"flags": flags} if flags else {}))
    for route in sorted(what["routes"], key=lambda route: "gateway" in route):
        await netlink.route("replace", **route, oif=index)


async def _unless(words: tuple[str, ...], change: Any) -> None:
    from pyroute2.netlink.exceptions import NetlinkError

    try:
        await change
    except NetlinkError as error:
        if not any(word in str(error) for word in words):
            raise


async def _links(netlink: Any) -> dict[str, Any]:
    return {link.get("ifname"): link async for link in await netlink.get_links()}


def _recorded(record: Path) -> Moved | None:
    try:
        found: Moved = json.loads(record.read_text())
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise NetworkFailed(f"{record} cannot be read: {error}") from None
    return found if found["boot"] == boot_id() else None


def _write(record: Path, what: Moved) -> None:
    record.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
    staged = record.with_name(f"{record.name}.new")
    staged.write_text(json.dumps(what))
    staged.replace(record)
