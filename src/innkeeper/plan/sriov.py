"""Which virtual function of an SR-IOV card a guest gets: pure, from what host/sriov.py has read.

No such card was at hand when this was written: it is tested against a sysfs that the tests make.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from innkeeper.base.errors import InvalidInput, Unsupported

VFIO = "vfio-pci"
"""The kernel's driver that hands a PCI device to a program."""


@dataclass(frozen=True)
class Function:
    """A virtual function. `address` is its PCI address, like 0000:3b:02.0."""

    index: int
    address: str
    driver: str = ""
    """What drives it now; empty for nothing."""
    override: str = ""
    """The only driver that may, if somebody has said so (driver_override)."""
    group: int | None = None
    """Its IOMMU group; None without an IOMMU."""
    beside: tuple[str, ...] = ()
    """Other devices of that group, without PCI bridges: who has one can reach the others."""
    up: tuple[str, ...] = ()
    """Its network devices that the host has up."""


@dataclass(frozen=True)
class Card:
    """A physical function: `name` is its network device, `most` says how many functions there can be."""

    name: str
    most: int
    functions: tuple[Function, ...]


@dataclass(frozen=True)
class Wanted:
    """A VM's NIC that gets a function. `vlan`: its frames are in this VLAN outside, and untagged in the guest."""

    vm: str
    index: int
    parent: str
    mac: str
    vlan: int | None
    uid: int | None


def choose(card: Card, taken: Mapping[str, str], *, vfio: bool) -> Function:
    """The first that is free. `taken` says which VM has a function, by PCI address; `vfio` whether the kernel has the
    driver. Raises `InvalidInput`, `Unsupported`."""
    check(card, vfio=vfio)
    for function in card.functions:
        if function.address not in taken and _why_not(function) == "":
            return function
    reasons = [f"{each.address} {_why_not(each) or 'is that of ' + taken[each.address]}" for each in card.functions]
    raise Unsupported(
        f"no virtual function of {card.name} is free: {'; '.join(reasons)}",
        hint=f"stop a VM that has one, or make more: up to {card.most}", parent=card.name,
    )  # fmt: skip


def check(card: Card, *, vfio: bool) -> None:
    """What is wrong with all of them. Raises `InvalidInput`, `Unsupported`."""
    if not card.most:
        raise InvalidInput(
            f"{card.name} has no virtual functions (SR-IOV)", hint=f"--macvtap {card.name} works with any card",
            field="parent",
        )  # fmt: skip
    if not card.functions:
        path = f"/sys/class/net/{card.name}/device/sriov_numvfs"
        raise Unsupported(
            f"{card.name} can have {card.most} virtual functions, and has none now",
            hint=f"echo {min(card.most, 8)} > {path}", parent=card.name,
        )  # fmt: skip
    if all(function.group is None for function in card.functions):
        raise Unsupported(
            "this host has no IOMMU that is switched on, so a guest with a PCI device could reach all memory",
            hint="VT-d or AMD-Vi in the firmware's setup, and intel_iommu=on on the kernel's command line (Intel)",
        )
    if not vfio:
        raise Unsupported(f"the kernel's driver {VFIO} is not there", hint=f"modprobe {VFIO}")


def _why_not(function: Function) -> str:
    """Why it cannot be given to a guest; empty if it can."""
    if function.group is None:
        return "is behind no IOMMU"
    if function.beside:
        return f"shares its IOMMU group {function.group} with {', '.join(function.beside)}"
    if function.driver == VFIO:
        return "is used by another program, through vfio-pci"
    if function.up:
        return f"is up on this host as {', '.join(function.up)}"
    return ""
