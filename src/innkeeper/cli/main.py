"""The entry point of `inn`: words → command → exit status, and every error as one sentence and a hint."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING

from innkeeper.base.errors import InnkeeperError
from innkeeper.cli import parser, terminal
from innkeeper.cli.commands import COMMANDS
from innkeeper.cli.table import Command, find, nearest
from innkeeper.client import Innkeeper

if TYPE_CHECKING:
    from innkeeper.client.errors import DaemonUnreachable

FAILED, USAGE, INTERRUPTED, PIPE_CLOSED = 1, 2, 130, 141


def main(words: list[str] | None = None) -> int:
    """Run one command line; returns 0, 1 (failed), 2 (usage), or what the guest's command ended with."""
    try:
        status = run(sys.argv[1:] if words is None else words)
        sys.stdout.flush()
        return status
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else USAGE
    except KeyboardInterrupt:
        sys.stderr.write("\n")
        return INTERRUPTED
    except BrokenPipeError:  # `inn ls | head -1`: the reader has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return PIPE_CLOSED
    except Exception as error:
        if os.environ.get("INNKEEPER_DEBUG"):
            raise
        report(error)
        return USAGE if isinstance(error, parser.UsageError) else FAILED


def run(words: list[str]) -> int:
    """Find the command and call it."""
    if not words or words[0] in ("-h", "--help"):
        from innkeeper.cli import helping

        terminal.say(helping.overview(every=bool(words)))
        return 0
    if words[0] in ("-V", "--version"):
        words = ["version", *words[1:]]
    command, rest = find(COMMANDS, words)
    if command is None:
        return _unknown(words)
    args = parser.parse(command, rest)
    return action(command)(Innkeeper(when_unreachable=_start_daemon), args)


def action(command: Command) -> Callable[..., int]:
    """The function of a command, its module imported now."""
    module, function = command.call.split(":")
    found: Callable[..., int] = getattr(importlib.import_module(f"innkeeper.cli.{module}"), function)
    return found


def report(error: BaseException) -> None:
    """Say on stderr what went wrong and what to do; never a traceback (INNKEEPER_DEBUG=1 shows it)."""
    if isinstance(error, InnkeeperError):
        lines = [f"{terminal.paint('inn:', 'red', sys.stderr)} {terminal.clean(error.detail, keep_lines=True)}"]
        for wrong in error.facts.get("errors") or ():
            field, problem = str(wrong.get("field", "")), str(wrong.get("problem", ""))
            if problem and problem not in error.detail:
                lines.append(f"  {terminal.clean(field)}: {terminal.clean(problem)}" if field else f"  {problem}")
        if error.hint:
            lines.append(terminal.paint(f"  → {terminal.clean(error.hint, keep_lines=True)}", "dim", sys.stderr))
    elif isinstance(error, OSError) and error.strerror:
        where = f"{error.filename}: " if error.filename else ""
        lines = [f"{terminal.paint('inn:', 'red', sys.stderr)} {where}{error.strerror}"]
    else:
        lines = [
            f"{terminal.paint('inn:', 'red', sys.stderr)} this is a defect in inn: {type(error).__name__}: {error}",
            "  → run it again with INNKEEPER_DEBUG=1 and report what it prints",
        ]
    sys.stdout.flush()
    sys.stderr.write("\n".join(lines) + "\n")


def _unknown(words: list[str]) -> int:
    group = [command for command in COMMANDS if command.name.split()[0] == words[0]]
    if group and (len(words) == 1 or words[1] in ("-h", "--help")):
        from innkeeper.cli import helping

        terminal.say(helping.section(group))
        return 0 if len(words) > 1 else USAGE
    word = " ".join(words[:2]) if group else words[0]
    guess = nearest(COMMANDS, word)
    sys.stderr.write(f"inn: there is no command {terminal.clean(word)!r}\n")
    sys.stderr.write(f"  → did you mean `inn {guess}`?\n" if guess else "  → `inn help` lists all\n")
    return USAGE


def _start_daemon(error: DaemonUnreachable) -> None:
    """Nobody answers: start this user's daemon, unless that is not wanted or the socket is not this user's."""
    from innkeeper.base.home import Home
    from innkeeper.client import daemon
    from innkeeper.client.api import find_socket

    home = Home.find()
    if os.environ.get("INNKEEPER_NO_AUTOSTART") == "1":
        raise error
    if find_socket() != str(home.socket):
        error.hint = "start it with `sudo inn daemon start`"
        raise error
    daemon.start(home)


def entry() -> None:
    """For `python -m innkeeper.cli.main`."""
    sys.exit(main())


if __name__ == "__main__":
    entry()
