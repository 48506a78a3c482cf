"""SR-IOV cards as sysfs has them (Documentation/ABI/testing/sysfs-bus-pci). Changes nothing."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

SYSFS = Path("/sys")
BRIDGE = "0x0604"
"""What the class of a PCI bridge begins with: it is in the group of what is behind it, and reaches nothing."""
UP = 0x1
"""linux/if.h: IFF_UP."""


def most_functions(name: str, sysfs: Path = SYSFS) -> int | None:
    """How many virtual functions a network device can have; None where there is no such device."""
    device = sysfs / "class/net" / name
    if not device.exists():
        return None
    return _number(device / "device/sriov_totalvfs")


def functions(name: str, sysfs: Path = SYSFS) -> list[tuple[int, Path]]:
    """(number, PCI device) of each that there is now."""
    links = (sysfs / "class/net" / name / "device").glob("virtfn*")
    return sorted((int(link.name.removeprefix("virtfn")), link.resolve()) for link in links)


def driver(device: Path) -> str:
    """What drives a PCI device; empty for nothing."""
    return (device / "driver").resolve().name if (device / "driver").exists() else ""


def override(device: Path) -> str:
    """The only driver that may; empty where nobody has said so."""
    try:
        text = (device / "driver_override").read_text().strip()
    except OSError:
        return ""
    return "" if text == "(null)" else text


def group(device: Path) -> int | None:
    """Its IOMMU group."""
    link = device / "iommu_group"
    return int(link.resolve().name) if link.exists() else None


def beside(device: Path) -> tuple[str, ...]:
    """Others in its group, without bridges."""
    found = []
    with suppress(OSError):
        for other in sorted((device / "iommu_group/devices").iterdir()):
            kind = (other / "class").read_text() if (other / "class").exists() else ""
            if other.name != device.name and not kind.startswith(BRIDGE):
                found.append(other.name)
    return tuple(found)


def up(device: Path) -> tuple[str, ...]:
    """Names of its network devices that are up."""
    with suppress(OSError):
        return tuple(
            name
            for name in sorted(os.listdir(device / "net"))  # noqa: PTH208 - names are wanted
            if int((device / "net" / name / "flags").read_text(), 16) & UP
        )
    return ()


def has_driver(name: str, sysfs: Path = SYSFS) -> bool:
    """Whether the kernel has a PCI driver, built in or loaded."""
    return (sysfs / "bus/pci/drivers" / name).exists()


def _number(path: Path) -> int:
    try:
        return int(path.read_text())
    except (OSError, ValueError):
        return 0
