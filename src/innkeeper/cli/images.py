"""`inn image …`."""

from __future__ import annotations

import re
from argparse import Namespace
from pathlib import Path
from typing import Any

from innkeeper.base.clock import age
from innkeeper.base.units import format_age, format_size
from innkeeper.cli import templates, terminal
from innkeeper.cli.parser import usage_error
from innkeeper.cli.progress import conclude, conclude_all
from innkeeper.client import Innkeeper, Operation


def build(inn: Innkeeper, args: Namespace) -> int:
    return conclude(args, inn.image_build(args.recipe, name=args.name, replace=args.replace), _made)


def import_(inn: Innkeeper, args: Namespace) -> int:
    path = Path(args.file)
    if not path.is_file():
        raise usage_error(args, f"there is no file {args.file}")
    return conclude(args, inn.image_import(path, name=args.name or _name(path.name), format=args.format), _made)


def pull(inn: Innkeeper, args: Namespace) -> int:
    name = args.name or _name(args.url.split("?")[0].rstrip("/").rpartition("/")[2])
    return conclude(args, inn.image_pull(args.url, sha256=args.sha256, name=name, format=args.format), _made)


def _made(operation: Operation) -> str:
    name = operation.target
    return f"image {name} is ready\n" + terminal.paint(f"  try it: inn launch {name}", "dim")


def _name(file: str) -> str:
    """A file's name as an image's: `My Disk.v2.qcow2` → `my-disk.v2`."""
    stem = file.rpartition(".")[0] or file
    return re.sub(r"[^a-z0-9._-]+", "-", stem.lower()).strip("-._")[:63] or "image"


def ls(inn: Innkeeper, args: Namespace) -> int:
    documents = inn.recipes() if args.recipes else inn.images()
    if args.output == "json":
        terminal.emit_json(documents)
    elif args.output == "name":
        for document in documents:
            terminal.say(document["name"])
    elif args.recipes:
        terminal.say(terminal.table(("RECIPE", "TITLE"), [((one["name"], "bold"), one["title"]) for one in documents]))
    elif documents:
        heads = ("NAME", "KIND", "FORMAT", "SIZE", "STORED", "AGENT", "LOGIN", "AGE")
        terminal.say(terminal.table(heads, [_row(document) for document in documents]))
    else:
        terminal.note("no images yet; build one: inn image build debian-12")
    return 0


def _row(image: dict[str, Any]) -> tuple[terminal.Cell, ...]:
    return (
        (image["name"], "bold"),
        image["kind"],
        image["format"],
        format_size(image["virtual_size"]) if image["virtual_size"] else "-",
        format_size(image["stored_size"]),
        ("yes", "green") if image.get("agent") else ("no", "dim"),
        image.get("user") or "-",
        (format_age(age(image["created"])), "dim"),
    )


def info(inn: Innkeeper, args: Namespace) -> int:
    image = inn.image(args.image)
    if args.output == "json":
        terminal.emit_json(image)
        return 0
    source = image.get("source") or {}
    carries = [text for key, text in (("agent", "guest agent"), ("cloud_init", "cloud-init")) if image.get(key)]
    rows: list[tuple[str, Any]] = [
        ("Image", [(image["name"], "bold"), (f"  {image['kind']}, {image['format']}", "")]),
        ("Size", f"{format_size(image['virtual_size'])} for the guest" if image["virtual_size"] else ""),
        ("Stored", format_size(image["stored_size"])),
        ("Login user", image.get("user") or ""),
        ("Carries", ", ".join(carries)),
        ("Command line", image.get("cmdline") or ""),
        *templates.rows(image),
    ]
    rows += [("Source" if not i else "", f"{key}: {_short(value)}") for i, (key, value) in enumerate(source.items())]
    digests = (image.get("digests") or {}).items()
    rows += [("BLAKE3" if not i else "", (f"{value}  {file}", "dim")) for i, (file, value) in enumerate(digests)]
    rows += [
        ("Used by", ", ".join(image.get("users") or ()) or ("no VM", "dim")),
        ("Id", (f"{image['id']}, made {format_age(age(image['created']))} ago", "dim")),
    ]
    terminal.say(terminal.page([(label, value) for label, value in rows if value]))
    return 0


def _short(value: Any) -> str:
    """A value of the source; long lists by their length (a build has hundreds of packages)."""
    if isinstance(value, (list, dict)):
        return ", ".join(map(str, value)) if len(value) <= 8 else f"{len(value)} (all with -o json)"
    return str(value)


def remove(inn: Innkeeper, args: Namespace) -> int:
    return conclude_all(args, args.images, inn.image_delete, lambda operation: f"image {operation.target} is removed")
