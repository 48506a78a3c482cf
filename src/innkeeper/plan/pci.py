"""Which PCI slot everything sits in.

    00:01.0         VGA
    00:02.0         virtio-serial       00:03.0  virtio-rng      00:04.0  virtio-balloon
    00:05.0         virtio-scsi         00:07.0  pvpanic
    00:10.0-7       root ports of NICs 0-7
    00:11.0-13.7    root ports of virtio-blk disks 0-23
    00:14.0-3       spare root ports, for hot-plug: NICs that are added to a VM sit there, for good
    00:15.0         root port of the seed disc, last: Linux names disks in this order, and vda is the VM's own

Addresses are fixed by what a device is, not by what else there is: adding a disk moves no NIC, so a guest's names and
a saved state stay valid. What can be unplugged sits behind a root port of its own, as PCI Express wants it.
"""

from __future__ import annotations

from innkeeper.plan.options import Option

FIXED = {"vga": "0x1", "serial": "0x2", "rng": "0x3", "balloon": "0x4", "scsi": "0x5", "panic": "0x7"}
NIC_SLOT, DISK_SLOT, SPARE_SLOT, SEED_SLOT, SPARES = 0x10, 0x11, 0x14, 0x15, 4


def nic_port(index: int) -> Option:
    """The root port of NIC `index`; its id is `port-nic<index>`."""
    return _port(f"port-nic{index}", NIC_SLOT, index)


def nic_bus(index: int, cards: int | None) -> str:
    """Where NIC `index` is plugged in: the first `cards` of a VM (None: all) have root ports of their own, those that
    came later have spare ones. Saved states and names in the guest depend on it, so it never changes."""
    return f"port-nic{index}" if cards is None or index < cards else f"spare{index - cards}"


def disk_port(index: int) -> Option:
    """The root port of disk `index`; its id is `port-disk<index>`."""
    return _port(f"port-disk{index}", DISK_SLOT + index // 8, index % 8)


def spare_ports() -> list[Option]:
    """Empty root ports; a device is plugged in by naming `spare<n>` as its bus."""
    return [_port(f"spare{index}", SPARE_SLOT, index) for index in range(SPARES)]


def seed_port() -> Option:
    """The root port of the seed disc, `port-seed`."""
    return _port("port-seed", SEED_SLOT, 0)


def _port(name: str, slot: int, function: int) -> Option:
    return Option(
        "-device",
        {
            "driver": "pcie-root-port",
            "id": name,
            "bus": "pcie.0",
            "addr": f"{slot:#x}.{function}",
            "multifunction": True,
            "chassis": slot * 8 + function,
        },
    )
