"""`inn events`."""

from __future__ import annotations

from argparse import Namespace
from typing import Any

from innkeeper.cli import terminal
from innkeeper.client import Innkeeper

LEVELS = {"warning": "yellow", "error": "red"}


def events(inn: Innkeeper, args: Namespace) -> int:
    """A list, or one by one with --follow (as JSON: one document a line)."""
    found = inn.events(follow=args.follow, tail=args.tail)
    if args.output == "json" and not args.follow:
        terminal.emit_json(list(found))
        return 0
    for event in found:
        if args.output == "json":
            terminal.emit_json(event, line=True)
        elif args.output == "name":
            terminal.say(terminal.clean(event["kind"]))
        else:
            terminal.say(_line(event))
        if args.follow:
            import sys

            sys.stdout.flush()
    return 0


def _line(event: dict[str, Any]) -> str:
    from datetime import datetime

    at = datetime.fromisoformat(event["at"]).astimezone().strftime("%m-%d %H:%M:%S")
    target = terminal.clean((event.get("target") or {}).get("name") or "")
    text = terminal.clean(event.get("text") or event.get("kind", ""))
    style = LEVELS.get(str(event.get("level")), "")
    return f"{terminal.paint(at, 'dim')}  {terminal.paint(target.ljust(14), 'bold')}  {terminal.paint(text, style)}"
