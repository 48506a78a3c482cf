"""`inn op …`."""

from __future__ import annotations

from argparse import Namespace
from typing import Any

from innkeeper.base.clock import age
from innkeeper.base.units import format_age
from innkeeper.cli import terminal
from innkeeper.cli.progress import follow
from innkeeper.client import Innkeeper, Operation
from innkeeper.client.errors import InnkeeperError


def ls(inn: Innkeeper, args: Namespace) -> int:
    found = inn.operations(state=args.state, target=args.target)
    if args.output == "json":
        terminal.emit_json([operation.document for operation in found])
    elif args.output == "name":
        for operation in found:
            terminal.say(operation.id)
    elif found:
        terminal.say(
            terminal.table(("ID", "KIND", "TARGET", "STATE", "STEP", "AGE", "NOTE"), [_row(one) for one in found])
        )
    else:
        terminal.note("no operations")
    return 0


def _row(operation: Operation) -> tuple[terminal.Cell, ...]:
    failed = operation.error.detail.splitlines()[0] if operation.error else ""
    return (
        operation.id,
        operation.kind,
        (operation.target, "bold"),
        terminal.state(operation.state),
        "" if operation.ended else operation.step,
        (format_age(age(operation.document["created"])), "dim"),
        (failed, "red") if operation.state == "failed" else (failed or operation.text, "dim"),
    )


def show(inn: Innkeeper, args: Namespace) -> int:
    operation = inn.operation(args.operation)
    if args.follow:
        try:
            follow(operation)
        except InnkeeperError:
            if not operation.ended:
                raise
    _print(args, operation)
    return 0


def cancel(inn: Innkeeper, args: Namespace) -> int:
    operation = inn.operation(args.operation).cancel()
    if not args.no_wait:
        try:
            follow(operation)
        except InnkeeperError:
            if not operation.ended:
                raise
    _print(args, operation)
    return 0 if args.no_wait or operation.state in ("cancelled", "failed") else 1


def _print(args: Namespace, operation: Operation) -> None:
    if args.output == "json":
        terminal.emit_json(operation.document)
        return
    document = operation.document
    rows: list[tuple[str, Any]] = [
        ("Operation", [operation.id, (f"  {operation.kind} ", ""), (operation.target, "bold")]),
        ("State", _state(operation)),
        ("Steps", _steps(operation)),
        ("Doing", "" if operation.ended else operation.text),
        ("Began", f"{format_age(age(document['created']))} ago"),
        ("Ended", f"{format_age(age(document['ended']))} ago" if document.get("ended") else ""),
        ("Result", ", ".join(f"{key} {value}" for key, value in operation.result.items())),
    ]
    if error := operation.error:
        lines = error.detail.splitlines()
        rows.append(("Error", (lines[0], "red")))
        rows += [("", line) for line in lines[1:]]
        rows.append(("", (f"→ {error.hint}", "dim") if error.hint else ""))
    terminal.say(terminal.page([(label, value) for label, value in rows if value]))


def _state(operation: Operation) -> list[terminal.Cell]:
    asked = operation.document.get("cancel_requested") and not operation.ended
    return [terminal.state(operation.state), (", asked to cancel" if asked else "", "yellow")]


def _steps(operation: Operation) -> list[terminal.Cell]:
    cells: list[terminal.Cell] = []
    at = operation.steps.index(operation.step) if operation.step in operation.steps else 0
    for index, step in enumerate(operation.steps):
        done = operation.state == "done" or index < at
        mark = "✓ " if done else "▸ " if index == at and not operation.ended else "✗ " if index == at else "· "
        style = "green" if done else "dim" if index > at else "cyan" if not operation.ended else "red"
        cells += [(mark, style), (step + "  ", "dim" if index > at else "")]
    return cells
