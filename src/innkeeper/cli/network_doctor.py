"""`inn network doctor`."""

from __future__ import annotations

from argparse import Namespace
from typing import Any

from innkeeper.cli import terminal
from innkeeper.client import Innkeeper

LEVELS = {"error": ("✗", "red"), "warning": ("!", "yellow"), "note": ("·", "dim")}


def doctor(inn: Innkeeper, args: Namespace) -> int:
    """Print the findings; 1 where one is left that is more than a note."""
    found = inn.network_doctor(args.network, fix=args.fix)
    if args.output == "json":
        terminal.emit_json(found)
    elif found:
        terminal.say("\n\n".join(_finding(finding) for finding in found))
    else:
        networks = [args.network] if args.network else [network["name"] for network in inn.networks()]
        what = f"nothing is wrong with {', '.join(networks)}" if networks else "there is no network to look at"
        terminal.say(terminal.clean(what))
    return 1 if any(finding["level"] != "note" and not finding["fixed"] for finding in found) else 0


def _finding(finding: dict[str, Any]) -> str:
    mark, style = ("✓", "green") if finding["fixed"] else LEVELS[finding["level"]]
    state = "  put right" if finding["fixed"] else ""
    names = f": {', '.join(finding['networks'])}" if finding["networks"] else ""
    heading = terminal.paint(f"{mark} {terminal.clean(finding['what'])}", f"bold {style}" if style != "dim" else style)
    code = terminal.paint(f"  {finding['code']}{names}{state}", "dim")
    lines = [f"{heading}{code}"]
    rows = [("seen", line, "") for line in finding["evidence"]] + [("so", finding["consequence"], "")]
    if not finding["fixed"]:
        rows += [("fix", line, "bold") for line in finding["fix"]]
    last = ""
    for label, text, style in rows:
        shown = label if label != last else ""
        last = label
        lines.append(f"  {terminal.paint(shown.ljust(6), 'cyan')}{terminal.paint(terminal.clean(text), style)}")
    return "\n".join(lines)
