"""The CPU, from /proc/cpuinfo and sysfs. It does not change while the host runs, so it is read once."""

from __future__ import annotations

import functools
import os
import re
from pathlib import Path

from innkeeper.host.facts import Cpu, NumaNode

NODES = Path("/sys/devices/system/node")

# virtualization, 64-bit, large pages, crypto, vectors, time, confidential guests
FLAGS_THAT_MATTER = frozenset(
    re.findall(
        r"\w+",
        """
        vmx svm ept npt vpid hypervisor lm pdpe1gb la57 x2apic pcid invpcid smep smap aes sha_ni rdrand rdseed
        ssse3 sse4_1 sse4_2 popcnt movbe fma bmi2 avx avx2 avx512f constant_tsc nonstop_tsc tsc_deadline_timer
        tsc_known_freq sev sev_es sev_snp tdx_guest
        """,
    )
)


@functools.cache
def cpu_flags() -> frozenset[str]:
    """All flags of the first CPU."""
    return frozenset(_first_cpu().get("flags", "").split())


def cpu(memory_total: int) -> Cpu:
    """Facts about the CPU; `memory_total` (bytes) is what a host without NUMA has in its one node."""
    first = _first_cpu()
    sockets, cores = _topology()
    threads = os.cpu_count() or 1
    return Cpu(
        model=first.get("model name", "unknown"),
        vendor=first.get("vendor_id", "unknown"),
        threads=threads,
        cores=cores or threads,
        sockets=sockets or 1,
        flags=tuple(sorted(cpu_flags() & FLAGS_THAT_MATTER)),
        numa=_numa(memory_total, threads),
    )


def parse_list(text: str) -> tuple[int, ...]:
    """The kernel's list form: `0-3,8` → 0, 1, 2, 3, 8 (cpuset(7), "List format")."""
    found: list[int] = []
    for part in text.strip().split(","):
        if part:
            first, _, last = part.partition("-")
            found.extend(range(int(first), int(last or first) + 1))
    return tuple(found)


@functools.cache
def _first_cpu() -> dict[str, str]:
    block = Path("/proc/cpuinfo").read_text().split("\n\n", 1)[0]
    pairs = (line.partition(":") for line in block.splitlines())
    return {name.strip(): value.strip() for name, _, value in pairs}


@functools.cache
def _topology() -> tuple[int, int]:
    """(sockets, cores) that are online."""
    packages, cores = set(), set()
    for folder in Path("/sys/devices/system/cpu").glob("cpu[0-9]*/topology"):
        try:
            package = (folder / "physical_package_id").read_text().strip()
            cores.add((package, (folder / "core_id").read_text().strip()))
        except OSError:
            continue  # offline
        packages.add(package)
    return len(packages), len(cores)


@functools.cache
def _numa(memory_total: int, threads: int) -> tuple[NumaNode, ...]:
    nodes = []
    for folder in sorted(NODES.glob("node[0-9]*"), key=lambda path: int(path.name[4:])):
        found = re.search(r"MemTotal:\s+(\d+) kB", (folder / "meminfo").read_text())
        nodes.append(
            NumaNode(
                node=int(folder.name[4:]),
                cpus=parse_list((folder / "cpulist").read_text()),
                memory=int(found[1]) * 1024 if found else 0,
            )
        )
    if len(nodes) > 1:
        return tuple(nodes)
    # one node has it all, whatever it says of itself: hot-plugged memory can be missing from its count
    return (NumaNode(node=0, cpus=tuple(range(threads)), memory=memory_total),)
