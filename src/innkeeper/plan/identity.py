"""What makes a VM itself and stays the same for its life: ids, addresses, machine type, CPU model."""

from __future__ import annotations

import hashlib
import uuid
from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, ConfigDict

from innkeeper.host.facts import HostFacts
from innkeeper.spec.vm import VMSpec

SSH_PORT_BASE = 22000
"""A VM's slot is added to this for the host port of its SSH."""


class Identity(BaseModel):
    """Pinned when the VM is created (DESIGN.md 2.9): a saved state can be loaded as long as these hold."""

    model_config = ConfigDict(frozen=True)

    id: str
    slot: int
    """A small number, unique on this host: VMs derive ports and user ids from it."""
    uuid: str
    vmgenid: str
    macs: tuple[str, ...]
    uid: int | None
    """The user QEMU runs as; None for the daemon's own (when it is not root)."""
    ssh_port: int | None
    machine_type: str
    accelerator: str
    cpu_model: str
    cards: int | None = None
    """So many NICs have a root port of their own; those behind them were added later and sit in the spare ones, for
    good. None: all have."""


def assign(vm_id: str, slot: int, spec: VMSpec, host: HostFacts, ssh_port: int | None) -> Identity:
    """Everything follows from the VM's id and slot, so that planning twice gives the same machine."""
    assert host.qemu is not None
    uid = None
    if host.root:
        # Without a mapped range (some containers) all VMs share nobody's uid: better than running as root.
        uid = host.uid_range[0] + slot % host.uid_range[1] if host.uid_range else 65534
    return Identity(
        id=vm_id,
        slot=slot,
        uuid=str(uuid.UUID(bytes=_bytes(vm_id, "uuid", 16), version=4)),
        vmgenid=str(uuid.UUID(bytes=_bytes(vm_id, "vmgenid", 16), version=4)),
        macs=macs(vm_id, spec),
        uid=uid,
        ssh_port=ssh_port,
        machine_type=host.qemu.machine,
        accelerator=host.accelerator.name,
        cpu_model=host.accelerator.cpu_model,
    )


def macs(vm_id: str, spec: VMSpec) -> tuple[str, ...]:
    """One per NIC: what the spec asks for, else one that follows from the VM's id."""
    return tuple(nic.mac or _mac(vm_id, index) for index, nic in enumerate(spec.nics))


def on_accelerator(identity: Identity, host: HostFacts) -> Identity:
    """The identity under the accelerator that the host has now; a CPU model of one does not exist under the other."""
    if identity.accelerator == host.accelerator.name:
        return identity
    changed: dict[str, Any] = {"accelerator": host.accelerator.name, "cpu_model": host.accelerator.cpu_model}
    return identity.model_copy(update=changed)


def misfit(saved: Mapping[str, Any], host: HostFacts) -> tuple[str, str, str] | None:
    """(what, its, ours) where this host differs from one on which guests were saved: their state goes on only where the
    accelerator, the CPU model and the machine type are the same. None where it fits."""
    assert host.qemu is not None
    if saved["accelerator"] != host.accelerator.name:
        return "accelerator", saved["accelerator"], host.accelerator.name
    if saved["cpu_model"] != host.accelerator.cpu_model:
        return "CPU model", saved["cpu_model"], host.accelerator.cpu_model
    if saved["machine_type"] not in host.qemu.machines:
        return "machine type", saved["machine_type"], host.qemu.machine
    return None


def _bytes(vm_id: str, purpose: str, count: int) -> bytes:
    return hashlib.sha256(f"innkeeper/{purpose}/{vm_id}".encode()).digest()[:count]


def _mac(vm_id: str, index: int) -> str:
    """52:54:00 is the prefix QEMU's guests are known by."""
    return ":".join(f"{byte:02x}" for byte in b"\x52\x54\x00" + _bytes(vm_id, f"nic{index}", 3))
