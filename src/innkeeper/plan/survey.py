"""What a host's network is like at one moment, as values: what the doctor judges (plan/doctor.py).

`network/survey.py` fills `Survey` in; `Ours` is what Innkeeper knows of its own networks. MTUs are bytes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from innkeeper.plan.network import Network, Nic


@dataclass(frozen=True)
class Link:
    """A network device of the host. `kind` as `ip -d link` names it: bridge, tun, wireguard; empty for hardware."""

    name: str
    kind: str = ""
    up: bool = True
    mtu: int = 1500
    mac: str = ""
    master: str | None = None
    wireless: bool = False
    addresses: tuple[str, ...] = ()


@dataclass(frozen=True)
class Route:
    """A route of the main table: `to` is a prefix, 0.0.0.0/0 or ::/0 for the default one."""

    to: str
    device: str
    gateway: str | None = None
    metric: int = 0


@dataclass(frozen=True)
class Survey:
    """The host, without what is ours of its firewall."""

    links: Mapping[str, Link] = field(default_factory=dict)
    routes: tuple[Route, ...] = ()
    sysctls: Mapping[str, str] = field(default_factory=dict)
    """By path below /proc/sys/net, where this kernel has it."""
    rules: tuple[Mapping[str, Any], ...] = ()
    """Other programs' nftables, iptables-nft's among them, as `nft -j list` says them."""
    lines: Mapping[tuple[str, str, int], str] = field(default_factory=dict)
    """Those rules as nft writes them, by family, table and handle."""
    nameservers: tuple[str, ...] = ()
    silent: frozenset[str] = frozenset()
    """Nameservers on this host's own loopback where nobody listens."""
    learned: tuple[tuple[str, str, str], ...] = ()
    """(bridge, port, MAC) of whom our bridges have heard."""
    holders: Mapping[tuple[str, int], str] = field(default_factory=dict)
    """Other programs that listen on published ports, by protocol and port."""
    connections: tuple[int, int] = (0, 0)
    """That the kernel keeps track of, and how many it can."""

    def uplinks(self, default: str = "0.0.0.0/0") -> list[str]:
        """Devices of the default routes, the one that is taken first."""
        ways = sorted((route for route in self.routes if route.to == default), key=lambda route: route.metric)
        return list(dict.fromkeys(route.device for route in ways))


@dataclass(frozen=True)
class Ours:
    """All networks and cards of this daemon, and in which state the host's part of them is."""

    networks: tuple[Network, ...] = ()
    nics: tuple[Nic, ...] = ()
    taken: Mapping[str, int] = field(default_factory=dict)
    """Addresses that are given out, by network id."""
    rules_whole: bool = True
    without_resolver: frozenset[str] = frozenset()
    """Ids of networks whose dnsmasq does not run."""
