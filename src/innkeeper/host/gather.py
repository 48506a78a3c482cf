"""Read this host: the one function that fills in `HostFacts`."""

from __future__ import annotations

import asyncio
import ctypes
import functools
import os
import platform
import re
import shutil
import socket
from contextlib import suppress
from pathlib import Path

import psutil

from innkeeper.base.child import start_child
from innkeeper.base.home import Home
from innkeeper.host import cgroups, kvm
from innkeeper.host.accelerator import Verdict
from innkeeper.host.cpu import cpu, cpu_flags
from innkeeper.host.facts import HostFacts, HugePages, Kernel, Memory, QemuFacts
from innkeeper.host.firmware import firmware
from innkeeper.host.users import uid_range

TOOLS = (
    "qemu-system-x86_64",
    "qemu-img",
    "qemu-nbd",
    "mmdebstrap",
    "ssh",
    "ssh-keygen",
    "scp",
    "mkfs.ext4",
    "mcopy",
    "cpio",
    "dnsmasq",
    "nft",
    "ip",
    "busctl",
    "swtpm",
    "virtiofsd",
)
_MORE_PATH = "/usr/local/sbin:/usr/sbin:/sbin:/usr/lib/qemu:/usr/libexec"
_DMI = (Path("/sys/class/dmi/id/sys_vendor"), Path("/sys/class/dmi/id/product_name"))
_VENDORS = {
    "qemu": "QEMU",
    "kvm": "KVM",
    "vmware": "VMware",
    "innotek": "VirtualBox",
    "virtualbox": "VirtualBox",
    "xen": "Xen",
    "microsoft": "Hyper-V",
    "amazon": "Amazon EC2",
    "google": "Google Compute Engine",
    "openstack": "OpenStack",
    "parallels": "Parallels",
}


async def gather(home: Home, verdict: Verdict, qemu: QemuFacts | None) -> HostFacts:
    """All facts, with live numbers read now. The first call in a process also reads what never changes."""
    now = memory()
    return HostFacts(
        hostname=socket.gethostname(),
        kernel=platform.release(),
        arch=platform.machine(),
        os=_os_name(),
        virtualized_by=await _hypervisor(),
        root=os.geteuid() == 0,
        cpu=cpu(now.total),
        memory=now,
        cgroup=cgroups.detect(),
        uid_range=uid_range(),
        kvm_group=kvm.device().group,
        kernel_features=kernel(),
        tools={name: find_tool(name) for name in TOOLS},
        firmware=firmware(machine=qemu.machine) if qemu else firmware(),
        qemu=qemu,
        accelerator=verdict,
    )


def memory() -> Memory:
    """What /proc/meminfo says now."""
    virtual, swap = psutil.virtual_memory(), psutil.swap_memory()
    pages = []
    for folder in sorted(Path("/sys/kernel/mm/hugepages").glob("hugepages-*kB")):
        size = int(folder.name.removeprefix("hugepages-").removesuffix("kB")) * 1024
        total = int((folder / "nr_hugepages").read_text())
        free = int((folder / "free_hugepages").read_text())
        pages.append(HugePages(size=size, total=total, free=free))
    return Memory(
        total=virtual.total,
        available=virtual.available,
        swap_total=swap.total,
        swap_free=swap.free,
        hugepages=tuple(pages),
    )


def kernel() -> Kernel:
    """Which features this kernel has, asked of the kernel itself and not of its version."""
    thp = re.search(r"\[(\w+)\]", _read("/sys/kernel/mm/transparent_hugepage/enabled"))
    # both calls only fail or answer: no ring and no rule set comes of them (io_uring_setup(2), landlock(7))
    ring = _syscall(425, 0, None)
    landlock = _syscall(444, None, 0, 1)
    return Kernel(
        ksm=Path("/sys/kernel/mm/ksm/run").exists(),
        ksm_running=_read("/sys/kernel/mm/ksm/run").strip() == "1",
        psi=_read("/proc/pressure/memory") != "",
        thp=thp[1] if thp else "none",
        io_uring=ring in (_INVALID, _BAD_ADDRESS),
        landlock=max(0, landlock),
        tun=Path("/dev/net/tun").exists(),
        vhost_net=Path("/dev/vhost-net").exists(),
        vhost_vsock=Path("/dev/vhost-vsock").exists(),
    )


@functools.cache
def boot_id() -> str:
    """Differs after each boot of the kernel (random(4))."""
    return _read("/proc/sys/kernel/random/boot_id").strip()


def find_tool(name: str) -> str | None:
    """The path of a program, also where a plain user's PATH has no sbin."""
    return shutil.which(name, path=f"{os.environ.get('PATH', os.defpath)}:{_MORE_PATH}")


_INVALID, _BAD_ADDRESS = -22, -14


def _syscall(number: int, *arguments: int | None) -> int:
    """The result of an x86-64 system call, negative errno where it fails; -38 (ENOSYS) on other machines."""
    if platform.machine() != "x86_64":
        return -38
    libc = ctypes.CDLL(None, use_errno=True)
    result = int(libc.syscall(ctypes.c_long(number), *(ctypes.c_void_p(value) for value in arguments)))
    return result if result >= 0 else -ctypes.get_errno()


def _read(path: str | Path) -> str:
    """A small file of the kernel's, empty where it cannot be read."""
    try:
        return Path(path).read_text()
    except (OSError, UnicodeDecodeError):
        return ""


@functools.cache
def _os_name() -> str:
    try:
        return platform.freedesktop_os_release()["PRETTY_NAME"]
    except (OSError, KeyError):
        return "Linux"


_hypervisor_name: list[str | None] = []


async def _hypervisor() -> str | None:
    """Who runs this host, if it is a VM: from DMI, else from CPUID through lscpu (once per process)."""
    if not _hypervisor_name:
        _hypervisor_name.append(await _find_hypervisor() if "hypervisor" in cpu_flags() else None)
    return _hypervisor_name[0]


async def _find_hypervisor() -> str:
    text = " ".join(_read(path) for path in _DMI).lower()
    for mark, name in _VENDORS.items():
        if mark in text:
            return name
    with suppress(OSError, TimeoutError):
        process = await start_child(
            "lscpu",
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.DEVNULL,
            env={"PATH": "/usr/bin:/bin", "LC_ALL": "C"},
        )
        try:
            output, _ = await asyncio.wait_for(process.communicate(), 2)
        finally:
            if process.returncode is None:
                process.kill()
                await process.wait()
        if found := re.search(rb"Hypervisor vendor:\s*(\S+)", output):
            return found[1].decode()
    return "unknown"
