"""The shape of the command table, and how a line of words finds its command in it.

Why our own table instead of typer: importing typer takes 70 ms, argparse 12 ms, and `inn ls` has 8 starts of a bare
Python (about 120 ms) to do all it does. A parser is built for the one command that was called (`parser.py`).
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

Completes = Literal["", "vm", "image", "network", "operation", "recipe", "file", "command"]
Output = Literal["", "document", "list", "report"]


class Argument(NamedTuple):
    """One argument or option, as argparse takes it."""

    names: tuple[str, ...]
    help: str
    options: dict[str, Any] = {}  # noqa: RUF012 - a NamedTuple's default, never changed
    completes: Completes = ""

    @property
    def positional(self) -> bool:
        return not self.names[0].startswith("-")

    @property
    def takes_value(self) -> bool:
        return self.positional or "action" not in self.options or self.options["action"] == "append"


class Command(NamedTuple):
    """One command: its words, the code that does it, and everything that is said about it."""

    name: str
    section: str
    help: str
    call: str
    """`module:function` within innkeeper.cli; called with the SDK and the parsed arguments, returns the exit status."""
    arguments: tuple[Argument, ...]
    examples: tuple[str, ...]
    output: Output = ""
    """What `-o json` prints; a list can also be printed with `-o name`, a report with `-o markdown`. Empty: it prints
    nothing of its own."""
    details: str = ""
    rest: bool = False
    """Takes a command line after `--`."""


def find(commands: tuple[Command, ...], words: list[str]) -> tuple[Command | None, list[str]]:
    """The command that the words begin with, and the words after it."""
    table = {command.name: command for command in commands}
    if len(words) > 2 and " ".join(words[:2]) not in table and (turned := f"{words[0]} {words[2]}") in table:
        return table[turned], [words[1], *words[3:]]  # the object first: `inn firewall web ls`
    for count in (2, 1):
        if (name := " ".join(words[:count])) in table and len(words) >= count:
            return table[name], words[count:]
    return None, words


def nearest(commands: tuple[Command, ...], word: str) -> str:
    """The command that was probably meant, or ''."""
    import difflib

    names = sorted({command.name for command in commands} | {command.name.split()[0] for command in commands})
    if word in SYNONYMS:
        return SYNONYMS[word]
    return next(iter(difflib.get_close_matches(word, names, n=1, cutoff=0.6)), "")


SYNONYMS = {
    "boot": "start",
    "create": "launch",
    "delete": "rm",
    "destroy": "rm",
    "down": "stop",
    "images": "image ls",
    "kill": "stop",
    "list": "ls",
    "new": "launch",
    "ops": "op ls",
    "ps": "ls",
    "reboot": "restart",
    "remove": "rm",
    "run": "launch",
    "shell": "ssh",
    "show": "info",
    "shutdown": "stop",
    "status": "info",
    "suspend": "pause",
    "unpause": "resume",
    "up": "apply",
}
"""What people call our commands who come from elsewhere."""
