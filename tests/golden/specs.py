"""The specs whose commands are pinned in tests/golden, on a host that is a fixed value.

INNKEEPER_UPDATE_GOLDEN=1 pytest tests/unit/test_plan.py     writes the files anew: read the difference, it can
                                                             break saved states
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

from innkeeper.host.accelerator import Verdict
from innkeeper.host.facts import Cgroup, Cpu, Firmware, HostFacts, Kernel, Memory, QemuFacts, Uefi
from innkeeper.plan.chain import Chain, Layer
from innkeeper.plan.command import Files, command
from innkeeper.plan.identity import Identity, assign
from innkeeper.plan.options import Constants, Macvtap, Passt, Plan, Tap
from innkeeper.spec.image import Image
from innkeeper.spec.vm import VMSpec

GIB = 1 << 30
VM_ID = "0123456789ab"
IMAGE_DIR = "/var/lib/innkeeper/images/fedcba987654"
OVMF = "/usr/share/OVMF"
CMDLINE = "console=ttyS0 quiet panic=-1"
NASTY = "a,b=c 'd' \"e\" {f} %s $(g) `h` \\ ;&|<>#~*? é☃"
"""Everything that means something to a shell, to QemuOpts, to JSON, to printf or to a terminal, and no slash."""
NASTY_DIR = f"/srv/{NASTY}\n\t\x1b[31m,file=/etc/shadow/images"
KEY = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIH4vZ5bUu1Zs8eQ0m1Xn0e4u5m8m1lqg0o6J5mXw7q9T"


@lru_cache
def host(
    *, accelerator: str = "tcg", root: bool = True, uid_range: tuple[int, int] | None = (0x70000000, 65536),
    kvm_group: int | None = None, uefi_format: str = "raw",
) -> HostFacts:  # fmt: skip
    """A Debian 12 host that never changes."""
    return HostFacts(
        hostname="host", kernel="6.1.0-39-amd64", arch="x86_64", os="Debian GNU/Linux 12 (bookworm)",
        virtualized_by=None, root=root,
        cpu=Cpu(model="cpu", vendor="GenuineIntel", threads=4, cores=4, sockets=1, flags=(), numa=()),
        memory=Memory(total=16 * GIB, available=8 * GIB, swap_total=0, swap_free=0),
        cgroup=Cgroup(mode="none", reason=""), uid_range=uid_range, kvm_group=kvm_group,
        kernel_features=Kernel(
            ksm=True, ksm_running=False, psi=True, thp="madvise", io_uring=True, landlock=2, tun=True, vhost_net=True,
            vhost_vsock=True,
        ),
        tools={},
        firmware=Firmware(
            uefi=Uefi(code=f"{OVMF}/OVMF_CODE_4M.fd", vars=f"{OVMF}/OVMF_VARS_4M.fd", format=uefi_format)
        ),
        qemu=QemuFacts(
            path="/usr/bin/qemu-system-x86_64", version="7.2.22", package="", machine="pc-q35-7.2",
            machines=("pc-q35-7.2",), tcg_cpu="Westmere-v1", features=frozenset(), devices=frozenset(),
        ),
        accelerator=Verdict(
            name=accelerator, reason="", cpu_model="host" if accelerator == "kvm" else "Westmere-v1", seconds=0,
            boot_id="", qemu_version="7.2.22", kvm_device="", checked="",
        ),
    )  # fmt: skip


@lru_cache
def image(kind: str) -> Image:
    """A golden image of this kind."""
    files = {"disk": "disk.qcow2"} if kind == "disk" else {"kernel": "kernel", "initrd": "initrd"}
    return Image(
        id="fedcba987654", name="debian-12" if kind == "disk" else "tiny", kind=kind, files=files,
        format="qcow2" if kind == "disk" else "", cmdline="" if kind == "disk" else CMDLINE,
        virtual_size=GIB if kind == "disk" else 0, stored_size=1, digests={}, source={}, created="",
    )  # fmt: skip


@dataclass(frozen=True)
class Case:
    """One pinned spec. `image`: disk, kernel or none."""

    name: str
    spec: dict[str, Any]
    image: str = "disk"
    host: dict[str, Any] = field(default_factory=dict)
    image_dir: str = IMAGE_DIR
    seed: bool = True
    disc: bool = False
    ignition: bool = False
    slot: int = 7
    ssh_port: int | None = 22007
    ram: str = ""
    functions: dict[int, str] = field(default_factory=dict)
    how: dict[str, Any] = field(default_factory=dict)
    """What else `command` is told."""

    def vmspec(self) -> VMSpec:
        base = {"disk": {"image": "debian-12"}, "kernel": {"image": "tiny"}, "none": {}}[self.image]
        return VMSpec.model_validate({"name": "web-1"} | base | self.spec)

    def facts(self) -> HostFacts:
        return host(**self.host)

    def identity(self) -> Identity:
        spec = self.vmspec()
        reachable = bool(spec.nics) and spec.nics[0].mode == "user"
        return assign(VM_ID, self.slot, spec, self.facts(), self.ssh_port if reachable else None)

    def plan(self, spec: VMSpec | None = None, identity: Identity | None = None, image_dir: str | None = None) -> Plan:
        spec, folder = spec or self.vmspec(), "" if self.image == "none" else image_dir or self.image_dir
        return command(
            spec, identity or self.identity(), self.facts(), image(self.image) if self.image != "none" else None,
            Files(
                chains(spec, f"{folder}/disk.qcow2" if self.image == "disk" else None), folder,
                "seed.iso" if self.seed else "", self.disc, self.ignition, self.ram, self.functions,
            ),
            **self.how,
        )  # fmt: skip


def chains(spec: VMSpec, base: str | None) -> list[Chain]:
    """A layer for each disk; the first stands on `base`."""
    below = {0: (Layer("disk0-image-0", base),)} if base else {}
    return [(*below.get(n, ()), Layer(f"disk{n}-top", f"disk{n}-top.qcow2")) for n in range(len(spec.disks))]


def _disks(*buses: str) -> list[dict[str, Any]]:
    names = {"b": "virtio-blk", "s": "virtio-scsi"}
    return [{"size": "1G", "bus": names[bus]} for bus in buses]


INSTALL = {"iso": "/srv/iso/debian-12.iso"}
CASES = (
    Case("default", {}),
    Case("tiny", {"memory": "256M", "cpus": 1}, image="kernel", seed=False),
    Case("tiny-without-disk", {"disks": []}, image="kernel", seed=False),
    Case("tiny-with-seed", {}, image="kernel"),
    Case("smallest", {"cpus": 1, "memory": "16M"}),
    Case("largest", {"cpus": 255, "memory": "1T"}),
    Case("odd-memory", {"memory": "1537M", "cpus": 3}),
    Case("uefi", {"firmware": "uefi"}),
    Case("uefi-qcow2-firmware", {"firmware": "uefi"}, host={"uefi_format": "qcow2"}),
    Case("install-from-iso", INSTALL, image="none", seed=False, disc=True),
    Case("install-iso-ejected", INSTALL, image="none", seed=False),
    Case("install-iso-uefi", INSTALL | {"firmware": "uefi"}, image="none", seed=False, disc=True),
    Case("rescue-iso-with-image", INSTALL, disc=True),
    Case("live-iso-without-disk", INSTALL | {"disks": []}, image="none", seed=False, disc=True),
    Case("empty-disk", {}, image="none", seed=False),
    Case("ignition", {}, seed=False, ignition=True),
    Case("ignition-and-seed", {}, ignition=True),
    Case("no-seed", {}, seed=False),
    Case("image-size-disk", {"disks": [{}]}),
    Case("disks-on-both-buses", {"disks": _disks(*"bsbs")}),
    Case("disks-on-scsi", {"disks": _disks(*"sss")}),
    Case("disks-nine-virtio", {"disks": _disks(*"bbbbbbbbb")}),
    Case("disks-most-mixed", {"disks": _disks(*"bssbbbbbsbbbbbbbbssbbbbb")}),
    Case("disk-serials", {"disks": [{"serial": "DISK-0001"}, {"size": "1G", "bus": "virtio-scsi", "serial": "S2"}]}),
    Case("nic-none", {"nics": []}),
    Case("nic-unplugged", {"nics": [{"mode": "none"}]}),
    Case("nic-e1000e", {"nics": [{"model": "e1000e"}]}),
    Case("nics-three", {"nics": [{}, {"mode": "none"}, {"model": "e1000e", "mac": "52:54:00:aa:bb:cc"}]}),
    Case("nics-most", {"nics": [{}] * 8}),
    Case("nic-mac", {"nics": [{"mac": "02-00-5E-10-00-01"}]}),
    Case(
        "publish",
        {
            "nics": [
                {"publish": [{"host": 28080, "guest": 80}, {"host": 28053, "guest": 53, "protocol": "udp"}]},
                {"publish": [{"host": 28443, "guest": 443, "address": "0.0.0.0"}]},
            ]
        },
    ),
    Case("kvm", {}, host={"accelerator": "kvm"}),
    Case("kvm-group-uefi", {"firmware": "uefi"}, host={"accelerator": "kvm", "kvm_group": 104}),
    Case("unprivileged-daemon", {}, host={"root": False, "uid_range": None}),
    Case("no-uid-range", {}, host={"uid_range": None}),
    Case("uid-range-small", {}, host={"uid_range": (200000, 4)}),
    Case("longest-name", {"name": "a" + "-" * 61 + "z"}),
    Case(
        "hostile-serials",
        {
            "disks": [
                {"serial": "a,drive=x,readonly=o"},
                {"size": "1G", "serial": '"},{"driver":"a'},
                {"size": "1G", "bus": "virtio-scsi", "serial": "'$(reboot)`id`'\\\\%s"},
                {"size": "1G", "bus": "virtio-scsi", "serial": " "},
            ]
        },
    ),
    Case("hostile-image-folder", {}, image_dir=NASTY_DIR),
    Case("hostile-kernel-folder", {}, image="kernel", image_dir=NASTY_DIR),
    Case("hostile-iso", {"iso": NASTY_DIR + "/-add-fd,set=1"}, image="none", seed=False, disc=True),
    Case(
        "hostile-first-boot",
        {
            "note": NASTY_DIR,
            "first_boot": {
                "ssh_keys": [f"{KEY} {NASTY}"],
                "user_data": "#cloud-config\n" + NASTY_DIR,
                "env": {"A": NASTY},
                "network_config": NASTY,
                "ignition": NASTY,
                "user": "admin",
            },
        },
    ),
)

GOING_ON = (
    Case("going-on-as-fork", {}, image="kernel", ram=f"{IMAGE_DIR}/ram", how={"as_fork": True}),
    Case("going-on-from-memory", {}, how={"incoming": True}),
    Case("going-on-from-the-memory-of-a-fork", {}, how={"incoming": True, "as_fork": True}),
    Case("to-be-captured", {}, image="kernel", how={"capturable": True}),
    Case(
        "going-on-in-a-network",
        {"nics": [{"mode": "network", "network": "lab"}, {}]},
        image="kernel",
        ram=f"{IMAGE_DIR}/ram",
        how={"as_fork": True, "nat": [0, 1]},
    ),
)
"""Those that boot nothing but wait for saved memory, and the one that theirs is of: a device that one of them has and
another has not, and what was saved cannot be loaded."""

ON_HOST = (
    Case(
        "nic-macvtap",
        {
            "nics": [
                {"mode": "macvtap", "parent": "eth0"},
                {"mode": "network", "network": "lab"},
                {"mode": "macvtap", "parent": "wan,fd=0", "macvtap_mode": "vepa", "model": "e1000e"},
            ]
        },
    ),
    Case(
        "nic-passt",
        {
            "nics": [
                {"backend": "passt", "publish": [{"host": 8080, "guest": 80}]},
                {"backend": "passt", "publish": [{"host": 53, "guest": 53, "protocol": "udp", "address": "0.0.0.0"}]},
            ]
        },
    ),
    Case(
        "nic-sriov",
        {"nics": [{"mode": "sriov", "parent": "ens1f0", "vlan": 100}, {}, {"mode": "sriov", "parent": "ens1f1"}]},
        functions={0: "0000:3b:02.0", 2: "0000:3b:0a.3"},
    ),
)
"""Those with cards on interfaces of the host, which is not the one that the tests run on."""


def _on(tap: Tap) -> str:
    if isinstance(tap, Passt):
        return f", passt as user {tap.uid}: {' '.join(tap.words())}"
    return f", macvtap on {tap.parent}, {tap.mode}, {tap.mac}" if isinstance(tap, Macvtap) else ""


def text(plan: Plan) -> str:
    """One option per line; what is not ASCII, or would break a line, is escaped."""
    lines = [plan.binary]
    for option in plan.options:
        if option.value is None:
            lines.append(option.flag)
        elif isinstance(option.value, Constants):
            lines.append(f"{option.flag} {option.value.text()}")
        elif isinstance(option.value, str):
            plain = option.value.isascii() and option.value.isprintable()
            lines.append(f"{option.flag} {option.value if plain else json.dumps(option.value)}")
        else:
            lines.append(f"{option.flag} {json.dumps(option.value)}")
    lines += [f"# fdset {number}: {json.dumps(path)}" for number, path in enumerate(plan.fdsets, 1)]
    lines += [f"# tap: {tap.name} for {tap.netdev}{_on(tap)}" for tap in plan.taps]
    if plan.locked:
        lines.append(f"# may lock: {plan.locked} bytes")
    if plan.ram:
        lines.append(f"# ram: {plan.ram.size} bytes of {json.dumps(plan.ram.path)}")
    lines.append(f"# user: {plan.uid}, groups: {list(plan.groups)}")
    return "\n".join(lines) + "\n"
