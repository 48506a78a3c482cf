"""Networks and the addresses in them as documents, and the way from those to the host (network/fabric.py).

`network/<id>` is a network, `address/<network id>/<address>` says whose NIC has an address: {id, name, nic} of its VM.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from time import monotonic

import structlog

from innkeeper.base.errors import ActionRefused, AddressTaken, InnkeeperError, InvalidInput
from innkeeper.network import macvtap, passt
from innkeeper.operations.world import World
from innkeeper.plan.devices import of_qemu
from innkeeper.plan.network import (
    TAP,
    Network,
    Nic,
    check_address,
    free_address,
    network_of,
    nics_of,
    place_of,
    tap_name,
)
from innkeeper.plan.options import Macvtap, Passt, Tap
from innkeeper.plan.rebirth import NAT, Place
from innkeeper.qemu import cgroup
from innkeeper.spec.vm import VMSpec
from innkeeper.store.contract import Value

log = structlog.get_logger()

LOOK_EVERY, COUNT_EVERY, RULES_EVERY = 1.0, 30.0, 600.0
"""Seconds between two looks at the host without any news from its kernel; at the counters, and at the rules, which take
longer."""
SETTLE = 0.2
"""Seconds for which news may go on to arrive."""


async def networks(world: World) -> dict[str, Network]:
    """All networks that are there to stay, by name."""
    documents = [document.value for document in await world.store.list("network/")]
    return {value["name"]: network_of(value) for value in documents if value["state"] != "deleting"}


async def nics(world: World, vm: Value, known: dict[str, Network] | None = None) -> tuple[Nic, ...]:
    """The NICs of a VM that are in networks."""
    if not any(nic.get("network") for nic in vm["spec"]["nics"]):
        return ()
    addresses = {
        (document.key.split("/")[1], document.value["nic"]): document.key.split("/")[2]
        for document in await world.store.list("address/")
        if document.value["id"] == vm["id"]
    }
    return nics_of(vm, known or await networks(world), addresses)


async def places(world: World, vm: Value) -> dict[str, Place]:
    """What DHCP says to its cards in networks and behind QEMU's NAT, by MAC."""
    known = await networks(world)
    by_id = {network.id: network for network in known.values()}
    inside = {nic.mac: place_of(by_id[nic.network], nic) for nic in await nics(world, vm, known) if nic.address}
    return dict.fromkeys(behind_nat(vm), NAT) | inside


def behind_nat(vm: Value) -> list[str]:
    """The MAC addresses of its cards that have QEMU's own NAT."""
    nics = VMSpec.model_validate(vm["spec"]).nics
    return [mac for nic, mac in zip(nics, vm["identity"]["macs"], strict=True) if of_qemu(nic)]


async def reachable(world: World, vm: Value) -> str | None:
    """The address of the first card that the host itself reaches; to an internal network it has no way."""
    known = await networks(world)
    open_to_host = {network.id for network in known.values() if network.mode != "internal"}
    cards = [nic for nic in await nics(world, vm, known) if nic.network in open_to_host]
    found = (nic.address or world.outer_addresses.get((vm["id"], nic.index)) for nic in cards)
    return next(filter(None, found), None)


async def cards(world: World, prefix: str = "address/") -> list[Value]:
    """{id, name, nic, network, address} of all cards in networks: `id` and `name` of the VM, `network` an id. The
    address is None where the network outside gives it, and nobody has told it yet."""
    found = []
    for document in await world.store.list(prefix):
        _, network, key = document.key.split("/")
        who = document.value
        address = world.outer_addresses.get((who["id"], who["nic"])) if key.startswith(TAP) else key
        found.append(who | {"network": network, "address": address})
    return found


async def claim_addresses(world: World, spec: VMSpec, owner: Value) -> dict[str, Value]:
    """The address documents that a VM with this spec needs; those that it has already stay. Raises `NotFound`,
    `InvalidInput`, `AddressTaken`, `Unsupported` where a network is full."""
    claims: dict[str, Value] = {}
    for index, nic in enumerate(spec.nics):
        if nic.network is None:
            continue
        document = await world.find("network", nic.network)
        network, prefix = network_of(document), f"address/{document['id']}/"
        if nic.publish and network.mode != "nat":
            raise InvalidInput(
                f"ports are published out of nat networks, and {network.name} is {network.mode}",
                hint="bridged: others reach the guest's own address; host-only: the host does",
                field=f"spec.nics.{index}.publish",
            )
        held = {found.key.removeprefix(prefix): found.value for found in await world.store.list(prefix)}
        mine = next((at for at, who in held.items() if (who["id"], who["nic"]) == (owner["id"], index)), None)
        taken = held.keys() | {key.removeprefix(prefix) for key in claims}
        if nic.mac:
            await _check_mac(world, network, nic.mac, held, owner)
        if nic.address:
            check_address(network, nic.address)
            if nic.address in taken and nic.address != mine:
                holder = held.get(nic.address, owner)["name"]
                raise AddressTaken(
                    f"{nic.address} in network {network.name} is the address of {holder}",
                    hint=f"choose another, or leave it out; inn network info {network.name}", holder=holder,
                )  # fmt: skip
        if network.subnet:
            claims[prefix + (nic.address or mine or free_address(network, taken))] = owner | {"nic": index}
        else:  # its address is the outer network's to say: this only says who is in it
            claims[prefix + tap_name(owner["id"], index)] = owner | {"nic": index}
    return claims


async def _check_mac(world: World, network: Network, mac: str, held: Mapping[str, Value], owner: Value) -> None:
    """Nobody else has it in the network."""
    cards: dict[str, set[int]] = {}
    for who in held.values():
        cards.setdefault(who["id"], set()).add(who["nic"])
    cards.pop(owner["id"], None)
    for vm in [vm for vm in await world.vms() if vm["id"] in cards]:
        macs = vm["identity"]["macs"]
        if any(index < len(macs) and macs[index] == mac for index in cards[vm["id"]]):
            raise AddressTaken(
                f"{mac} in network {network.name} is the MAC address of {vm['name']}",
                hint="leave it out: one is made from the VM's id", holder=vm["name"],
            )  # fmt: skip


async def claim_checks(world: World, claims: Iterable[str]) -> dict[str, int]:
    """The revisions to claim these keys with: none of them exists, and the networks of the addresses among them are as
    they are now, so that nobody joins one that is being deleted. Raises `ActionRefused`."""
    checks = dict.fromkeys(claims, 0)
    for key in {f"network/{key.split('/')[1]}" for key in checks if key.startswith("address/")}:
        document = await world.store.get(key)
        if document is None or document.value["state"] != "active":
            state = f"{document.value['name']} is {document.value['state']}" if document else "is gone"
            raise ActionRefused(f"the network {state}", hint="inn network ls")
        checks[key] = document.revision
    return checks


async def follow(world: World, vm_id: str) -> None:
    """Have the host know what the documents say of a VM's NICs: nothing, once it is gone."""
    if not world.fabric.has_networks:
        return
    document = await world.store.get(f"vm/{vm_id}")
    await world.fabric.set_vm(vm_id, await nics(world, document.value) if document else ())


async def follow_rules_about(world: World, network: str) -> None:
    """Have the host know where a network is, or that it is gone, for the VMs whose rules name it."""
    for vm in await world.vms():
        rules = (vm["spec"].get("firewall") or {}).get("rules") or ()
        if any(rule["peer"] == f"network:{network}" for rule in rules):
            await follow(world, vm["id"])


@asynccontextmanager
async def plugged_in(world: World, vm: Value, taps: Sequence[Tap]) -> AsyncIterator[list[int]]:
    """Descriptors of the taps of a VM that is about to start, with its rules in force before its first packet."""
    if not taps:
        yield []
        return
    await follow(world, vm["id"])
    opened = await open_taps(world, vm["id"], taps)
    try:
        yield opened
        await confine(world, vm["id"], taps)
    except BaseException:
        await asyncio.shield(macvtap.leave_only(vm["id"], (), world.home.networks))
        raise
    finally:
        for fd in opened:
            os.close(fd)


async def confine(world: World, vm_id: str, taps: Iterable[Tap]) -> None:
    """What serves a card is in its VM's cgroup, once that is there."""
    if any(isinstance(tap, Passt) for tap in taps):
        for pid in await asyncio.to_thread(lambda: list(passt.processes(vm_id, world.home.data))):
            if unconfined := await cgroup.place(world.home, vm_id, pid):
                log.warning("a passt is not in the cgroup of its VM", vm=vm_id, reason=unconfined)


async def open_taps(world: World, vm_id: str, taps: Sequence[Tap]) -> list[int]:
    """Descriptors of taps in networks and of macvtaps, in this order. The caller's to close once QEMU has them."""
    in_networks = [tap.name for tap in taps if not isinstance(tap, Macvtap | Passt)]
    opened: dict[str, int] = {}
    try:
        if in_networks:
            opened |= zip(in_networks, await world.fabric.open_taps(vm_id, in_networks), strict=True)
        for tap in taps:
            if isinstance(tap, Macvtap):
                opened[tap.name] = await macvtap.open_macvtap(tap, world.home.networks)
            if isinstance(tap, Passt):
                opened[tap.name] = await passt.open_passt(tap, vm_id, world.home.data)
    except BaseException:
        for fd in opened.values():
            os.close(fd)
        made = [tap.name for tap in taps if isinstance(tap, Macvtap)]
        await asyncio.shield(macvtap.remove(made, world.home.networks))
        raise
    return [opened[tap.name] for tap in taps]


async def begin(world: World) -> None:
    """After a start of the daemon: the host has what the documents say. It starts also where that fails."""
    if known := await networks(world):
        await world.fabric.begin(known.values(), {vm["id"]: await nics(world, vm, known) for vm in await world.vms()})


async def keep(world: World) -> None:
    """Runs for as long as the daemon does: what somebody takes away from the networks is put back."""
    counted = looked = monotonic()
    watch = world.fabric.watch
    while True:
        with suppress(TimeoutError):
            async with asyncio.timeout(LOOK_EVERY):
                await watch.news.wait()
        if watch.news.is_set():
            await asyncio.sleep(SETTLE)
            watch.news.clear()
        rules = watch.rules or monotonic() - looked > RULES_EVERY
        looked, watch.rules = monotonic() if rules else looked, False
        with suppress(InnkeeperError):  # it is tried again
            if rules or monotonic() - counted > COUNT_EVERY:
                counted = monotonic()
                await world.fabric.count()
            if macvtap.any_there(world.home.networks):
                world.fabric.watch.begin()
            healed = await macvtap.heal(world.home.networks) if rules else []
            for text in [*healed, *await world.fabric.heal(look_at_rules=rules)]:
                await world.events.append("network.healed", text, level="warning")
