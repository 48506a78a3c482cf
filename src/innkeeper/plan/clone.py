"""What a clone is, as far as it follows from the VM that it is made of: pure functions of documents.

It has the same hardware, machine type and CPU model, since that is what the guest was installed on. What makes it
itself is new, unless its identity is to be kept; see docs/templates.md for who changes what in the guest.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from innkeeper.base.errors import InvalidInput
from innkeeper.plan.identity import Identity
from innkeeper.spec.vm import VMSpec

OF_OTHER_MODES = ("parent", "macvtap_mode", "vlan", "backend")
"""Fields of a card that one in a network has not."""


def clone_spec(vm: Mapping[str, Any], name: str, *, keep_identity: bool, network: str | None = None) -> VMSpec:
    """The spec of a clone of `vm`: no published ports, since a host port leads to one VM; a disc only if the source
    would boot from it, too; its first card in another `network`, if that is named."""
    macs = vm["identity"]["macs"] if keep_identity else [None] * len(vm["spec"]["nics"])
    cards = plugged_into(vm["spec"]["nics"], network)
    nics = [nic | {"publish": [], "address": None, "mac": mac} for nic, mac in zip(cards, macs, strict=True)]
    return VMSpec.model_validate(
        vm["spec"] | {"name": name, "nics": nics, "iso": vm["spec"]["iso"] if vm["disc"] else None}
    )


def plugged_into(nics: Sequence[Mapping[str, Any]], network: str | None) -> list[dict[str, Any]]:
    """The cards with the first one in a network; as they are where none is named. Raises `InvalidInput` where there
    is no card."""
    cards = [dict(nic) for nic in nics]
    if network and not cards:
        raise InvalidInput("there was no network card when it was captured", hint="drop --network", field="network")
    if network:
        kept = {key: value for key, value in cards[0].items() if key not in OF_OTHER_MODES}
        cards[0] = kept | {"mode": "network", "network": network}
    return cards


def clone_identity(fresh: Identity, vm: Mapping[str, Any], *, keep_identity: bool) -> Identity:
    """`fresh` on the machine that the source has; with `keep_identity`, to be taken for the source."""
    fields = ["machine_type", "accelerator", "cpu_model", "cards"]
    if keep_identity:
        fields += ["uuid", "vmgenid", "macs"]
    return Identity.model_validate(fresh.model_dump() | {field: vm["identity"].get(field) for field in fields})


def clone_first_boot(first_boot: Mapping[str, Any], macs: Sequence[tuple[str, str]]) -> dict[str, Any]:
    """What the clone's seed is made from: the source's, a network configuration with its own MACs ((old, new)), and no
    Ignition, which has done its work on the disk."""
    network = first_boot["network_config"]
    for old, new in macs:
        network = network and re.sub(re.escape(old), new, network, flags=re.IGNORECASE)
    return {**first_boot, "network_config": network, "ignition": None}


def remarks(vm: Mapping[str, Any], spec: VMSpec, *, keep_identity: bool, user_data: bool) -> list[str]:
    """What whoever cloned `vm` should know about the clone, in sentences."""
    said = []
    if ports := [str(port["host"]) for nic in vm["spec"]["nics"] for port in nic["publish"]]:
        said.append(f"{spec.name} publishes no ports: {', '.join(ports)} still lead to {vm['name']}")
    if keep_identity:
        said.append(
            f"{spec.name} and {vm['name']} have one identity (UUID, MACs, hostname, machine-id, SSH host keys):"
            " never have both on one network"
        )
    elif user_data:
        said.append(f"cloud-init takes {spec.name} for a new machine: it runs the user-data of {vm['name']} again")
    return said
