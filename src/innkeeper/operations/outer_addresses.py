"""The addresses of guests in bridged networks and on interfaces of the host: the network outside gives them. The
guests' agents tell them; of one without an agent, the host's own table of neighbours does, once the two have spoken."""

from __future__ import annotations

import asyncio
import ipaddress
from contextlib import suppress
from typing import Any

from innkeeper.base.errors import InnkeeperError
from innkeeper.network import links
from innkeeper.operations.networks import networks, nics
from innkeeper.operations.world import World
from innkeeper.store.contract import Value

LOOK_EVERY = 5.0
"""Seconds."""


async def learn(world: World) -> None:
    """Runs for as long as the daemon does: asks each agent anew, since a lease may change."""
    while True:
        with suppress(InnkeeperError):  # it is tried again
            await look(world)
        await asyncio.sleep(LOOK_EVERY)


async def look(world: World) -> None:
    """Ask the agents of all running guests in bridged networks or on interfaces of the host, else the host's table."""
    known = {name: network for name, network in (await networks(world)).items() if network.mode == "bridged"}
    found: dict[tuple[str, int], str] = {}
    untold: dict[str, tuple[str, int]] = {}
    for vm in await world.vms():
        cards = zip(vm["spec"]["nics"], vm["identity"]["macs"], strict=True)
        macs = {mac: index for index, (nic, mac) in enumerate(cards) if nic.get("parent")}
        if known:
            macs |= {nic.mac: nic.index for nic in await nics(world, vm, known)}
        told = await _told(world, vm) if macs else {}
        found |= {(vm["id"], macs[mac]): at for mac, at in told.items() if mac in macs}
        if macs and world.machines.get(vm["id"]):
            untold |= {mac: (vm["id"], index) for mac, index in macs.items() if mac not in told}
    heard = await links.neighbours() if untold else {}
    found |= {card: heard[mac] for mac, card in untold.items() if mac in heard}
    world.outer_addresses = found


async def _told(world: World, vm: Value) -> dict[str, str]:
    machine = world.machines.get(vm["id"])
    if machine is None or machine.status.state != "running" or not machine.status.agent:
        return {}
    try:
        async with machine.agent() as agent:
            cards = await agent.interfaces()
    except InnkeeperError:
        return {}
    return {card["mac"]: address for card in cards if (address := first_address(card))}


def first_address(card: dict[str, Any]) -> str | None:
    """The IPv4 address of a card as the agent tells it (qemu/agent.py: interfaces), else an IPv6 one that is routed."""
    found = []
    for text in card["addresses"]:
        with suppress(ValueError):  # what a guest says may be anything
            address = ipaddress.ip_interface(text).ip
            if not (address.is_loopback or address.is_link_local or address.is_multicast or address.is_unspecified):
                found.append(address)
    return str(min(found, key=lambda address: address.version)) if found else None
