"""All networks of this host: what should be there, and bringing the host to that.

`Fabric` knows the networks and the NICs in them as values. Every change goes through it, one at a time, and may be
asked for twice; `heal` looks whether the host still has it all, and puts back what is missing.
"""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import Collection, Iterable, Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from innkeeper.base.errors import NetworkFailed, NotFound, Unsupported
from innkeeper.network import firewall, forwarding, links, uplink
from innkeeper.network.listener import Answer, Listener
from innkeeper.network.resolver import Resolver
from innkeeper.network.traffic import Traffic
from innkeeper.network.watch import Watch
from innkeeper.plan import filter, ruleset
from innkeeper.plan.denials import Attempt, reason
from innkeeper.plan.filter import with_addresses
from innkeeper.plan.network import Network, Nic, Subnet
from innkeeper.plan.nft import Command
from innkeeper.spec.nic import PortForward

OWNER = "\0innkeeper-networks"
"""A name of the network namespace (unix(7)): whoever has it bound manages the networks there."""


class Fabric:
    """The networks of one daemon. Nothing of the host is touched as long as there is none."""

    def __init__(self, folder: Path, home: Path) -> None:
        self._folder, self._home = folder, home
        self._networks: dict[str, Network] = {}
        self._nics: dict[str, tuple[Nic, ...]] = {}
        self._ruled: dict[str, tuple[Nic, ...]] = {}
        self._tagged: dict[str, frozenset[str]] = {}
        """What the firewall has: the same, their rules with addresses instead of VMs, and who has the tags in them."""
        self._resolvers: dict[str, Resolver] = {}
        self._lock = asyncio.Lock()
        self._owner: socket.socket | None = None
        self.watch = Watch(firewall.is_own)
        self.metadata: Answer | None = None
        """What answers a guest that asks for its data; nothing listens without."""
        self._listeners: dict[str, Listener] = {}
        self.traffic = Traffic()

    @property
    def has_networks(self) -> bool:
        return bool(self._networks)

    async def begin(self, networks: Iterable[Network], nics: Mapping[str, tuple[Nic, ...]]) -> None:
        """Make all of it be there, after a start of the daemon or of the host."""
        async with self._lock:
            self._own()
            self._networks = {network.id: network for network in networks}
            self._nics = {vm: cards for vm, cards in nics.items() if cards}
            names = {network.bridge for network in self._networks.values()}
            for stray in set(await links.bridges()) - names:
                await links.remove_bridge(stray)
            await firewall.sweep()
            self._ruled, self._tagged = {}, {}
            self._judge(self._nics)
            await firewall.apply(self._rules())
            self.watch.end()  # of so much news of our own some are lost, as if they were somebody else's
            self.watch.begin()
            await self._everything(first=True)

    async def add(self, network: Network) -> None:
        """One more network. Raises `Unsupported`, `ToolMissing`, `NetworkFailed`; `remove` undoes what was done."""
        async with self._lock:
            self._own()
            others = self._networks.keys() - {network.id}
            self._networks[network.id] = network
            await self._apply(ruleset.network_added(network) if others else self._rules())
            await self._everything()

    async def remove(self, network: Network) -> None:
        """The network is gone from the host, and with the last one everything else of ours."""
        async with self._lock:
            self._own()
            known = self._networks.pop(network.id, None)
            if network.subnet:
                await self._resolver(network).end()
                self._resolvers.pop(network.id)
                await self._listen(network)
            if not self._networks:
                await firewall.apply(ruleset.clear())
            elif known:
                await self._apply(ruleset.network_removed(network))
            if network.subnet:
                await links.remove_bridge(network.bridge)
            elif not network.onto_bridge:
                await uplink.give_back(network, self._moved(network))
            if not self._routed():
                forwarding.put_back(self._record)
            if not self._networks:
                self._disown()

    async def set_vm(self, vm: str, nics: tuple[Nic, ...]) -> None:
        """What a VM has of NICs in networks; none for one that is gone. One transaction of its own rules only."""
        async with self._lock:
            before = self._nics.get(vm, ())
            if before == nics:
                return
            self._nics[vm] = nics
            if not nics:
                del self._nics[vm]
            await self._apply(self._judge([vm]))
            was = {nic.tap: nic for nic in before}
            await self._wire(
                [nic for nic in nics if nic.tap in was and _wiring(was[nic.tap]) != _wiring(nic)], limits=True
            )
            for network in {told.network for told in _told(before) ^ _told(nics)}:
                if known := self._networks.get(network):
                    await self._resolver(known).ensure(self._of(network))
                    await self._listen(known)
            await _end_connections(before, nics)

    async def open_taps(self, vm: str, names: Iterable[str]) -> list[int]:
        """Descriptors of new taps, plugged into their bridges. The caller's to close once QEMU has them."""
        async with self._lock:
            nics = {nic.tap: nic for nic in self._nics.get(vm, ())}
            opened: list[int] = []
            try:
                for name in names:
                    if name not in nics:
                        raise NotFound(f"{name} is in no network", hint="inn info shows the VM's NICs")
                    opened.append(links.open_tap(name))
                await self._wire([nics[name] for name in names])
            except BaseException:
                for fd in opened:
                    os.close(fd)
                raise
            return opened

    async def heal(self, *, look_at_rules: bool) -> list[str]:
        """Put back what is missing; what that was, in sentences. The rules take longer to look at than all else."""
        async with self._lock:
            if not self._networks:
                return []
            found = await self._everything()
            if look_at_rules and not await firewall.is_whole(self._rules()):
                await firewall.apply(self._rules())
                found.append("the firewall's tables had been changed by another program: restored")
            return found

    async def condition(self) -> tuple[bool, frozenset[str]]:
        """Whether the rules are as they were made; ids of networks whose dnsmasq does not run. Nothing is put back."""
        async with self._lock:
            with_dhcp = [network for network in self._networks.values() if network.subnet]
            without = {network.id for network in with_dhcp if not self._resolver(network).runs()}
            whole = not self._networks or await firewall.is_whole(self._rules())
            return whole, frozenset(without)

    def leases(self, network: str) -> dict[str, str]:
        """MAC → address of the cards that have asked for one."""
        found = self._resolvers.get(network)
        return found.leases() if found else {}

    async def subnets_of_host(self) -> dict[Subnet, str]:
        """What the host reaches by which device, its bridges of ours left out."""
        ours = {network.bridge for network in self._networks.values()}
        return {subnet: device for subnet, device in (await links.routes()).items() if device not in ours}

    async def dropped(self) -> dict[str, int]:
        """Packets that each tap had no right to send, since the rules were made."""
        return await firewall.dropped()

    async def judged(self, vm: str) -> dict[str, tuple[int, int]]:
        """(packets, bytes) that each rule of a VM and each default has judged, over its cards, since they were made."""
        found: dict[str, tuple[int, int]] = {}
        for nic in self._nics.get(vm, ()):
            for rule, (packets, octets) in (await firewall.counted(nic.tap) if nic.filter else {}).items():
                before = found.get(rule, (0, 0))
                found[rule] = before[0] + packets, before[1] + octets
        return found

    async def denied(self, vm: str) -> list[tuple[Nic, Attempt, int | None, str | None]]:
        """What a VM's rules have kept in or out within a day, the latest first: the card, what it was, the rule that is
        why, None for the default, and the name of the peer, where that is a guest or the host."""
        names = {address: nic.name for nic in self._all_nics() for address in nic.addresses}
        names |= {str(own): "host" for each in self._networks.values() for own in (each.gateway, each.gateway6) if own}
        found = []
        attempts = await firewall.attempts()
        for nic in self._ruled.get(vm, ()):
            for attempt in attempts.get(nic.tap, ()):
                why = reason(nic.filter, self._tagged, attempt) if nic.filter else None
                found.append((nic, attempt, why, names.get(attempt.peer)))
        return sorted(found, key=lambda each: each[1].seconds)

    async def count(self) -> None:
        """Look at the counters of published ports, so that `traffic` knows."""
        if self._networks:
            async with self._lock:
                self.traffic.look(await firewall.published())

    def release(self) -> None:
        """The daemon leaves; the networks stay."""
        for listener in self._listeners.values():
            listener.end()
        self._disown()

    # --- the parts ---

    async def _everything(self, *, first: bool = False) -> list[str]:
        """All but the rules is there; sentences about what was not. `first`: limits that nobody wants any more go."""
        found = []
        for network in self._networks.values():
            if network.onto_bridge:
                continue
            ensured = links.ensure_bridge(network) if network.subnet else uplink.ensure(network, self._moved(network))
            if await ensured:
                found += [f"bridge {network.bridge} of network {network.name} had been removed or changed: restored"]
        lost, unlimited = await self._wire([nic for cards in self._nics.values() for nic in cards], limits=first)
        if lost:
            found.append(f"{lost} NICs had lost their bridge: plugged in again")
        if unlimited:
            found.append(f"{unlimited} NICs had lost their limit: limited again")
        for network in self._networks.values():
            if network.subnet and await self._resolver(network).ensure(self._of(network.id)):
                found += [f"the dnsmasq of network {network.name} had ended: started again"]
        if self._routed() and not forwarding.is_on():
            self._folder.mkdir(mode=0o755, parents=True, exist_ok=True)
            forwarding.switch_on(self._record)
            found.append("forwarding between the host's networks was off: switched on")
        for network in self._networks.values():
            if await self._listen(network):
                found.append(f"the metadata service of network {network.name} was away: listens again")
        return found

    async def _wire(self, nics: Collection[Nic], *, limits: bool = False) -> tuple[int, int]:
        """Their taps, as far as they are there, are plugged into their bridges, with their limits; `limits`: also those
        that have none any more. How many were not; how many had another limit."""
        if not nics:
            return 0, 0
        lost = await links.ensure_attached({nic.tap: self._networks[nic.network].bridge for nic in nics})
        if not limits and not any(nic.limit for nic in nics):
            return len(lost), 0
        return len(lost), len(await links.ensure_limits({nic.tap: nic.limit for nic in nics}))

    async def _listen(self, network: Network) -> bool:
        """The metadata service hears those guests that want it. True where it did not. Raises `NetworkFailed`."""
        if self.metadata and any(nic.metadata for nic in self._of(network.id)):
            if network.id not in self._listeners:
                self._listeners[network.id] = Listener(network, self.metadata)
            return await self._listeners[network.id].ensure(self._of(network.id))
        if listener := self._listeners.pop(network.id, None):
            listener.end()
        return False

    async def _apply(self, commands: list[Command]) -> None:
        """A change of the firewall; all of it anew where somebody has taken away what that builds upon."""
        if not commands:
            return
        try:
            await firewall.apply(commands)
        except NetworkFailed:
            await firewall.apply(self._rules())

    def _rules(self) -> list[Command]:
        return ruleset.everything(self._networks.values(), [nic for cards in self._ruled.values() for nic in cards])

    def _judge(self, vms: Collection[str]) -> list[Command]:
        """From what the firewall has of these VMs to what it should have; and of those whose rules name one of them,
        where its addresses are other ones. With many VMs, looking at all of them takes as long as the change."""
        was = [nic for vm in vms for nic in self._ruled.get(vm, ())]
        will = [nic for vm in vms for nic in self._nics.get(vm, ())]
        touched = set(vms)
        if {(nic.name, nic.addresses) for nic in was} != {(nic.name, nic.addresses) for nic in will}:
            moved = {f"vm:{nic.name}" for nic in (*was, *will)}
            for vm, cards in self._nics.items():
                if any(nic.filter and nic.filter.vms & moved for nic in cards):
                    touched.add(vm)
        judged = [nic.filter for vm in touched for nic in self._nics.get(vm, ()) if nic.filter]
        who = self._addresses(frozenset[str]().union(*(each.vms for each in judged)))
        first, last = self._retag(was, will)
        for vm in touched:
            before, now = self._ruled.get(vm, ()), tuple(with_addresses(nic, who) for nic in self._nics.get(vm, ()))
            first += _difference(before, now) if before != now else []
            self._ruled[vm] = now
            if not now:
                del self._ruled[vm]
        return [*first, *last]

    def _addresses(self, wanted: Collection[str]) -> dict[str, frozenset[str]]:
        """Of VMs that are named `vm:NAME`."""
        found = {name.removeprefix("vm:"): frozenset[str]() for name in wanted}
        for nic in self._all_nics() if found else ():
            if nic.name in found:
                found[nic.name] |= frozenset(nic.addresses)
        return {f"vm:{name}": addresses for name, addresses in found.items()}

    def _retag(self, was: list[Nic], will: list[Nic]) -> tuple[list[Command], list[Command]]:
        """What has to be done to the sets of tags before and after these cards become those."""

        def tags(nics: list[Nic]) -> set[object]:
            return {(nic.tags, nic.addresses if nic.tags else (), nic.filter and nic.filter.tags) for nic in nics}

        if tags(was) == tags(will):
            return [], []
        before, self._tagged = self._tagged, filter.tagged(self._all_nics())
        return filter.tags_changed(before, self._tagged)

    def _all_nics(self) -> list[Nic]:
        return [nic for cards in self._nics.values() for nic in cards]

    def _of(self, network: str) -> list[Nic]:
        return [nic for nic in self._all_nics() if nic.network == network]

    def _resolver(self, network: Network) -> Resolver:
        if network.id not in self._resolvers:
            self._resolvers[network.id] = Resolver(network, self._folder / network.id, self._home)
        return self._resolvers[network.id]

    def _routed(self) -> bool:
        return any(network.mode == "nat" for network in self._networks.values())

    def _moved(self, network: Network) -> Path:
        return self._folder / f"uplink-{network.id}.json"

    @property
    def _record(self) -> Path:
        return self._folder / "forwarding.json"

    def _own(self) -> None:
        if self._owner is not None:
            return
        if os.geteuid() != 0:
            raise Unsupported(
                "networks are made by root, and this daemon runs as a plain user",
                hint="the user-mode NAT of a VM without --network needs no privilege",
            )
        firewall.need("nft", "dnsmasq", "conntrack")
        if not Path("/dev/net/tun").exists():
            raise Unsupported("this kernel has no /dev/net/tun, so a guest cannot be plugged into a network")
        owner = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            owner.bind(OWNER)
        except OSError:
            owner.close()
            raise Unsupported(
                "another innkeeperd manages the networks of this host", hint="use that one, or end it"
            ) from None
        self._owner = owner
        self.watch.begin()

    def _disown(self) -> None:
        if self._owner is not None:
            self._owner.close()
            self._owner = None
            self.watch.end()


def _difference(before: tuple[Nic, ...], after: tuple[Nic, ...]) -> list[Command]:
    """From the rules of these NICs to the rules of those."""
    old, new = {nic.tap: nic for nic in before}, {nic.tap: nic for nic in after}
    commands: list[Command] = []
    for tap in old.keys() - new.keys():
        commands += ruleset.nic_removed(old[tap])
    for tap, nic in new.items():
        if tap not in old:
            commands += ruleset.nic_added(nic)
        elif old[tap] != nic:
            commands += ruleset.nic_changed(old[tap], nic)
    return commands


def _wiring(nic: Nic) -> tuple[str, int | None]:
    return nic.network, nic.limit


def _told(nics: tuple[Nic, ...]) -> set[Nic]:
    """What DHCP, DNS and the metadata service know of these NICs."""
    return {replace(nic, publish=(), tags=(), filter=None, limit=None) for nic in nics if nic.address}


async def _end_connections(before: tuple[Nic, ...], after: tuple[Nic, ...]) -> None:
    """Of ports that are published no more, or elsewhere."""
    for address, forward in _led_in(before) - _led_in(after):
        with suppress(NetworkFailed):
            await firewall.end_connections(forward.protocol, forward.host, address)


def _led_in(nics: Iterable[Nic]) -> set[tuple[str, PortForward]]:
    """(guest's address, what leads there)."""
    return {
        (address, forward)
        for nic in nics
        for version, address in ((4, nic.address), (6, nic.address6))
        for forward in nic.publish
        if address and version in forward.families
    }
