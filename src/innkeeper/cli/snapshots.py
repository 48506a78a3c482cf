"""`inn snapshot …`."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Iterator
from typing import Any

from innkeeper.base.clock import age
from innkeeper.base.units import format_age, format_size
from innkeeper.cli import terminal
from innkeeper.cli.progress import conclude, follow
from innkeeper.client import Innkeeper, Operation

SLOW = 0.5
"""How much slower reads are, as a fraction, when that is worth a colour."""
NO_BACKUP = "a snapshot is no backup: it lies beside the disk it belongs to, and is lost with it"


def create(inn: Innkeeper, args: Namespace) -> int:
    ttl = None if args.ttl == "never" else args.ttl
    operation = inn.vm(args.vm).snapshots.create(
        args.name, note=args.note, ttl=ttl, quiesce=args.quiesce, memory=args.memory
    )

    def say(operation: Operation) -> str:
        warn(operation)
        name = operation.result["snapshot"]
        back = terminal.paint(f"  back to it: inn snapshot restore {operation.target} {name}", "dim")
        memory = operation.result.get("memory")
        what = f", with {_memory(memory)}" if memory else ""
        return f"snapshot {name} of {operation.target} is taken{what}\n{back}"

    return conclude(args, operation, say)


def warn(operation: Operation) -> None:
    """What the operation remarks upon, on stderr."""
    for text in operation.result.get("warnings") or ():
        terminal.note(f"note: {terminal.clean(text)}")


def restore(inn: Innkeeper, args: Namespace) -> int:
    snapshots = inn.vm(args.vm).snapshots
    operation = snapshots.restore(
        args.snapshot,
        keep=not args.no_keep,
        start=args.and_start,
        force=args.force,
        disks_only=args.disks_only,
        paused=args.paused,
    )

    def say(operation: Operation) -> str:
        warn(operation)
        how = operation.result.get("went_on")
        doing = {"running": ", and goes on from there", "paused": ", and is paused there"}.get(how or "", "")
        said = f"{operation.target} is as it was in snapshot {operation.result['snapshot']}{doing}"
        if kept := operation.result.get("kept"):
            undo = f"  undo this: inn snapshot restore {operation.target} {kept}"
            said += f"\n{terminal.paint(undo, 'dim')}"
        return said

    return conclude(args, operation, say)


def remove(inn: Innkeeper, args: Namespace) -> int:
    operation = inn.vm(args.vm).snapshots.delete(args.snapshot)
    return conclude(args, operation, _removed)


def prune(inn: Innkeeper, args: Namespace) -> int:
    return conclude(args, inn.vm(args.vm).snapshots.prune(automatic=args.automatic), _removed)


def _removed(operation: Operation) -> str:
    names = operation.result.get("removed") or []
    what = f"snapshot {', '.join(names)} of {operation.target} removed" if names else "no snapshot had to go"
    return f"{what}; what nobody needs is merged"


def ls(inn: Innkeeper, args: Namespace) -> int:
    overview = inn.vm(args.vm).snapshots.overview()
    found = overview["snapshots"]
    if args.output == "json":
        terminal.emit_json(overview)
    elif args.output == "name":
        for one in found:
            terminal.say(one["name"])
    elif not found:
        terminal.note(f"{args.vm} has no snapshots; take one: inn snapshot create {args.vm}")
    elif args.tree:
        for line in tree(args.vm, overview):
            terminal.say(line)
    else:
        heads = ("NAME", "AGE", "SIZE", "MEMORY", "LAYERS", "EXPIRES", "STATE", "HERE", "NOTE")
        terminal.say(terminal.table(heads, [_row(one) for one in found]))
    if found and args.output == "text":
        terminal.note(terminal.paint(f"{_depth(overview['present'])}; {NO_BACKUP}", "dim"))
    return 0


def _memory(memory: dict[str, Any]) -> str:
    return f"{format_size(memory['size'])} of memory; the guest stood still for {memory['pause'] * 1000:.0f} ms"


def _depth(present: dict[str, Any]) -> str:
    return f"{present['layers']} of at most {present['most_layers']} layers"


def _row(one: dict[str, Any]) -> tuple[terminal.Cell, ...]:
    return (
        (one["name"], "bold"),
        (format_age(age(one["created"])), "dim"),
        format_size(one["stored_size"]),
        format_size(one["memory"]["size"]) if one["memory"] else ("no", "dim"),
        str(one["layers"]),
        _expiry(one),
        ("being removed", "yellow") if one["state"] == "deleting" else "",
        ("you are here", "cyan") if one["here"] else "",
        (one["note"] or "", "dim"),
    )


def _expiry(one: dict[str, Any]) -> terminal.Cell:
    if one["expires"] is None:
        return ("never", "yellow")
    left = -age(one["expires"])
    return (f"in {format_age(left)}", "yellow" if left < 86400 else "")


def tree(vm: str, overview: dict[str, Any]) -> Iterator[str]:
    """Who was taken on top of whom, and where the present is."""
    children: dict[str | None, list[dict[str, Any]]] = {}
    for one in overview["snapshots"]:
        children.setdefault(one["parent"], []).append(one)
    present = overview["present"]

    def below(parent: str | None, indent: str) -> Iterator[str]:
        found: list[dict[str, Any] | None] = [*children.get(parent, [])]
        if present["at"] == parent:
            found.append(None)
        for index, one in enumerate(found):
            last = index == len(found) - 1
            branch = indent + ("└─ " if last else "├─ ")
            if one is None:
                size = terminal.paint(f"  {format_size(present['stored_size'])} since", "dim")
                yield branch + terminal.paint("● you are here", "cyan") + size
                continue
            kind = ", with memory" if one["memory"] else ""
            size = format_size(one["stored_size"])
            facts = f"  {format_age(age(one['created']))}, {size}{kind}  {one['note'] or ''}"
            yield branch + terminal.clean(one["name"]) + terminal.paint(terminal.clean(facts.rstrip()), "dim")
            yield from below(one["name"], indent + ("   " if last else "│  "))

    yield terminal.paint(vm, "bold")
    yield from below(None, "")


def info(inn: Innkeeper, args: Namespace) -> int:
    one = inn.vm(args.vm).snapshots.get(args.snapshot)
    if args.measure:
        one["reads"] = follow(inn.vm(args.vm).snapshots.measure(args.snapshot)).result["disks"]
    if args.output == "json":
        terminal.emit_json(one)
        return 0
    spec = one["spec"]
    machine = "a restore goes back to that, too" if one["memory"] else "a restore leaves that as it is"
    state = "being removed: there is no way back to it" if one["state"] == "deleting" else ""
    rows: list[tuple[str, Any]] = [
        ("Snapshot", [(one["name"], "bold"), f" of {one['vm']}", (", you are here" if one["here"] else "", "cyan")]),
        ("", (state, "yellow") if state else ""),
        ("Note", one["note"]),
        ("Taken", f"{format_age(age(one['created']))} ago, of a {one['taken']} VM"),
        ("Disks", _how(one)),
        ("Memory", _memory(one["memory"]) if one["memory"] else ("no: a restore boots", "dim")),
        ("UEFI", "its variables are part of it" if one["nvram"] else ""),
        ("On top of", one["parent"] or ("nothing", "dim")),
        ("Expires", _expiry(one)),
        ("Size", f"{format_size(one['stored_size'])} of its own, in a chain of {one['layers']}"),
        *(("Reads" if not number else "", _reads(cost)) for number, cost in enumerate(one.get("reads") or ())),
        (
            "Machine",
            (f"{spec['cpus']} vCPU, {format_size(spec['memory'])} RAM then; {machine}", "dim"),
        ),
        ("Kept by", "a restore, as the present that it left" if one["automatic"] else ""),
        ("Backup", (f"no: {NO_BACKUP}", "dim")),
    ]
    terminal.say(terminal.page([(label, value) for label, value in rows if value]))
    return 0


def _reads(cost: dict[str, Any] | None) -> terminal.Cell:
    """Of one disk."""
    if cost is None:
        return ("nothing is stored to measure with", "dim")
    if cost["layers"] == 1:
        return f"{cost['alone'] * 1e6:.1f} µs each: there is one layer"
    more = cost["through"] / cost["alone"] - 1 if cost["alone"] else 0.0
    times = f"{cost['through'] * 1e6:.1f} µs each through {cost['layers']} layers, {cost['alone'] * 1e6:.1f} in one"
    return (f"{times}: {max(0.0, more):.0%} slower", "yellow" if more > SLOW else "")


def _how(one: dict[str, Any]) -> str:
    if one["memory"]:
        return "of the same moment as the memory"
    if one["quiesced"]:
        return "quiesced: the guest had frozen its file systems"
    if one["taken"] in ("running", "paused"):
        return "crash-consistent: as after a power cut at that moment"
    return "of a VM that did not run"
