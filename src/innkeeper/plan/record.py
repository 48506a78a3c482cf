"""The VM's document in the store, and plans as documents."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from innkeeper.plan.identity import Identity
from innkeeper.spec.vm import FirstBoot, VMSpec


def public_spec(spec: VMSpec) -> dict[str, Any]:
    """The spec without what may be secret: this is what is stored with the VM and shown."""
    kept = FirstBoot(user=spec.first_boot.user, ssh_keys=spec.first_boot.ssh_keys)
    return spec.model_copy(update={"first_boot": kept}).model_dump(mode="json")


def vm_record(
    spec: VMSpec, identity: Identity, image: dict[str, Any] | None, layers: Sequence[str], stamp: str
) -> dict[str, Any]:
    """A new VM's document. `image` is {id, name} of what it was made from, `layers` the tops of its disks' chains."""
    return {
        "id": identity.id,
        "name": spec.name,
        "spec": public_spec(spec),
        "identity": identity.model_dump(mode="json"),
        "image": image,
        "disks": list(layers),
        "at": None,  # the snapshot that the present stands on
        "created": stamp,
        "state": "creating",
        "reason": "",
        "since": stamp,
        "operation": None,
        "disc": bool(spec.iso),
        "seed": False,
        "expires": None,
        "forked": False,
        "capturable": False,  # its RAM is shared on a file, so that it can be captured while it runs
        "going_on": "",  # key of the image or snapshot whose memory its first start goes on from; each later one boots
        "read_seed": "",  # path of the seed that the guest of a fork has read
        "identity_due": False,  # a clone whose guest is still to become a machine of its own, at its first start
        "cloned_from": None,  # {id, name} of the VM that a clone or fork was made of
        "pending": False,  # a changed spec waits for the next start
    }
