"""Follow an operation to its end: live lines on a terminal, one plain line per step anywhere else.

Everything goes to stderr; stdout is for results. rich (64 ms to import) is loaded only when an operation lasts longer
than a glance and a person is looking.
"""

from __future__ import annotations

import sys
import time
from argparse import Namespace
from collections.abc import Callable
from typing import TYPE_CHECKING

from innkeeper.cli import terminal
from innkeeper.client.errors import ApiError, InnkeeperError
from innkeeper.client.operation import Operation

if TYPE_CHECKING:
    from rich.console import RenderableType

GLANCE = 0.4
"""Seconds that an operation may take without any display."""

INTERRUPTED = 130


def follow(operation: Operation) -> Operation:
    """Wait for the end, showing progress. Raises `ApiError` when it failed. Ctrl-C leaves it running and exits."""
    try:
        end = time.monotonic() + GLANCE
        while not operation.ended and (left := end - time.monotonic()) > 0:
            operation.poll(left)
        if not operation.ended:
            show = _Live(operation) if terminal.interactive(sys.stderr) else _Plain(operation)
            show.run()
    except KeyboardInterrupt:
        left_running(operation)
        raise SystemExit(INTERRUPTED) from None
    if error := operation.error:
        raise error
    return operation


def left_running(*operations: Operation) -> None:
    """Say that what was begun goes on, and how to see and end it."""
    for operation in operations:
        if not operation.ended:
            terminal.note(
                f"\n{operation.kind} of {terminal.clean(operation.target)} goes on in the background:"
                f"\n  see it   inn op show {operation.id} -f\n  end it   inn op cancel {operation.id}"
            )


def conclude(args: Namespace, operation: Operation, say: Callable[[Operation], str]) -> int:
    """Follow one operation, or not with --no-wait, and print its end as `-o` wants it."""
    if not args.no_wait:
        follow(operation)
    _print_one(args, operation, say)
    return 0


def conclude_all(
    args: Namespace, names: list[str], begin: Callable[[str], Operation], say: Callable[[Operation], str]
) -> int:
    """Begin the same on each name, then follow each; one that fails does not keep the others from it."""
    from innkeeper.cli.main import report

    begun: list[Operation] = []
    failed = 0
    for name in dict.fromkeys(names):
        try:
            begun.append(begin(name))
        except ApiError as error:
            failed += 1
            report(error)
    for index, operation in enumerate(begun):
        try:
            if not args.no_wait:
                follow(operation)
        except InnkeeperError as error:
            failed += 1
            report(error)
        except SystemExit:
            left_running(*begun[index + 1 :])
            raise
        else:
            said = say(operation)
            if args.output == "text":
                terminal.say(operation.id if args.no_wait else said)
    if args.output == "json":
        terminal.emit_json([operation.document for operation in begun])
    elif args.output == "name":
        for operation in begun:
            terminal.say(operation.target if operation.error is None else "")
    return 1 if failed else 0


def _print_one(args: Namespace, operation: Operation, say: Callable[[Operation], str]) -> None:
    if args.output == "json":
        terminal.emit_json(operation.document)
    elif args.no_wait:
        terminal.say(operation.id)
    elif text := say(operation):
        terminal.say(text)


class _Plain:
    """One line per step that was reached, however many passed between two answers."""

    def __init__(self, operation: Operation) -> None:
        self._operation = operation
        self._said = 0
        self._undoing = False

    def run(self) -> None:
        self._operation.wait_quietly(self.update)

    def update(self, operation: Operation) -> None:
        steps = operation.steps
        if operation.state == "undoing" and not self._undoing:
            self._undoing = True
            self._line("undoing what was done")
        if operation.state != "running" or operation.step not in steps:
            return
        at = steps.index(operation.step) + 1
        for step in steps[self._said : at]:
            self._line(step)
        self._said = max(self._said, at)

    def _line(self, text: str) -> None:
        sys.stderr.write(f"{terminal.clean(self._operation.target)}: {terminal.clean(text)}\n")
        sys.stderr.flush()


class _Live:
    """All steps so far, the current one with a bar, what it does, and for how long."""

    def __init__(self, operation: Operation) -> None:
        self._operation = operation
        self._began = {operation.step: time.monotonic()}
        self._took: dict[str, float] = {}

    def run(self) -> None:
        from rich.console import Console
        from rich.live import Live
        from rich.spinner import Spinner

        self._spinner = Spinner("dots", style="cyan")
        console = Console(stderr=True, highlight=False)
        with Live(get_renderable=self._render, console=console, refresh_per_second=8) as live:
            self._operation.wait_quietly(self.update)
            live.refresh()

    def update(self, operation: Operation) -> None:
        now = time.monotonic()
        steps = operation.steps
        at = steps.index(operation.step) if operation.step in steps else 0
        done = steps if operation.state == "done" else steps[:at] if operation.state == "running" else []
        for step in done:
            if step in self._began and step not in self._took:
                self._took[step] = now - self._began[step]
        self._began.setdefault(operation.step, now)

    def _render(self) -> RenderableType:
        from rich.console import Group
        from rich.table import Table
        from rich.text import Text

        operation = self._operation
        steps, now = operation.steps, time.monotonic()
        at = steps.index(operation.step) if operation.step in steps else 0
        grid = Table.grid(padding=(0, 1))
        grid.add_column(width=1)
        grid.add_column(min_width=10, no_wrap=True)
        grid.add_column(justify="right", width=6, no_wrap=True)
        grid.add_column(no_wrap=True, overflow="ellipsis")
        title = Text.assemble(
            (operation.kind.replace("-", " "), "dim"), " ", (terminal.clean(operation.target), "bold")
        )
        last = len(steps) if operation.state == "done" else at + 1
        for index, step in enumerate(steps[:last]):
            name = step.replace("-", " ")
            if index < at or operation.state == "done":
                took = self._took.get(step)
                grid.add_row(Text("✓", "green"), name, Text(_clock(took), "dim"), "")
                continue
            elapsed = Text(_clock(now - self._began.get(step, now)), "dim")
            what = Text(terminal.clean(operation.text), "dim")
            if operation.state == "running":
                row = Text.assemble(*_bar(operation.fraction), what, no_wrap=True, overflow="ellipsis")
                grid.add_row(self._spinner, Text(name, "bold"), elapsed, row)
            elif operation.state == "undoing":
                grid.add_row(self._spinner, Text(name, "bold"), elapsed, Text("undoing what was done", "yellow"))
            else:
                grid.add_row(Text("✗", "red"), Text(name, "bold"), elapsed, "")
        return Group(title, grid)


def _bar(fraction: float | None, length: int = 20) -> list[tuple[str, str]]:
    if fraction is None:
        return []
    full = round(min(1.0, max(0.0, fraction)) * length)
    return [("━" * full, "cyan"), ("━" * (length - full), "dim"), (f" {fraction:4.0%}  ", "")]


def _clock(seconds: float | None) -> str:
    if seconds is None:
        return ""
    return f"{seconds:.1f}s" if seconds < 60 else f"{int(seconds) // 60}:{int(seconds) % 60:02d}"
