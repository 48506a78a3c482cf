"""The devices of a VM, each as the options that make it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from itertools import pairwise

from innkeeper.base.units import GIB
from innkeeper.plan import pci
from innkeeper.plan.chain import Chain, Layer
from innkeeper.plan.identity import Identity
from innkeeper.plan.network import macvtap_name, tap_name
from innkeeper.plan.options import Constants, Json, Macvtap, Option, Passt, Tap
from innkeeper.plan.waiting import PORT as REBIRTH_PORT
from innkeeper.spec.disk import DiskSpec
from innkeeper.spec.nic import NicSpec
from innkeeper.spec.vm import VMSpec

AGENT_PORT = "org.qemu.guest_agent.0"
"""The name qemu-ga looks for by default."""
SSH = 22
UNPLUGGED = "nat"
"""What the ids of NATs without a card begin with."""


def console() -> list[Option]:
    """A screen for screenshots and installers, and the serial console, whose output is kept in serial.log."""
    return [
        Option("-device", {"driver": "VGA", "id": "vga", "bus": "pcie.0", "addr": pci.FIXED["vga"], "vgamem_mb": 16}),
        Option(
            "-chardev",
            Constants(
                "socket",
                {
                    "id": "serial", "path": "serial.sock", "server": "on", "wait": "off",
                    "logfile": "serial.log", "logappend": "on",
                },
            ),
        ),
        Option("-device", {"driver": "isa-serial", "id": "serial0", "chardev": "serial", "index": 0}),
    ]  # fmt: skip


def channels(*, rebirth: bool) -> list[Option]:
    """The guest agent's channel, and `rebirth`'s: that of the process that waits in a captured guest."""
    options = [
        Option("-chardev", Constants("socket", {"id": "agent", "path": "agent.sock", "server": "on", "wait": "off"})),
        Option("-device", _fixed("virtio-serial-pci", "serial-bus", "serial")),
        Option(
            "-device",
            {"driver": "virtserialport", "id": "agent0", "bus": "serial-bus.0", "chardev": "agent", "name": AGENT_PORT},
        ),
    ]
    if rebirth:
        socket = {"id": "rebirth", "path": "rebirth.sock", "server": "on", "wait": "off"}
        port = {"id": "rebirth0", "bus": "serial-bus.0", "chardev": "rebirth", "name": REBIRTH_PORT}
        options += [
            Option("-chardev", Constants("socket", socket)),
            Option("-device", {"driver": "virtserialport", **port}),
        ]
    return options


def paravirtual(identity: Identity, *, reporting: bool) -> list[Option]:
    """Random numbers, a balloon, «my kernel panicked», and «this is another life: reseed».

    `reporting`: the guest reports its free pages, and QEMU gives them back. Not where the RAM is a file that others
    start from: QEMU punches the reported pages out of that file (system/physmem.c, ram_block_discard_range).
    """
    return [
        Option("-object", {"qom-type": "rng-random", "id": "entropy", "filename": "/dev/urandom"}),
        Option("-device", _fixed("virtio-rng-pci", "rng0", "rng") | {"rng": "entropy"}),
        Option(
            "-device",
            _fixed("virtio-balloon-pci", "balloon0", "balloon")
            | {"free-page-reporting": reporting, "deflate-on-oom": True},
        ),
        Option("-device", _fixed("pvpanic-pci", "panic0", "panic")),
        Option("-device", {"driver": "vmgenid", "id": "genid", "guid": identity.vmgenid}),
    ]


def disks(spec: VMSpec, chains: Sequence[Chain]) -> list[Option]:
    """All disks, with their whole chains written out: QEMU opens no file because another file's header names it."""
    options = [Option("-object", {"qom-type": "iothread", "id": "io0"})]
    if any(disk.bus == "virtio-scsi" for disk in spec.disks):
        options.append(Option("-device", _fixed("virtio-scsi-pci", "scsi0", "scsi") | {"iothread": "io0"}))
    for index, (disk, chain) in enumerate(zip(spec.disks, chains, strict=True)):
        below: str | None = None
        for layer in chain[:-1]:
            options.append(Option("-blockdev", volume(layer, below, read_only=True)))
            below = layer.node
        options.append(Option("-blockdev", volume(chain[-1], below, read_only=False)))
        if disk.bus == "virtio-blk" or index % 8 == 0:
            # Function 0 of a slot must be there for the others to be found.
            options.append(pci.disk_port(index))
        options.append(_disk_device(index, disk, chain[-1].node))
    return options


def volume(layer: Layer, below: str | None, *, read_only: bool) -> Json:
    """A layer as a block node, standing on the node `below`."""
    file: dict[str, object] = {"driver": "file", "filename": layer.path}
    node: dict[str, object] = {"driver": "qcow2", "node-name": layer.node, "discard": "unmap", "backing": below}
    if read_only and layer.own:  # as long as nothing is merged into it
        return node | {"read-only": True, "file": file | {"auto-read-only": True, "discard": "unmap"}}
    if read_only:
        return node | {"read-only": True, "file": file | {"read-only": True}}
    return node | {"detect-zeroes": "unmap", "file": file | {"discard": "unmap", "aio": "threads"}}


def _disk_device(index: int, disk: DiskSpec, node: str) -> Option:
    # A full disk pauses the guest instead of corrupting its file system (DESIGN.md 5.7).
    common: Json = {
        "id": f"virtio-disk{index}", "drive": node, "bootindex": index + 1,
        "werror": "stop", "rerror": "stop",
    }  # fmt: skip
    named = {"serial": disk.serial} if disk.serial else {}
    if disk.bus == "virtio-scsi":
        return Option("-device", {"driver": "scsi-hd", "bus": "scsi0.0", "lun": index, **common, **named})
    port = {"driver": "virtio-blk-pci", "bus": f"port-disk{index}", "iothread": "io0"}
    return Option("-device", {**port, **common, **named})


def seed(path: str) -> list[Option]:
    """The NoCloud seed, as a virtio disk: Debian's cloud kernel has no driver for a CD drive."""
    file = {"driver": "file", "filename": path, "read-only": True}
    return [
        Option("-blockdev", {"driver": "raw", "node-name": "seed", "read-only": True, "file": file}),
        pci.seed_port(),
        Option("-device", {"driver": "virtio-blk-pci", "id": "virtio-seed", "bus": "port-seed", "drive": "seed"}),
    ]


def iso(path: str) -> list[Option]:
    """A CD drive with a disc, before the disks in the boot order."""
    return [
        Option(
            "-blockdev",
            {
                "driver": "raw",
                "node-name": "iso",
                "read-only": True,
                "file": {"driver": "file", "filename": path, "read-only": True},
            },
        ),
        Option("-device", {"driver": "ide-cd", "id": "cd0", "bus": "ide.0", "drive": "iso", "bootindex": 0}),
    ]


def nics(
    spec: VMSpec, identity: Identity, nat: Sequence[int] = (), functions: Mapping[int, str] | None = None
) -> list[Option]:
    """Network cards, each behind its own root port. `functions`: PCI addresses of those that are the host's. `nat`:
    cards of which saved state has QEMU's own NAT; where it is theirs no more, something has to take that state."""
    options: list[Option] = []
    for index, nic in enumerate(spec.nics):
        if identity.cards is None or index < identity.cards:
            options.append(pci.nic_port(index))
        if of_qemu(nic):
            options.append(Option("-netdev", user_netdev(index, nic, identity)))
        elif index in nat:
            options.append(Option("-netdev", {"type": "user", "id": f"{UNPLUGGED}{index}", "restrict": True}))
        if nic.mode != "absent":
            function = functions and functions.get(index)
            options.append(Option("-device", card(index, nic, identity, function or "")))
    return options


def card(index: int, nic: NicSpec, identity: Identity, function: str = "") -> dict[str, object]:
    """The device of a NIC, for `-device` and `device_add`. `function`: PCI address of what the host gives to it."""
    if nic.mode == "sriov":
        assert function
        bus = pci.nic_bus(index, identity.cards)
        return {"driver": "vfio-pci", "id": f"nic{index}", "bus": bus, "host": function}
    device: dict[str, object] = {
        "driver": "virtio-net-pci" if nic.model == "virtio" else "e1000e",
        "id": f"nic{index}",
        "bus": pci.nic_bus(index, identity.cards),
        "mac": identity.macs[index],
    }
    if nic.mode != "none":
        device["netdev"] = f"net{index}"
    if nic.model == "virtio":
        device["romfile"] = ""  # no network boot: nothing to wait for, and one file less from the host
    return device


def with_nat(argv: Sequence[str]) -> list[int]:
    """Indices of the cards for which a QEMU that was started so has a NAT of its own."""
    netdevs = [json.loads(value) for option, value in pairwise(argv) if option == "-netdev"]
    return [int(netdev["id"].lstrip("abcdefghijklmnopqrstuvwxyz")) for netdev in netdevs if netdev["type"] == "user"]


def taps(spec: VMSpec, identity: Identity) -> tuple[Tap, ...]:
    """What the NICs in networks, and those on interfaces of the host, are plugged into."""
    return tuple(tap for index, nic in enumerate(spec.nics) if (tap := _tap(index, nic, identity)))


def _tap(index: int, nic: NicSpec, identity: Identity) -> Tap | None:
    if nic.mode == "network":
        return Tap(index, tap_name(identity.id, index))
    if nic.mode == "user" and nic.backend == "passt":
        return Passt(index, f"passt{index}", _forwards(index, nic, identity), identity.uid)
    if nic.mode == "macvtap":
        name, mode = macvtap_name(identity.id, index), nic.macvtap_mode or "bridge"
        return Macvtap(index, name, str(nic.parent), mode, identity.macs[index])
    return None


def lockable(spec: VMSpec) -> int:
    """Bytes that QEMU has to lock: all of the guest's memory where a PCI device of the host's reaches it, and room for
    what of its registers is mapped (as much as libvirt gives: docs/formatdomain, memtune hard_limit)."""
    return spec.memory + GIB if any(nic.mode == "sriov" for nic in spec.nics) else 0


def of_qemu(nic: NicSpec) -> bool:
    """Whether QEMU's own NAT is behind it."""
    return nic.mode == "user" and nic.backend == "qemu"


def user_netdev(index: int, nic: NicSpec, identity: Identity) -> Json:
    """QEMU's own NAT for a card, for `-netdev` and `netdev_add`."""
    forwards = user_forwards(index, nic, identity)
    return {"type": "user", "id": f"net{index}", "hostfwd": [{"str": forward} for forward in forwards]}


def user_forwards(index: int, nic: NicSpec, identity: Identity) -> list[str]:
    """Its ports as QEMU writes them, the one for SSH first. Numbers and checked addresses only."""
    forwards = _forwards(index, nic, identity)
    return [f"{protocol}:{address}:{host}-:{guest}" for protocol, address, host, guest in forwards]


def _forwards(index: int, nic: NicSpec, identity: Identity) -> tuple[tuple[str, str, int, int], ...]:
    forwards = [(f.protocol, f.address, f.host, f.guest) for f in nic.publish]
    if index == 0 and identity.ssh_port is not None:
        forwards.insert(0, ("tcp", "127.0.0.1", identity.ssh_port, SSH))
    return tuple(forwards)


def _fixed(driver: str, name: str, role: str) -> dict[str, object]:
    return {"driver": driver, "id": name, "bus": "pcie.0", "addr": pci.FIXED[role]}
