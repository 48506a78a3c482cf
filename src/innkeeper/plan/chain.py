"""The files that make up a disk: layers, the lowest first, each a qcow2 that holds what changed since the one below.

A layer's document in the store (`layer/<id>`): {id, vm, disk, parent, image, created}. `vm` is the VM whose folder it
lies in, `disk` the index of the disk; below it lies the layer `parent`, or the disk of `image`, or nothing. Only the
layer that a VM's document names under `disks` is written to; all below it are frozen.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Layer:
    """One file of a chain. `node` is its name in QEMU (31 bytes at most, block.c), `path` as QEMU opens it."""

    node: str
    path: str
    handed: bool = False
    """The VM's user may not open it: the daemon does, and hands it in."""
    own: bool = False
    """It is the VM's own: QEMU may write to it, if a layer above is merged into it."""


Chain = tuple[Layer, ...]
"""A disk: base first. The last one is the guest's to write."""


def layer_record(layer_id: str, vm_id: str, disk: int, *, parent: str | None, image: str | None, stamp: str) -> Any:
    """A new layer's document."""
    return {"id": layer_id, "vm": vm_id, "disk": disk, "parent": parent, "image": image, "created": stamp}


def file_name(layer: Mapping[str, Any]) -> str:
    """Its name in the folder of its VM."""
    return f"disk{layer['disk']}-{layer['id']}.qcow2"


def node_name(layer: Mapping[str, Any]) -> str:
    """Its name in QEMU: the same for as long as it lives, so nobody has to remember who is above whom."""
    return f"disk{layer['disk']}-{layer['id']}"
