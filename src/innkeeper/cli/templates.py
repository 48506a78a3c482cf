"""`inn template create`, `ls`, `history`, `verify`."""

from __future__ import annotations

from argparse import Namespace
from typing import Any

from innkeeper.base.clock import age
from innkeeper.base.units import format_age, format_size
from innkeeper.cli import terminal
from innkeeper.cli.progress import conclude, conclude_all
from innkeeper.cli.snapshots import warn
from innkeeper.client import Innkeeper, Operation


def create(inn: Innkeeper, args: Namespace) -> int:
    operation = inn.template_create(
        args.vm, args.name, version=args.version, accept=args.accept, clean=args.clean, note=args.note
    )

    def say(operation: Operation) -> str:
        warn(operation)
        if found := operation.result.get("findings"):
            terminal.note(f"note: accepted, and in every machine made of it:\n{listed(found)}")
        start = terminal.paint(f"  start from it: inn launch {args.name}", "dim")
        return f"{operation.target} is sealed\n{start}"

    return conclude(args, operation, say)


def listed(found: list[dict[str, str]]) -> str:
    """Findings of a scan, a line for each."""
    return "\n".join(f"  {terminal.clean(one['path'])}  ({one['kind']})" for one in found)


def ls(inn: Innkeeper, args: Namespace) -> int:
    images = inn.images()
    found = [image for image in images if image["kind"] == "template"]
    found.sort(key=lambda image: (image["template"]["name"], image["created"]))
    if args.output == "json":
        terminal.emit_json(found)
    elif args.output == "name":
        for image in found:
            terminal.say(image["name"])
    elif not found:
        terminal.note("no templates yet; seal one of a stopped VM: inn template create VM --name T --clean")
        if any(image["kind"] == "warm" for image in images):
            terminal.note("  warm images: inn image ls")
    else:
        heads = ("NAME", "VERSION", "SIZE", "STORED", "OF VM", "BY", "AGE", "NOTE")
        terminal.say(terminal.table(heads, [_row(image) for image in found]))
    return 0


def _row(image: dict[str, Any]) -> tuple[terminal.Cell, ...]:
    template = image["template"]
    return (
        (template["name"], "bold"),
        template["version"],
        format_size(sum(template["disks"])),
        format_size(image["stored_size"]),
        template["vm"],
        (template["by"], "dim"),
        (format_age(age(image["created"])), "dim"),
        (template["note"], "dim"),
    )


def rows(image: dict[str, Any]) -> list[tuple[str, Any]]:
    """What `inn image info` shows of a template besides."""
    template = image.get("template")
    verified = image.get("verified")
    proof: list[tuple[str, Any]] = [
        ("Verified", f"{format_age(age(verified))} ago: its bytes are those that were recorded" if verified else "")
    ]
    if not template:
        return proof
    found = template["accepted"]
    if not template["scanned"]:
        scan: Any = ("nobody has looked for what must not be in it", "yellow")
    elif found:
        scan = (f"{len(found)} accepted, in every machine made of it:", "yellow")
    else:
        scan = "nothing found that must not be in it"
    return [
        ("Sealed", f"of {template['vm']}, by {template['by'] or 'somebody'}"),
        ("Note", template["note"]),
        ("Disks", ", ".join(format_size(size) for size in template["disks"])),
        ("Firmware", template["firmware"].upper()),
        ("Cleaned", "host keys, machine-id, histories, what cloud-init left" if template["cleaned"] else ""),
        ("Scan", scan),
        *(("", f"{one['path']}  ({one['kind']})") for one in found),
        *proof,
    ]


def history(inn: Innkeeper, args: Namespace) -> int:
    document = inn.image_history(args.image)
    if args.output == "json":
        terminal.emit_json(document)
        return 0
    for depth, image in enumerate(document["line"]):
        branch = "   " * (depth - 1) + "└─ " if depth else ""
        below = f", below {', '.join(image['users'])}" if image["users"] else ""
        facts = terminal.clean(f"  {_origin(image)}, {format_age(age(image['created']))} ago{below}")
        terminal.say(branch + terminal.paint(terminal.clean(image["name"]), "bold") + terminal.paint(facts, "dim"))
    if len(document["versions"]) > 1:
        terminal.say("")
        heads = ("VERSION", "OF VM", "BY", "AGE", "NOTE")
        lines = [(image["template"], image) for image in document["versions"]]
        terminal.say(
            terminal.table(
                heads,
                [
                    ((t["version"], "bold"), t["vm"], t["by"], (format_age(age(i["created"])), "dim"), t["note"])
                    for t, i in lines
                ],
            )
        )
    return 0


def _origin(image: dict[str, Any]) -> str:
    if template := image.get("template"):
        return f"sealed of VM {template['vm']} by {template['by'] or 'somebody'}"
    source = image.get("source") or {}
    for key, text in (("recipe", "built from recipe"), ("file", "imported from"), ("url", "pulled from")):
        if key in source:
            return f"{text} {source[key]}"
    return "captured" if image["kind"] == "warm" else "made"


def verify(inn: Innkeeper, args: Namespace) -> int:
    return conclude_all(
        args, args.images, inn.image_verify, lambda operation: f"{operation.target} is what was recorded, byte for byte"
    )
