"""Spec + identity + host facts → the complete QEMU command.

Every device, drive, object and netdev is JSON. What has no JSON form in QEMU 7.2 (machine, chardev, memory size …)
is made of constants only: files in the VM's folder are named relative to QEMU's working directory, which is that
folder, so no path appears in them. Golden tests in tests/golden pin the result, one option per line.
"""

from __future__ import annotations

from innkeeper.base.units import MIB
from innkeeper.host.facts import HostFacts
from innkeeper.plan import devices, pci
from innkeeper.plan.identity import Identity
from innkeeper.plan.options import Constants, Option, Plan
from innkeeper.spec.image import Image
from innkeeper.spec.vm import VMSpec


def command(
    spec: VMSpec, identity: Identity, host: HostFacts, image: Image | None, image_dir: str, *, seed: bool, iso: bool,
    ignition: bool,
) -> Plan:  # fmt: skip
    """The plan of one start. `seed`, `ignition`: such a file lies in the VM's folder. `iso`: boot the disc once more.

    The image's folder is the only path outside the VM's own that QEMU reads by name.
    """
    assert host.qemu is not None
    options = [
        *_machine(spec, identity, host),
        *_control(),
        *devices.console(),
        *devices.channels(),
        *devices.paravirtual(identity),
        *devices.disks(spec, image, image_dir),
    ]
    fdsets: list[str] = []
    if seed:
        options += devices.seed()
    if iso and spec.iso:
        fdsets.append(spec.iso)
        options += devices.iso(f"/dev/fdset/{len(fdsets)}")
    options += devices.nics(spec, identity)
    options += pci.spare_ports()
    if ignition:
        options.append(Option("-fw_cfg", Constants(keys={"name": "opt/com.coreos/config", "file": "ignition.json"})))
    if image is not None and image.kind == "kernel":
        options += [
            Option("-kernel", f"{image_dir}/{image.files['kernel']}"),
            Option("-initrd", f"{image_dir}/{image.files['initrd']}"),
            Option("-append", image.cmdline),
        ]
    groups = (host.kvm_group,) if host.kvm_group is not None and identity.accelerator == "kvm" else ()
    return Plan(host.qemu.path, tuple(options), tuple(fdsets), identity.uid, groups)


def _machine(spec: VMSpec, identity: Identity, host: HostFacts) -> list[Option]:
    machine: dict[str, str | int] = {
        "memory-backend": "ram",
        "dump-guest-core": "off",  # a core of QEMU must not hold the guest's secrets
        "usb": "off",
        "vmport": "off",
        "hpet": "off",  # costs timer interrupts, and every guest of today has better clocks
    }
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
        Option("-cpu", Constants(identity.cpu_model)),
        Option("-smp", Constants(keys={"cpus": spec.cpus, "sockets": 1, "cores": spec.cpus, "threads": 1})),
        Option("-m", Constants(keys={"size": f"{spec.memory // MIB}M"})),
        # Private memory: KSM and huge pages work on it. A VM that is to be captured will have shared RAM on a file.
        Option("-object", {"qom-type": "memory-backend-memfd", "id": "ram", "size": spec.memory, "share": False}),
        Option("-rtc", Constants(keys={"base": "utc", "driftfix": "slew"})),
        Option("-boot", Constants(keys={"strict": "on"})),
        Option("-global", Constants(keys={"ICH9-LPC.disable_s3": 1})),
        Option("-display", "none"),
    ]


def _control() -> list[Option]:
    return [
        Option("-chardev", Constants("socket", {"id": "qmp", "path": "qmp.sock", "server": "on", "wait": "off"})),
        Option("-mon", Constants(keys={"chardev": "qmp", "mode": "control"})),
        # QEMU stays when the guest shuts down or panics, so that the daemon, even one that was away, knows why.
        Option("-action", Constants(keys={"shutdown": "pause", "panic": "pause"})),
        Option(
            "-sandbox",
            Constants(
                "on",
                {"obsolete": "deny", "elevateprivileges": "deny", "spawn": "deny", "resourcecontrol": "deny"},
            ),
        ),
        Option("-msg", Constants(keys={"timestamp": "on"})),
    ]


def _blockdev_file(node: str, driver: str, filename: str, *, read_only: bool) -> Option:
    file = {"driver": "file", "filename": filename}
    return Option("-blockdev", {"driver": driver, "node-name": node, "read-only": read_only, "file": file})
