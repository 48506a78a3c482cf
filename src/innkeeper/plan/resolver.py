"""The files of a network's dnsmasq (dnsmasq(8)): DHCP by MAC, router advertisements, and names of guests."""

from __future__ import annotations

from collections.abc import Iterable

from innkeeper.plan.network import METADATA, Network, Nic

CONFIG, HOSTS, LEASES = "dnsmasq.conf", "hosts", "leases/leases"
DHCP_HOSTS = "dhcp-hosts"
ASKS = "metadata"
"""dnsmasq's tag of cards that may ask the metadata service, and need a route to it where there is no other."""


def config(network: Network, folder: str, user: str) -> str:
    """dnsmasq.conf. Addresses go only to cards that are known; names that clients give themselves count for nothing."""
    assert network.subnet
    lines = [
        f"interface={network.bridge}",
        "except-interface=lo",
        "bind-dynamic",
        f"user={user}",
        "group=nogroup",
        "pid-file=",
        "log-facility=-",
        "no-hosts",
        "domain-needed",
        "bogus-priv",
        f"domain={network.domain}",
        f"local=/{network.domain}/",
        f"addn-hosts={folder}/{HOSTS}",
        f"dhcp-hostsfile={folder}/{DHCP_HOSTS}",
        f"dhcp-leasefile={folder}/{LEASES}",
        f"dhcp-range={network.subnet.network_address},static,{network.subnet.netmask},12h",
        "dhcp-authoritative",
        "dhcp-ignore-names",
        "no-ping",
    ]
    if network.mode != "nat":
        lines += ["no-resolv", "dhcp-option=option:router"]  # nobody to ask, and no way out
        lines.append(f"dhcp-option-force=tag:{ASKS},option:classless-static-route,{METADATA}/32,{network.gateway}")
    if network.mtu:  # advertisements say that of the bridge by themselves
        lines.append(f"dhcp-option=option:mtu,{network.mtu}")
    if network.prefix:
        lines += [f"dhcp-range={network.prefix.network_address},ra-stateless,64,12h", "enable-ra"]
        if network.mode != "nat":
            lines.append(f"ra-param={network.bridge},0,0")
    return "\n".join(lines) + "\n"


def hosts(network: Network, nics: Iterable[Nic]) -> str:
    """Names and addresses, as hosts(5)."""
    lines = []
    for nic in nics:
        for address in filter(None, (nic.address, nic.address6)):
            lines += [f"{address} {nic.name}.{network.domain} {nic.name}"]
    return "".join(f"{line}\n" for line in lines)


def dhcp_hosts(network: Network, nics: Iterable[Nic]) -> str:
    """MAC and address, one card per line; a tag only where an option asks for it (`has_tags`)."""
    tag = f"set:{ASKS}," if network.mode != "nat" else ""
    return "".join(f"{nic.mac},{tag * nic.metadata}{nic.address}\n" for nic in nics)


def has_tags(dhcp_hosts: str) -> bool:
    """Whether a dnsmasq that has read these may not be told to read them again: before 2.91 it then frees what it had
    linked to a tag while it answered that card, and dies."""
    return "set:" in dhcp_hosts


def leases(text: str) -> dict[str, str]:
    """MAC → IPv4 address of what dnsmasq has given out: its file has `expiry mac address name client-id` in each line,
    and IPv6 after a line `duid …`."""
    found = {}
    for line in text.splitlines():
        words = line.split()
        if words[:1] == ["duid"]:
            break
        if len(words) >= 3:
            found[words[1].lower()] = words[2]
    return found
