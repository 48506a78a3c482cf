"""Snapshots as documents, and which layers of a VM nobody needs any more: pure functions of what the store has.

A snapshot's document (`snapshot/<id>`): {id, vm, name, created, note, expires, automatic, state, disks, parent, taken,
quiesced, nvram, memory, passing, disc, identity_due, spec, identity, noticed}. `disks` are its frozen layers, one for
each disk; `parent` the snapshot that the VM stood on when it was taken; `taken` the state that the VM was in; `state`
is `whole`, or `deleting` once it is being removed: then its layers may be merged with others, so there is no way back
to it; `identity_due` whether the guest on these disks is still to become a machine of its own (plan/record.py). The
VM's document says under `at` which snapshot the present stands on.

`memory` is None, or says of the saved execution {size, parts, pause, agent, uuid_at, seed, as_fork, nat}: bytes that it
takes on the host; bytes of RAM, screen and devices one after the other; seconds for which the guest stood still;
whether an agent listened; where the UUID is (plan/rebirth.py); the path of the seed; whether that QEMU had the devices
of a fork, and which cards a NAT of its own (plan/command.py). A `passing` snapshot names the operation that took it,
has no file of its memory, and goes when the forks that it was taken for are there.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

MOST_LAYERS = 16
"""Layers of one VM that a disk may consist of: each costs a look in its tables for every read that goes through it."""


def snapshot_record(
    snapshot_id: str,
    vm: Mapping[str, Any],
    name: str,
    stamp: str,
    *,
    note: str,
    expires: str | None,
    automatic: bool = False,
    state: str = "whole",
    quiesced: bool = False,
    nvram: bool,
    memory: Mapping[str, Any] | None = None,
    passing: str = "",
) -> dict[str, Any]:
    """The document of a snapshot of `vm` as it is."""
    return {
        "id": snapshot_id, "vm": vm["id"], "name": name, "created": stamp, "note": note, "expires": expires,
        "automatic": automatic, "state": state, "disks": list(vm["disks"]), "parent": vm.get("at"),
        "taken": vm["state"], "quiesced": quiesced, "nvram": nvram,
        "memory": dict(memory) if memory else None, "passing": passing, "disc": vm["disc"],
        "identity_due": bool(vm.get("identity_due")), "spec": vm["spec"], "identity": vm["identity"], "noticed": False,
    }  # fmt: skip


def nvram_name(snapshot_id: str) -> str:
    """The copy of the UEFI variables that belongs to a snapshot, in the folder of its VM."""
    return f"nvram-{snapshot_id}.fd"


def memory_name(snapshot_id: str) -> str:
    """The saved memory and devices of a snapshot, in the folder of its VM."""
    return f"memory-{snapshot_id}"


def machine_then(vm: Mapping[str, Any], snapshot: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """(fields of the VM's document, what differs in words): the machine that a saved memory fits. What the guest does
    not see stays as it is set now: name, note, published ports and limits of NICs that are there in both."""
    now, then = vm["spec"], snapshot["spec"]
    publish = [nic["publish"] if nic["mode"] != "none" else [] for nic in now["nics"]]
    limits = [nic.get("limit") for nic in now["nics"]]
    nics = [
        nic
        | {"publish": publish[index] if index < len(publish) and nic["mode"] != "none" else []}
        | {"limit": limits[index] if index < len(limits) and nic["mode"] == "network" else None}
        for index, nic in enumerate(then["nics"])
    ]
    kept = ("name", "note", "first_boot")
    spec = dict(then) | {field: now[field] for field in kept} | {"nics": nics}
    pinned = ("machine_type", "accelerator", "cpu_model", "macs", "cards")
    identity = dict(vm["identity"]) | {field: snapshot["identity"].get(field) for field in pinned}
    seen = (
        ("vCPUs", now["cpus"], spec["cpus"]),
        ("memory in MiB", now["memory"] >> 20, spec["memory"] >> 20),
        ("NICs", [_guests_own(nic) for nic in now["nics"]], [_guests_own(nic) for nic in nics]),
        ("firmware", now["firmware"], spec["firmware"]),
        ("machine type", vm["identity"]["machine_type"], identity["machine_type"]),
        ("CPU model", vm["identity"]["cpu_model"], identity["cpu_model"]),
        ("MAC addresses", list(vm["identity"]["macs"]), list(identity["macs"])),
    )
    short = ("vCPUs", "memory in MiB", "machine type", "CPU model", "firmware")
    words = [f"{what} ({a} → {b})" if what in short else what for what, a, b in seen if a != b]
    return {"spec": spec, "identity": identity, "pending": False}, words


def _guests_own(nic: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in nic.items() if key not in ("publish", "limit")}


def lineage(layers: Mapping[str, Any], top: str) -> list[str]:
    """The ids of the layers that a disk consists of, the top one first."""
    found: list[str] = []
    at: str | None = top
    while at is not None and at in layers and at not in found:
        found.append(at)
        at = layers[at]["parent"]
    return found


@dataclass(frozen=True)
class Drop:
    """Nothing stands on the layer."""

    layer: str


@dataclass(frozen=True)
class Join:
    """Only `upper` stands on `lower`."""

    lower: str
    upper: str


def unneeded(
    vm: Mapping[str, Any], layers: Mapping[str, Any], snapshots: Collection[Mapping[str, Any]]
) -> Drop | Join | None:
    """The next layer of a VM that can go, and how; None when each is needed (DESIGN.md 5.11). `layers` and `snapshots`
    are those of all VMs. A layer with several above it stays, and so does one that a linked clone stands on, with all
    that is below it: another QEMU may have them open."""
    needed = set(vm["disks"]) | {layer for s in snapshots if s["state"] == "whole" for layer in s["disks"]}
    needed |= {below for layer in layers.values() if layer["vm"] != vm["id"] for below in lineage(layers, layer["id"])}
    above: dict[str, list[str]] = {}
    for layer in layers.values():
        if layer["parent"] is not None:
            above.setdefault(layer["parent"], []).append(layer["id"])
    for layer in sorted(layers.values(), key=lambda each: str(each["id"])):
        if layer["vm"] != vm["id"] or layer["id"] in needed:
            continue
        children = above.get(layer["id"], [])
        if not children:
            return Drop(layer["id"])
        if len(children) == 1:
            return Join(layer["id"], children[0])
    return None
