"""Facts about this host as one frozen, JSON-able value.

Sizes are bytes. `host/gather.py` fills it in; here are only shapes, so that `plan/` stays pure.
"""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, field_serializer

from innkeeper.host.accelerator import Verdict


class Fact(BaseModel):
    model_config = ConfigDict(frozen=True)


class NumaNode(Fact):
    node: int
    cpus: tuple[int, ...]
    memory: int


class Cpu(Fact):
    model: str
    vendor: str
    threads: int
    """Logical CPUs that are online; what `nproc --all` counts."""
    cores: int
    sockets: int
    flags: tuple[str, ...]
    """The subset of /proc/cpuinfo's flags that decides what a guest can have, sorted."""
    numa: tuple[NumaNode, ...]


class HugePages(Fact):
    size: int
    total: int
    free: int


class Memory(Fact):
    total: int
    available: int
    """MemAvailable: what can be taken without swapping (proc(5))."""
    swap_total: int
    swap_free: int
    hugepages: tuple[HugePages, ...] = ()


class Cgroup(Fact):
    """How VMs can be confined here."""

    mode: Literal["v2", "v1", "systemd", "none"]
    reason: str


class Kernel(Fact):
    """Kernel features that Innkeeper uses where they are there."""

    ksm: bool
    """Samepage merging is built in; `ksm_running` says whether it merges now."""
    ksm_running: bool
    psi: bool
    thp: str
    """Transparent huge pages: `always`, `madvise`, `never`, or `none` where the kernel has none."""
    io_uring: bool
    landlock: int
    """The Landlock ABI version; 0 without Landlock."""
    tun: bool
    vhost_net: bool
    vhost_vsock: bool


class Uefi(Fact):
    """One pair of OVMF images."""

    code: str
    vars: str
    """The template that each VM gets its own copy of."""
    format: str
    """Format of both files, as QEMU names it: `raw` or `qcow2`."""


class Firmware(Fact):
    bios: str | None = None
    """SeaBIOS. For information: QEMU finds it by itself, so nothing is to pass."""
    uefi: Uefi | None = None


class QemuFacts(Fact):
    """What one QEMU binary can do, asked over QMP (DESIGN.md 2.10)."""

    path: str
    version: str
    """`7.2.22`: for people and cache keys; nothing may compare it."""
    package: str
    """The distribution's own version: `Debian 1:7.2+dfsg-7+deb12u18`; often empty."""
    machine: str
    """The newest versioned q35 machine type: `pc-q35-7.2`."""
    machines: tuple[str, ...]
    """All versioned q35 machine types, newest first."""
    tcg_cpu: str
    """The best versioned CPU model of which TCG emulates everything; see `host/accelerator.py`."""
    features: frozenset[str]
    """Names from the table in `qemu/capabilities.py`."""
    devices: frozenset[str]
    """Every `-device` driver it has."""

    @field_serializer("features", "devices")
    def _sorted(self, names: frozenset[str]) -> list[str]:
        return sorted(names)


class HostFacts(Fact):
    hostname: str
    kernel: str
    arch: str
    os: str
    virtualized_by: str | None
    """The hypervisor under this host (`KVM`, `VMware`; `unknown` where it hides), or None on bare metal."""
    root: bool
    """The daemon is root."""
    cpu: Cpu
    memory: Memory
    cgroup: Cgroup
    uid_range: tuple[int, int] | None
    """(first, count) of the unprivileged uids (gid = uid) that VMs run as, one each; None when QEMU runs as the
    daemon's user."""
    kvm_group: int | None
    """The gid that QEMU needs among its supplementary groups to open /dev/kvm; None where none is needed or none
    helps."""
    kernel_features: Kernel
    tools: dict[str, str | None]
    """Program name to path, None where it is not installed."""
    firmware: Firmware
    qemu: QemuFacts | None
    accelerator: Verdict
