"""`inn publish`, `inn unpublish`, `inn ports`."""

from __future__ import annotations

import getpass
import os
from argparse import Namespace
from typing import Any

from innkeeper.base.clock import age
from innkeeper.base.units import format_age, format_size
from innkeeper.cli import terminal
from innkeeper.cli.parser import usage_error
from innkeeper.cli.progress import conclude
from innkeeper.client import Innkeeper, Operation
from innkeeper.client.wishes import endpoint

HEADS = ("HOST", "VM", "GUEST", "NETWORK", "BY", "SINCE", "TRAFFIC", "LAST", "NOTE")


def publish(inn: Innkeeper, args: Namespace) -> int:
    where = {"address": args.bind} if args.bind else {}
    operation = inn.vm(args.vm).publish(args.mapping, nic=args.nic, note=args.note, by=_who(), **where)
    return conclude(args, operation, lambda done: _published(inn, done, args.mapping))


def _who() -> str:
    return os.environ.get("SUDO_USER") or getpass.getuser()


def _published(inn: Innkeeper, operation: Operation, mapping: str) -> str:
    host = mapping.partition("/")[0].split(":")[-2]
    (port,) = [each for each in inn.ports() if each["vm"] == operation.target and str(each["host"]) == host][:1]
    running = inn.vm(operation.target).state in ("running", "paused")
    return f"{_host(port)} leads to {_guest(port)} of {port['vm']}" + ("" if running else " from its next start on")


def unpublish(inn: Innkeeper, args: Namespace) -> int:
    port, _, protocol = args.port.partition("/")
    if not port.isdecimal() or protocol not in ("", "tcp", "udp"):
        raise usage_error(args, f"{args.port!r} is not a port like 8080 or 53/udp")
    operation = inn.vm(args.vm).unpublish(int(port), protocol or "tcp")
    return conclude(args, operation, lambda done: f"port {args.port} leads into {done.target} no more")


def ls(inn: Innkeeper, args: Namespace) -> int:
    documents = inn.ports()
    if args.output == "json":
        terminal.emit_json(documents)
    elif args.output == "markdown":
        terminal.say(_markdown(documents))
    elif documents:
        terminal.say(terminal.table(HEADS, [_row(port) for port in documents]))
    else:
        terminal.note("no port leads into a VM; publish one: inn publish VM 8080:80")
    return 0


def _row(port: dict[str, Any]) -> tuple[terminal.Cell, ...]:
    return (
        (_host(port), "bold"),
        port["vm"],
        _guest(port),
        port["network"] or ("user-mode NAT", "dim"),
        (port["by"], "dim"),
        (format_age(age(port["since"])), "dim"),
        *_traffic(port),
        port["note"],
    )


def _traffic(port: dict[str, Any]) -> tuple[terminal.Cell, terminal.Cell]:
    if port["packets"] is None:
        return ("not counted", "dim"), ""
    if port["last"] is None:
        return ("none", "dim"), ("", "dim")
    return f"{port['packets']} packets, {format_size(port['bytes'])}", f"{format_age(age(port['last']))} ago"


def _markdown(documents: list[dict[str, Any]]) -> str:
    rows = [[cell if isinstance(cell, str) else cell[0] for cell in _row(port)] for port in documents]
    for row, port in zip(rows, documents, strict=True):
        row[5] = port["since"]
        row[7] = port["last"] or ""
    lines = [[head.capitalize() if head != "VM" else head for head in HEADS], ["---"] * len(HEADS), *rows]
    return "\n".join("| " + " | ".join(_escaped(cell) for cell in line) + " |" for line in lines)


def _escaped(cell: str) -> str:
    return " ".join(cell.replace("\\", "\\\\").replace("|", "\\|").split())


def _host(port: dict[str, Any]) -> str:
    return f"{endpoint(port['address'], port['host'])}/{port['protocol']}"


def _guest(port: dict[str, Any]) -> str:
    return f"{port['to']}:{port['guest']}" if port["to"] else f"port {port['guest']}"
