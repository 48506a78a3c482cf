"""`inn ls`, `inn info`."""

from __future__ import annotations

from argparse import Namespace
from typing import Any

from innkeeper.base.clock import age
from innkeeper.base.units import format_age, format_rate, format_size
from innkeeper.cli import terminal
from innkeeper.cli.terminal import Cell
from innkeeper.client import Innkeeper
from innkeeper.client.wishes import endpoint


def ls(inn: Innkeeper, args: Namespace) -> int:
    every = inn.vms(memory_used=args.output != "name")
    documents = [vm for vm in every if not args.tag or args.tag in (vm["spec"].get("tags") or ())]
    if args.output == "json":
        terminal.emit_json(documents)
    elif args.output == "name":
        for document in documents:
            terminal.say(document["name"])
    elif documents:
        heads = ("NAME", "STATE", "IMAGE", "CPUS", "MEMORY", "TAKES", "ADDRESS", "PORTS", "SINCE", "NOTE")
        terminal.say(terminal.table(heads, [_row(document) for document in documents]))
    elif args.tag:
        terminal.note(f"no VM has the tag {args.tag}; inn tag add VM {args.tag}")
    else:
        terminal.note("no VMs yet; make one: inn launch debian-12")
    return 0


def _row(vm: dict[str, Any]) -> tuple[Cell, ...]:
    return (
        (vm["name"], "bold"),
        terminal.state(vm["state"]),
        vm.get("image") or "",
        str(vm["cpus"]),
        format_size(vm["memory"]),
        f"{format_size(used['private'])} + {format_size(used['shared'])}" if (used := vm.get("memory_used")) else "",
        vm["address"] if vm.get("address") not in (None, "127.0.0.1") else "",
        ports(vm),
        (format_age(age(vm["since"])), "dim") if vm.get("since") else "",
        remark(vm),
    )


def remark(vm: dict[str, Any]) -> Cell:
    """Why it is in this state, or what is being done to it."""
    if vm.get("operation"):
        return (str(vm["operation"]["kind"]), "cyan")
    if vm.get("reason"):
        return (str(vm["reason"]), "red" if vm["state"] in ("paused", "crashed") else "dim")
    if vm["state"] == "running" and not vm.get("ready", True):
        return ("booting", "dim")
    return ""


def ports(vm: dict[str, Any]) -> str:
    """`2222→22 53→53/udp`, an address only where it is not the loopback."""
    return " ".join(forward(one) for one in forwards(vm))


def forwards(vm: dict[str, Any]) -> list[dict[str, Any]]:
    """The ports that lead into a VM, the one for SSH first."""
    published = list(vm.get("forwards") or ())
    if port := vm.get("ssh_port"):
        return [{"host": port, "guest": 22, "protocol": "tcp"}, *published]
    return published


def forward(one: dict[str, Any]) -> str:
    address = one.get("address") or "127.0.0.1"
    host = f"{one['host']}" if address == "127.0.0.1" else endpoint(address, one["host"])
    return f"{host}→{one['guest']}" + ("/udp" if one.get("protocol") == "udp" else "")


def where(card: dict[str, Any]) -> str:
    """What a card is plugged into, in words."""
    words = {"user": "user-mode NAT", "none": "cable not plugged in"}
    if card["mode"] == "user" and card.get("backend") == "passt":
        return "user-mode NAT by passt"
    vlan = f", VLAN {card['vlan']}" if card.get("vlan") else ""
    return card.get("network") or words.get(card["mode"]) or f"{card['mode']} on {card.get('parent')}{vlan}"


def described(card: dict[str, Any]) -> tuple[str, ...]:
    """Where a card is plugged in, its address, its limit, and whether its cable is in; as a spec or the API has it."""
    return (
        f"in {card['network']}" if card.get("network") else where(card),
        card.get("address") or "",
        f"at most {format_rate(card['limit'])}" if card.get("limit") else "",
        "link down" if card.get("link") == "down" else "",
        card.get("model") or "",
        card.get("mac") or "",
    )


def info(inn: Innkeeper, args: Namespace) -> int:
    vm = inn.vm(args.vm)
    document = vm.info
    if args.output == "json":
        terminal.emit_json(document)
    else:
        terminal.say(terminal.page(_page(document, vm.has_ssh)))
    return 0


def _page(vm: dict[str, Any], ssh: bool) -> list[tuple[str, Any]]:
    spec = vm.get("spec") or {}
    since = format_age(age(vm["since"])) if vm.get("since") else ""
    state: list[Cell] = [
        (vm["name"], "bold"),
        "  ",
        ("● ", terminal.state(vm["state"])[1]),
        terminal.state(vm["state"]),
    ]
    if since:
        state.append((f" for {since}", "dim"))
    if vm["state"] == "running":
        state.append(("" if vm.get("ready") else ", booting", "dim"))
    rows: list[tuple[str, Any]] = [("VM", state)]
    if vm.get("reason"):
        rows.append(("", remark(vm | {"operation": None})))
    if operation := vm.get("operation"):
        rows.append(("Operation", [(operation["kind"], "cyan"), (f"  inn op show {operation['id']} -f", "dim")]))
    if spec.get("note"):
        rows.append(("Note", spec["note"]))
    if spec.get("tags"):
        rows.append(("Tags", " ".join(spec["tags"])))
    machine = vm.get("machine") or {}
    kind = {"kvm": "KVM", "tcg": "software emulation (TCG)"}.get(str(machine.get("accelerator")), "")
    rows += [
        ("Image", vm.get("image") or "none: installed from a disc"),
        ("Size", f"{vm['cpus']} vCPU, {format_size(vm['memory'])} RAM, {spec.get('firmware', 'bios').upper()}"),
        ("Machine", " · ".join(filter(None, (machine.get("type"), machine.get("cpu"), kind)))),
    ]
    if used := vm.get("memory_used"):
        text = f"{format_size(used['private'])} of its own, {format_size(used['shared'])} as its part of what it shares"
        rows.append(("Takes", (text, "dim")))
    rows += _disks(vm)
    if count := vm.get("snapshots"):
        hint = f"  no backup: inn snapshot ls {vm['name']} --tree"
        rows.append(("Snapshots", [str(count), (hint, "dim")]))
    if vm.get("linked_clones"):
        rows.append(("Below", [", ".join(vm["linked_clones"]), ("  linked clones, which stand on its disks", "dim")]))
    if vm.get("cloned_from"):
        linked = "linked: it stands on disks of " + ", ".join(vm["linked_to"]) if vm.get("linked_to") else "full"
        rows.append(("Fork of" if vm.get("forked") else "Clone of", [vm["cloned_from"], (f"  {linked}", "dim")]))
    rows += _network(vm, spec, ssh)
    rows += [
        ("Disc", vm.get("disc") or (f"{spec['iso']}, ejected" if spec.get("iso") else "")),
        ("Agent", "answers" if vm.get("agent") else ""),
        ("Process", f"pid {vm['pid']}" if vm.get("pid") else ""),
        ("Id", (f"{vm['id']}, made {format_age(age(vm['created']))} ago", "dim") if vm.get("created") else vm["id"]),
    ]
    rows += _actions(vm)
    return [(label, value) for label, value in rows if value]


def _disks(vm: dict[str, Any]) -> list[tuple[str, Any]]:
    disks = vm.get("disks") or []
    lines: list[tuple[str, Any]] = []
    for index, disk in enumerate(disks):
        size, stored = disk.get("virtual_size") or 0, disk.get("stored_size") or 0
        used = terminal.bar([(stored / size, "blue")], 16) if size else []
        text = f" {format_size(stored)} of {format_size(size)} stored  "
        lines.append(("" if index else "Disks", [*used, text, (str(disk.get("name", "")), "dim")]))
    return lines


def _network(vm: dict[str, Any], spec: dict[str, Any], ssh: bool) -> list[tuple[str, Any]]:
    lines: list[tuple[str, Any]] = []
    for index, nic in enumerate(nic for nic in spec.get("nics") or () if nic.get("mode") != "absent"):
        address = vm.get("address") if not index and nic.get("mode") != "user" else None
        lines.append(("" if index else "Network", " · ".join(filter(None, described(nic | {"address": address})))))
    if firewall := _firewall(spec.get("firewall") or {}):
        lines.append(("Firewall", [firewall, (f"  inn firewall ls {vm['name']}", "dim")]))
    if spec.get("metadata"):
        lines.append(("Metadata", ["http://169.254.169.254", ("  answers this guest", "dim")]))
    for index, one in enumerate(forwards(vm)):
        address, protocol = one.get("address") or "127.0.0.1", one.get("protocol") or "tcp"
        purpose = "  inn ssh " + vm["name"] if ssh and one["host"] == vm.get("ssh_port") else ""
        lines.append(
            (
                "" if index else "Ports",
                [endpoint(address, one["host"]), (" → ", "dim"), f"{one['guest']}/{protocol}", (purpose, "dim")],
            )
        )
    return lines


def _firewall(firewall: dict[str, Any]) -> str:
    denied = [way for way, name in (("in", "inbound"), ("out", "outbound")) if firewall.get(name) == "deny"]
    count = len(firewall.get("rules") or ())
    rules = f"{count} rule{'' if count == 1 else 's'}" if count else ""
    return ", ".join(filter(None, (rules, f"else nothing {' or '.join(denied)}" if denied else "")))


def _actions(vm: dict[str, Any]) -> list[tuple[str, Any]]:
    actions = vm.get("allowed_actions") or {}
    can = [name for name, answer in actions.items() if answer.get("allowed")]
    rows: list[tuple[str, Any]] = [("Can", ", ".join(can))]
    label = "Cannot"
    reasons: dict[str, list[str]] = {}
    for name, answer in actions.items():
        if not answer.get("allowed"):
            reasons.setdefault(str(answer.get("reason") or ""), []).append(name)
    for reason, names in reasons.items():
        rows.append((label, (", ".join(names) + (f": {reason}" if reason else ""), "dim")))
        label = ""
    return rows
