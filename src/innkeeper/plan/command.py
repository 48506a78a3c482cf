"""Spec + identity + host facts → the complete QEMU command.

Every device, drive, object and netdev is JSON. What has no JSON form in QEMU 7.2 (machine, chardev, memory size …)
is made of constants only: files in the VM's folder are named relative to QEMU's working directory, which is that
folder, so no path appears in them. Golden tests in tests/golden pin the result, one option per line.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from innkeeper.base.units import MIB
from innkeeper.host.facts import HostFacts
from innkeeper.plan import devices, pci
from innkeeper.plan.chain import Chain
from innkeeper.plan.identity import Identity
from innkeeper.plan.options import SANDBOX, Constants, Option, Plan, RamImage
from innkeeper.spec.image import Image
from innkeeper.spec.vm import VMSpec

Memory = Literal["private", "captured", "going-on"]
"""RAM of a VM: its own and private, shared on the file `ram` so that it can be captured, or captured before."""


@dataclass(frozen=True)
class Files:
    """What a plan is given to boot from, besides the VM's own folder, where all relative names are."""

    chains: Sequence[Chain]
    kernel_dir: str = ""
    """Where `image` lies, if it is a kernel, which is booted directly."""
    seed: str = ""
    """NoCloud seed; empty for none."""
    iso: bool = False
    """Boot the spec's disc once more."""
    ignition: bool = False
    """`ignition.json` is in the VM's folder."""
    ram: str = ""
    """Captured RAM to go on from; empty for a boot."""
    functions: Mapping[int, str] = field(default_factory=dict)
    """PCI addresses of the host's devices that cards of the guest are."""


def command(
    spec: VMSpec,
    identity: Identity,
    host: HostFacts,
    image: Image | None,
    files: Files,
    *,
    capturable: bool = False,
    incoming: bool = False,
    as_fork: bool = False,
    nat: Sequence[int] = (),
) -> Plan:
    """The plan of one start. `image` is what its kernel comes from, if it is one.

    `capturable`: its RAM can be captured, see `Memory`. `incoming`: it waits for saved memory, which fits only where
    the devices are those of then: `as_fork` are those of a guest that was made capturable, `nat` says which cards had
    QEMU's own NAT. Files that only the daemon may read go in as descriptors.
    """
    assert host.qemu is not None
    memory: Memory = "going-on" if files.ram else "captured" if capturable else "private"
    handed: list[str] = []

    def hand(path: str) -> str:
        handed.append(path)
        return f"/dev/fdset/{len(handed)}"

    chains = [
        tuple(replace(layer, path=hand(layer.path)) if layer.handed else layer for layer in chain)
        for chain in files.chains
    ]
    options = [
        *_machine(spec, identity, host, memory),
        *_control(),
        *devices.console(),
        *devices.channels(rebirth=capturable or as_fork),
        *devices.paravirtual(identity, reporting=not capturable and not as_fork),
        *devices.disks(spec, chains),
    ]
    if files.seed:
        options += devices.seed(hand(files.seed) if files.seed.startswith("/") else files.seed)
    if files.iso and spec.iso:
        options += devices.iso(hand(spec.iso))
    cards, spare = devices.nics(spec, identity, nat, files.functions), pci.spare_ports()
    options += [*cards, *spare] if identity.cards is None else [*spare, *cards]  # where some of them sit
    if files.ignition:
        options.append(Option("-fw_cfg", Constants(keys={"name": "opt/com.coreos/config", "file": "ignition.json"})))
    if image is not None and image.kind == "kernel":
        options += [
            Option("-kernel", f"{files.kernel_dir}/{image.files['kernel']}"),
            Option("-initrd", f"{files.kernel_dir}/{image.files['initrd']}"),
            Option("-append", image.cmdline),
        ]
    if memory == "going-on" or incoming:
        options.append(Option("-incoming", "defer"))
    groups = (host.kvm_group,) if host.kvm_group is not None and identity.accelerator == "kvm" else ()
    ram = RamImage(files.ram, spec.memory) if files.ram else None
    taps, locked = devices.taps(spec, identity), devices.lockable(spec)
    return Plan(host.qemu.path, tuple(options), tuple(handed), ram, taps, locked, identity.uid, groups)


def _machine(spec: VMSpec, identity: Identity, host: HostFacts, memory: Memory) -> list[Option]:
    machine: dict[str, str | int] = {
        "memory-backend": "ram",
        "dump-guest-core": "off",  # a core of QEMU must not hold the guest's secrets
        "usb": "off",
        "vmport": "off",
        "hpet": "off",  # costs timer interrupts, and every guest of today has better clocks
    }
    if spec.cpus > 254:  # more than the older tables can say; QEMU 10 refuses them then
        machine["smbios-entry-point-type"] = 64
    firmware: list[Option] = []
    if spec.firmware == "uefi":
        uefi = host.firmware.uefi
        assert uefi is not None
        machine |= {"pflash0": "firmware-code", "pflash1": "firmware-vars"}
        firmware = [
            _blockdev_file("firmware-code", uefi.format, uefi.code, read_only=True),
            _blockdev_file("firmware-vars", uefi.format, "nvram.fd", read_only=False),
        ]
    accelerator = {"thread": "multi"} if identity.accelerator == "tcg" else {}
    return [
        Option("-name", Constants(keys={"guest": spec.name, "debug-threads": "on"})),
        Option("-uuid", identity.uuid),
        Option("-nodefaults"),
        Option("-no-user-config"),
        Option("-S"),
        *firmware,
        Option("-machine", Constants(identity.machine_type, machine)),
        Option("-accel", Constants(identity.accelerator, accelerator)),
        Option("-cpu", _cpu(identity.cpu_model)),
        Option("-smp", Constants(keys={"cpus": spec.cpus, "sockets": 1, "cores": spec.cpus, "threads": 1})),
        Option("-m", Constants(keys={"size": f"{spec.memory // MIB}M"})),
        *_ram(spec.memory, memory),
        Option("-rtc", Constants(keys={"base": "utc", "driftfix": "slew"})),
        Option("-boot", Constants(keys={"strict": "on"})),
        Option("-global", Constants(keys={"ICH9-LPC.disable_s3": 1})),
        Option("-display", "none"),
    ]


def _cpu(model: str) -> Constants:
    """`Westmere-v1,cx16=off` → the model and its properties."""
    name, *properties = model.split(",")
    return Constants(name, dict(each.split("=", 1) for each in properties))


def _ram(size: int, memory: Memory) -> list[Option]:
    if memory == "going-on":
        return []  # `RamImage.option`
    if memory == "captured":
        shared = {"size": size, "share": True, "mem-path": "ram"}
        return [Option("-object", {"qom-type": "memory-backend-file", "id": "ram", **shared})]
    # Anonymous and private: KSM and huge pages work on it. A private mapping of a memfd would cost the host each page
    # twice, once in the memfd.
    return [Option("-object", {"qom-type": "memory-backend-ram", "id": "ram", "size": size, "share": False})]


def _control() -> list[Option]:
    return [
        Option("-chardev", Constants("socket", {"id": "qmp", "path": "qmp.sock", "server": "on", "wait": "off"})),
        Option("-mon", Constants(keys={"chardev": "qmp", "mode": "control"})),
        # QEMU stays when the guest shuts down or panics, so that the daemon, even one that was away, knows why.
        Option("-action", Constants(keys={"shutdown": "pause", "panic": "pause"})),
        SANDBOX,
        Option("-msg", Constants(keys={"timestamp": "on"})),
    ]


def _blockdev_file(node: str, driver: str, filename: str, *, read_only: bool) -> Option:
    file = {"driver": "file", "filename": filename}
    return Option("-blockdev", {"driver": driver, "node-name": node, "read-only": read_only, "file": file})
