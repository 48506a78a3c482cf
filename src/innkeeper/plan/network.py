"""A network as it will be on the host: names, addresses, and who has which. Everything follows from its document.

Names on the host, which have at most 15 characters: `innbr-<9 digits>` is the bridge of the network whose id begins so,
`innlan-<8 digits>` that of a bridged one which stands on an interface,
`inn-<9 digits>-<n>` the tap of NIC n of the VM whose id begins so, `innm-<8 digits>-<n>` its macvtap. Nothing else of
ours bears such a name, and nothing that does is anybody else's.
"""

from __future__ import annotations

import hashlib
import ipaddress
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from innkeeper.base.errors import InvalidInput, Unsupported
from innkeeper.plan.filter import Filter, filter_of
from innkeeper.plan.rebirth import Place
from innkeeper.spec.firewall import FirewallSpec
from innkeeper.spec.network import Mode, NetworkSpec
from innkeeper.spec.nic import PortForward

Subnet = ipaddress.IPv4Network
BRIDGE, UPLINK, TAP, MACVTAP = "innbr-", "innlan-", "inn-", "innm-"
OURS = (BRIDGE, UPLINK, TAP, MACVTAP)
METADATA, METADATA_PORT = "169.254.169.254", 16925
"""Where guests ask for their data (port 80), and the TCP port of each gateway that such a question is led to."""
SUBNETS = tuple(ipaddress.IPv4Network("10.77.0.0/16").subnets(new_prefix=24))
"""What is tried in turn for a network that asks for no subnet."""


@dataclass(frozen=True)
class Network:
    """One network. `gateway` is the host's own address in it, and the DNS server that guests are told.

    A bridged one has no addresses of ours: no subnet, prefix or gateway. Its `parent` is an interface, which a bridge
    of ours takes in, or a bridge of somebody else's, `onto_bridge`.
    """

    id: str
    name: str
    mode: Mode
    subnet: Subnet | None
    prefix: ipaddress.IPv6Network | None
    domain: str
    parent: str | None = None
    onto_bridge: bool = False
    mtu: int | None = None

    @property
    def bridge(self) -> str:
        """What guests are plugged into."""
        if self.parent is not None:
            return self.parent if self.onto_bridge else UPLINK + self.id[:8]
        return BRIDGE + self.id[:9]

    @property
    def mac(self) -> str:
        """Of the bridge: its own, so that it does not change with the taps that come and go."""
        return "52:54:00:" + ":".join(self.id[at : at + 2] for at in (0, 2, 4))

    @property
    def gateway(self) -> str | None:
        return str(self.subnet[1]) if self.subnet else None

    @property
    def gateway6(self) -> str | None:
        return str(self.prefix[1]) if self.prefix else None


@dataclass(frozen=True)
class Nic:
    """A VM's card in a network: all that the firewall, DHCP and DNS know of it. In a bridged one its address is not
    ours to say."""

    vm: str
    name: str
    index: int
    network: str
    mac: str
    address: str | None
    address6: str | None
    publish: tuple[PortForward, ...] = ()
    metadata: bool = False
    tags: tuple[str, ...] = ()
    filter: Filter | None = None
    limit: int | None = None
    """Bits per second in each direction."""

    @property
    def bridge(self) -> str:
        return BRIDGE + self.network[:9]

    @property
    def tap(self) -> str:
        return tap_name(self.vm, self.index)

    @cached_property
    def addresses(self) -> tuple[str, ...]:
        """All that it may send from, as far as that is ours to say."""
        return tuple(filter(None, (self.address, self.address6, self.address and self.link_local)))

    @cached_property
    def link_local(self) -> str:
        return str(by_mac(ipaddress.IPv6Network("fe80::/64"), self.mac))


def tap_name(vm: str, index: int) -> str:
    """The tap of a VM's NIC."""
    return f"{TAP}{vm[:9]}-{index}"


def macvtap_name(vm: str, index: int) -> str:
    """The macvtap of a VM's NIC."""
    return f"{MACVTAP}{vm[:8]}-{index}"


def network_record(
    network_id: str, spec: NetworkSpec, subnet: Subnet | None, stamp: str, *, onto_bridge: bool = False
) -> dict[str, Any]:
    """The document of a new network; `subnet` is None for a bridged one."""
    ula = hashlib.sha256(f"innkeeper/ula/{network_id}".encode()).digest()[:5]
    prefix = ipaddress.IPv6Network((b"\xfd" + ula + bytes(10), 64)) if spec.ipv6 == "auto" and subnet else None
    return {
        "id": network_id, "name": spec.name, "mode": spec.mode, "subnet": str(subnet) if subnet else None,
        "prefix": str(prefix) if prefix else None, "domain": spec.dns_domain, "note": spec.note, "created": stamp,
        "parent": spec.parent, "onto_bridge": onto_bridge, "mtu": spec.mtu,
        "state": "creating", "operation": None,
    }  # fmt: skip


def network_of(document: Mapping[str, Any]) -> Network:
    """The document as a value."""
    prefix = ipaddress.IPv6Network(document["prefix"]) if document["prefix"] else None
    subnet = Subnet(document["subnet"]) if document["subnet"] else None
    return Network(
        document["id"], document["name"], document["mode"], subnet, prefix, document["domain"],
        document.get("parent"), document.get("onto_bridge", False), document.get("mtu"),
    )  # fmt: skip


def by_mac(prefix: ipaddress.IPv6Network, mac: str) -> ipaddress.IPv6Address:
    """The address that a card gives itself in a /64: modified EUI-64 (RFC 4291, appendix A)."""
    octets = bytes.fromhex(mac.replace(":", ""))
    return prefix[int.from_bytes(bytes([octets[0] ^ 2]) + octets[1:3] + b"\xff\xfe" + octets[3:], "big")]


def nics_of(
    vm: Mapping[str, Any], networks: Mapping[str, Network], addresses: Mapping[tuple[str, int], str]
) -> tuple[Nic, ...]:
    """The cards of a VM that are in networks. `networks` by name; `addresses` by network id and NIC index."""
    found = []
    rules, tags = FirewallSpec.model_validate(vm["spec"].get("firewall") or {}), tuple(vm["spec"].get("tags") or ())
    for index, (spec, mac) in enumerate(zip(vm["spec"]["nics"], vm["identity"]["macs"], strict=True)):
        network = networks.get(spec.get("network") or "")
        if network is None or (address := addresses.get((network.id, index))) is None:
            continue
        address6 = str(by_mac(network.prefix, mac)) if network.prefix else None
        if network.subnet is None:
            address = None
        publish = tuple(PortForward.model_validate({**forward, "note": ""}) for forward in spec["publish"])
        metadata = bool(vm["spec"].get("metadata") and network.subnet)
        judged = filter_of(rules, network, networks)
        found.append(
            Nic(
                vm["id"],
                vm["name"],
                index,
                network.id,
                mac,
                address,
                address6,
                publish,
                metadata,
                tags,
                judged,
                spec.get("limit"),
            )
        )
    return tuple(found)


def place_of(network: Network, nic: Nic) -> Place:
    """What DHCP would tell the card; in a network that has DHCP of ours."""
    assert network.subnet and network.gateway
    address = ipaddress.IPv4Interface(f"{nic.address}/{network.subnet.prefixlen}")
    gateway = ipaddress.IPv4Address(network.gateway)
    if network.mode == "nat":
        return Place(address, gateway, gateway, network.domain, network.mtu)
    routes = ((ipaddress.IPv4Address(METADATA), gateway),) if nic.metadata else ()
    return Place(address, None, gateway, network.domain, network.mtu, routes)


def free_address(network: Network, taken: Collection[str]) -> str:
    """The lowest address that nobody has. Raises `Unsupported` where there is none."""
    assert network.subnet
    for host in range(2, network.subnet.num_addresses - 1):
        if (address := str(network.subnet[host])) not in taken:
            return address
    raise Unsupported(
        f"network {network.name} has no address left: {network.subnet} has room for {network.subnet.num_addresses - 3}",
        hint="remove VMs that nobody needs, or make a network with a larger --subnet", subnet=str(network.subnet),
    )  # fmt: skip


def check_address(network: Network, address: str) -> None:
    """Raise `InvalidInput` for one that no card of the network can have."""
    if network.subnet is None:
        raise InvalidInput(f"addresses in {network.name} are the outer network's to give", field="address")
    wanted, others = ipaddress.IPv4Address(address), (network.subnet[0], network.subnet[1], network.subnet[-1])
    if wanted not in network.subnet or wanted in others:
        raise InvalidInput(
            f"{address} is no address for a card in network {network.name}",
            hint=f"choose one from {network.subnet[2]} to {network.subnet[-2]}, or leave it out", field="address",
        )  # fmt: skip


def free_subnet(taken: Iterable[Subnet]) -> Subnet:
    """The first of `SUBNETS` that overlaps none. Raises `Unsupported`."""
    others = list(taken)
    for subnet in SUBNETS:
        if not any(subnet.overlaps(other) for other in others):
            return subnet
    raise Unsupported("no subnet of 10.77.0.0/16 is free", hint="choose one with --subnet")


def check_subnet(wanted: Subnet, networks: Iterable[Network], routes: Mapping[Subnet, str]) -> None:
    """Raise `InvalidInput` where it overlaps another network of ours, or a route of the host (by its device)."""
    for network in networks:
        if network.subnet and wanted.overlaps(network.subnet):
            raise InvalidInput(
                f"subnet {wanted} overlaps {network.subnet} of network {network.name}",
                hint="leave --subnet out: a free one is found", field="subnet",
            )  # fmt: skip
    for route, device in routes.items():
        if route.prefixlen and wanted.overlaps(route):
            raise InvalidInput(
                f"subnet {wanted} overlaps {route}, which this host reaches through {device}",
                hint="leave --subnet out: a free one is found", field="subnet",
            )  # fmt: skip
