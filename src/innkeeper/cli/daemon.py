"""`inn daemon start|stop|status` and `inn version`."""

from __future__ import annotations

from argparse import Namespace

import innkeeper
from innkeeper.base.clock import age
from innkeeper.base.home import Home
from innkeeper.base.units import format_age
from innkeeper.cli import terminal
from innkeeper.client import Innkeeper, daemon
from innkeeper.client.errors import DaemonUnreachable


def start(inn: Innkeeper, args: Namespace) -> int:
    home = Home.find()
    before = daemon.running(home)
    document = before or daemon.start(home)
    if args.output == "json":
        terminal.emit_json(document | {"running": True, "socket": str(home.socket)})
    else:
        terminal.say(f"innkeeperd {'runs already' if before else 'is running'} (pid {document['pid']}, {home.socket})")
    return 0


def stop(inn: Innkeeper, args: Namespace) -> int:
    pid = daemon.stop(Home.find())
    if args.output == "json":
        terminal.emit_json({"running": False, "stopped": pid})
    elif pid is None:
        terminal.say("innkeeperd was not running")
    else:
        terminal.say(f"innkeeperd (pid {pid}) has ended; guests go on, and it takes them up again when it starts")
    return 0


def status(inn: Innkeeper, args: Namespace) -> int:
    socket = Innkeeper().socket  # which may be the system's, where this user has no daemon of its own
    try:
        document = Innkeeper(socket).version()
    except DaemonUnreachable as error:
        if args.output == "json":
            terminal.emit_json({"running": False, "socket": socket, "reason": error.detail})
        else:
            terminal.say(terminal.paint("● ", "red") + error.detail)
            terminal.say(terminal.paint(f"  → {error.hint}", "dim"))
        return 1
    if args.output == "json":
        terminal.emit_json(document | {"running": True, "socket": socket})
        return 0
    since = format_age(age(document["started"])) if document.get("started") else "?"
    rows: list[tuple[str, terminal.Cell | list[terminal.Cell]]] = [
        ("innkeeperd", [("● ", "green"), f"running for {since}", (f"  pid {document['pid']}", "dim")]),
        ("Version", str(document["version"])),
        ("Data", str(document.get("home", ""))),
        ("Socket", socket),
    ]
    terminal.say(terminal.page(rows))
    return 0


def version(inn: Innkeeper, args: Namespace) -> int:
    """Of both; a daemon that does not run is no failure, and is not started for this."""
    try:
        running = str(Innkeeper().version()["version"])
    except DaemonUnreachable:
        running = ""
    if args.output == "json":
        terminal.emit_json({"inn": innkeeper.__version__, "innkeeperd": running or None})
    else:
        terminal.say(f"inn {innkeeper.__version__}, innkeeperd {running or 'not running'}")
    if running and running != innkeeper.__version__:
        terminal.note("they differ: restart the daemon with `inn daemon stop`; guests go on")
    return 0
