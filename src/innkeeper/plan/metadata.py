"""What a guest can read of itself at 169.254.169.254, in the paths that EC2 has made customary."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from innkeeper.plan.network import Network, Nic

VERSIONS = ("2009-04-04", "2016-09-02", "2018-09-24", "2021-03-23", "latest")
"""Those that cloud-init asks for. All have the same answers."""
REGION, ZONE = "innkeeper", "innkeepera"
"""Clients want some; they say nothing about the host."""


def tree(vm: Mapping[str, Any], first_boot: Mapping[str, Any], cards: Sequence[tuple[Nic, Network]]) -> dict[str, str]:
    """Paths below a version → text. `cards` are the VM's in networks, at least one; `first_boot` its secret part."""
    (nic, network), instance = cards[0], f"i-{vm['id']}"
    image = (vm["image"] or {}).get("name", "")
    found = {
        "meta-data/ami-id": image,
        "meta-data/instance-id": instance,
        "meta-data/local-hostname": vm["name"],
        "meta-data/hostname": f"{vm['name']}.{network.domain}",
        "meta-data/local-ipv4": nic.address,
        "meta-data/mac": nic.mac,
        "meta-data/placement/availability-zone": ZONE,
        "meta-data/placement/region": REGION,
        "dynamic/instance-identity/document": json.dumps(
            {
                "availabilityZone": ZONE, "imageId": image, "instanceId": instance, "pendingTime": vm["created"],
                "privateIp": nic.address, "region": REGION, "version": "2017-09-30",
            },
            indent=1,
        ),
    }  # fmt: skip
    if nic.address6:
        found["meta-data/ipv6"] = nic.address6
    for card, its in cards:
        at = f"meta-data/network/interfaces/macs/{card.mac}/"
        found |= {
            at + "device-number": str(card.index),
            at + "local-hostname": f"{vm['name']}.{its.domain}",
            at + "local-ipv4s": card.address,
            at + "mac": card.mac,
            at + "subnet-ipv4-cidr-block": str(its.subnet),
        }
        if card.address6:
            found |= {at + "ipv6s": card.address6, at + "subnet-ipv6-cidr-blocks": str(its.prefix)}
    keys = first_boot["ssh_keys"]
    for index, key in enumerate(keys):
        found[f"meta-data/public-keys/{index}/openssh-key"] = key
    if keys:
        found["meta-data/public-keys/"] = "\n".join(f"{index}={_comment(key)}" for index, key in enumerate(keys))
    if first_boot["user_data"] is not None:
        found["user-data"] = first_boot["user_data"]
    return found


def look_up(found: Mapping[str, str], path: str) -> str | None:
    """The text at a path, or a list of what is below it, one per line; None where there is nothing."""
    if path == "/":
        return "\n".join(VERSIONS)
    version, _, rest = path.removeprefix("/").partition("/")
    if not path.startswith("/") or version not in VERSIONS:
        return None
    if rest in found:
        return found[rest]
    folder = f"{rest.removesuffix('/')}/" if rest else ""
    if folder in found:
        return found[folder]
    below = {key.removeprefix(folder).partition("/") for key in found if key.startswith(folder)}
    return "\n".join(sorted({name + slash for name, slash, _ in below})) or None


def _comment(key: str) -> str:
    return (key.split(None, 2)[2:] or ["key"])[0]
