"""`inn host`: one page that answers what this host is, what guests run on and why, and what is free."""

from __future__ import annotations

from argparse import Namespace
from typing import Any

from innkeeper.base.units import format_size
from innkeeper.cli import terminal
from innkeeper.cli.terminal import Cell
from innkeeper.client import Innkeeper

ACCELERATORS = {"kvm": ("KVM: hardware virtualization", "green"), "tcg": ("TCG: software emulation", "yellow")}


def host(inn: Innkeeper, args: Namespace) -> int:
    facts = inn.host()
    if args.output == "json":
        terminal.emit_json(facts)
    else:
        terminal.say(terminal.page([(label, value) for label, value in page(facts) if value]))
    return 0


def page(facts: dict[str, Any]) -> list[tuple[str, Any]]:
    """The rows of the page."""
    capacity = facts.get("capacity") or {}
    return [
        *_machine(facts),
        *_cpu(facts.get("cpu") or {}, capacity),
        *_memory(facts.get("memory") or {}, capacity),
        *_pool(capacity),
        *_accelerator(facts.get("accelerator") or {}),
        *_qemu(facts),
        *_confinement(facts),
        *_tools(facts.get("tools") or {}),
    ]


def _machine(facts: dict[str, Any]) -> list[tuple[str, Any]]:
    under = facts.get("virtualized_by")
    details = [f"Linux {facts.get('kernel', '')}", str(facts.get("arch", ""))]
    if under:
        details.append(f"itself a virtual machine under {'another hypervisor' if under == 'unknown' else under}")
    capacity = facts.get("capacity") or {}
    return [
        ("Host", [(str(facts.get("hostname", "")), "bold"), f"  {facts.get('os', '')}"]),
        ("", (", ".join(details), "dim")),
        (
            "Guests",
            f"{capacity['vms_running']} running of {_count(capacity['vms'], 'VM')}" if capacity.get("vms") else "",
        ),
    ]


def _cpu(cpu: dict[str, Any], capacity: dict[str, Any]) -> list[tuple[str, Any]]:
    threads = int(cpu.get("threads") or 0)
    if not threads:
        return []
    nodes = len(cpu.get("numa") or ())
    parts = [_count(cpu.get("sockets"), "socket"), _count(cpu.get("cores"), "core"), _count(threads, "thread")]
    if nodes > 1:
        parts.append(_count(nodes, "NUMA node"))
    promised = int(capacity.get("vcpus_promised") or 0)
    total = int(capacity.get("vcpus") or threads)
    return [
        ("CPU", " ".join(str(cpu.get("model") or "").split())),
        ("", (", ".join(filter(None, parts)), "dim")),
        ("", _promise(promised / total, f"{_count(promised, 'vCPU')} promised on {total}")),
    ]


def _memory(memory: dict[str, Any], capacity: dict[str, Any]) -> list[tuple[str, Any]]:
    total = int(capacity.get("memory_total") or memory.get("total") or 0)
    if not total:
        return []
    available = int(capacity.get("memory_available") or memory.get("available") or 0)
    promised = int(capacity.get("memory_promised") or 0)
    used = total - available
    rows: list[tuple[str, Any]] = [
        (
            "Memory",
            [
                *_bar(used / total, _heat(used / total)),
                f"  {format_size(used)} used of {format_size(total)}, {format_size(available)} available",
            ],
        ),
        ("", _promise(promised / total, f"{format_size(promised)} promised to VMs")),
    ]
    if promised:
        private, shared = int(capacity.get("memory_private") or 0), int(capacity.get("memory_shared") or 0)
        rows.append(("", (f"VMs take {format_size(private)} alone and {format_size(shared)} together", "dim")))
        left = available - max(0, promised - private - shared)
        text = f"should they come to use all of it, {format_size(abs(left))} would be "
        if left >= 0:
            rows.append(("", (f"{text}left", "dim")))
        else:
            rows.append(("", (f"{text}missing: the host would swap, or kill guests", "yellow")))
    if swap := int(memory.get("swap_total") or 0):
        taken = swap - int(memory.get("swap_free") or 0)
        rows.append(("", (f"swap: {format_size(taken)} used of {format_size(swap)}", "dim")))
    for pages in memory.get("hugepages") or ():
        if pages.get("total"):
            text = f"huge pages of {format_size(pages['size'])}: {pages['free']} free of {pages['total']}"
            rows.append(("", (text, "dim")))
    return rows


def _pool(capacity: dict[str, Any]) -> list[tuple[str, Any]]:
    total, free = int(capacity.get("pool_total") or 0), int(capacity.get("pool_free") or 0)
    if not total:
        return []
    used = (total - free) / total
    text = f"  {format_size(total - free)} used of {format_size(total)}, {format_size(free)} free"
    rows: list[tuple[str, Any]] = [("Pool", [*_bar(used, _heat(used)), text])]
    promised = int(capacity.get("pool_promised") or 0)
    if promised:
        rows.append(("", _promise(promised / total, f"{format_size(promised)} promised to disks")))
    if path := capacity.get("pool"):
        rows.append(("", (str(path), "dim")))
    return rows


def _accelerator(verdict: dict[str, Any]) -> list[tuple[str, Any]]:
    if not verdict:
        return []
    name = str(verdict.get("name"))
    return [
        ("Accelerator", ACCELERATORS.get(name, (name, ""))),
        ("", str(verdict.get("reason") or "")),
        ("", (f"→ {verdict['hint']}", "dim") if verdict.get("hint") else ""),
    ]


def _qemu(facts: dict[str, Any]) -> list[tuple[str, Any]]:
    qemu, firmware = facts.get("qemu") or {}, facts.get("firmware") or {}
    if not qemu:
        return [("QEMU", ("not installed: apt-get install qemu-system-x86", "red"))]
    model = (facts.get("accelerator") or {}).get("cpu_model")
    known: list[Cell] = ["SeaBIOS" if firmware.get("bios") else ("no SeaBIOS found", "yellow"), ", "]
    known.append("UEFI (OVMF)" if firmware.get("uefi") else ("no UEFI: apt-get install ovmf", "yellow"))
    return [
        ("QEMU", [f"{qemu.get('version', '')}", (f"  {qemu.get('package') or ''}", "dim")]),
        ("", (f"new VMs: machine {qemu.get('machine', '')}, CPU {model or '?'}", "dim")),
        ("Firmware", known),
    ]


def _confinement(facts: dict[str, Any]) -> list[tuple[str, Any]]:
    cgroup, uids = facts.get("cgroup") or {}, facts.get("uid_range")
    if not cgroup:
        return []
    groups = "no cgroup" if cgroup.get("mode") == "none" else f"cgroup {cgroup.get('mode')}"
    users = f"each VM its own user ({uids[0]}–{uids[0] + uids[1] - 1})" if uids else "VMs run as the daemon's user"
    rows: list[tuple[str, Any]] = [("Confined by", f"seccomp, {groups}, {users}")]
    if cgroup.get("mode") == "none" and cgroup.get("reason"):
        rows.append(("", (str(cgroup["reason"]), "dim")))
    return rows


def _tools(tools: dict[str, Any]) -> list[tuple[str, Any]]:
    missing = sorted(name for name, path in tools.items() if not path)
    return [("Not installed", (", ".join(missing), "dim"))] if missing else []


def _promise(fraction: float, text: str) -> list[Cell]:
    """What guests were promised, against what there is; nothing where nothing was."""
    if not fraction:
        return []
    over: list[Cell] = [(f", {fraction:.1f}× overcommitted", "yellow")] if fraction > 1 else []
    return [*_bar(min(fraction, 1.0), "yellow" if over else "blue"), f"  {text}", *over]


def _bar(fraction: float, style: str) -> list[Cell]:
    return terminal.bar([(fraction, style)], 24 if terminal.width() >= 100 else 16)


def _heat(fraction: float) -> str:
    return "red" if fraction > 0.92 else "yellow" if fraction > 0.8 else "green"


def _count(count: Any, noun: str) -> str:
    return f"{count} {noun}{'' if count == 1 else 's'}" if count is not None else ""
