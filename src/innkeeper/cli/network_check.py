"""`inn network check`."""

from __future__ import annotations

from argparse import Namespace

from innkeeper.cli import terminal
from innkeeper.cli.parser import usage_error
from innkeeper.client import Innkeeper

MARKS = {True: ("✓", "green"), False: ("✗", "bold red"), None: ("?", "yellow")}


def check(inn: Innkeeper, args: Namespace) -> int:
    """Print the hops; 1 where the target is not reached."""
    host, _, port = args.target.rpartition(":")
    host = host.removeprefix("[").removesuffix("]")
    if not host or not port.isdecimal():
        raise usage_error(args, f"{args.target!r} is not like example.com:443 or [fd00::1]:80")
    found = inn.vm(args.vm).network_check(host, int(port), protocol="udp" if args.udp else "tcp")
    if args.output == "json":
        terminal.emit_json(found)
        return 0 if found["reached"] else 1
    wide = max(len(hop["name"]) for hop in found["hops"])
    for hop in found["hops"]:
        mark, style = MARKS[hop["passed"]]
        text = terminal.clean(hop["text"])
        terminal.say(f"{terminal.paint(mark, style)} {hop['name'].ljust(wide)}  {text}")
        for line in hop["evidence"]:
            terminal.say(terminal.paint(f"  {' ' * wide}  {terminal.clean(line)}", "dim"))
    return 0 if found["reached"] else 1
