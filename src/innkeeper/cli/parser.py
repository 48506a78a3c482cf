"""From a command of the table to parsed arguments: one small argparse parser, for the one command that was called."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from typing import NoReturn, TypeVar

from innkeeper.base.errors import InvalidInput
from innkeeper.base.units import parse_duration, parse_rate, parse_size
from innkeeper.cli import terminal
from innkeeper.cli.table import Argument, Command
from innkeeper.client.wishes import parse_publish

LONGEST_USAGE = 120
"""Characters of usage that still help when something is wrong; beyond, `--help` does."""

T = TypeVar("T")

USAGE = 2
"""Exit status for a command line that cannot be understood."""

OUTPUTS = {
    "document": (("json",), "json: as JSON"),
    "list": (("json", "name"), "json: as JSON; name: names only"),
    "report": (("json", "markdown"), "json: as JSON; markdown: as a table of Markdown"),
}


class Parser(argparse.ArgumentParser):
    """Says what is wrong in our form: `inn: what`, then what to do."""

    def error(self, message: str) -> NoReturn:
        usage = " ".join(self.format_usage().split())
        if len(usage) > LONGEST_USAGE:
            usage = ""
        sys.stderr.write(f"inn: {message}\n" + (f"  {usage}\n" if usage else "") + f"  → {self.prog} --help\n")
        raise SystemExit(USAGE)


def build(command: Command) -> Parser:
    """The parser of one command."""
    parser = Parser(
        prog=f"inn {command.name}",
        usage=f"inn {command.name} {synopsis(command)}".rstrip().replace("%", "%%"),
        description=command.help[0].upper() + command.help[1:] + ". " + command.details,
        epilog="examples:\n" + "\n".join(f"  {example}" for example in command.examples),
        formatter_class=_Formatter,
        allow_abbrev=False,
    )
    for argument in all_arguments(command):
        parser.add_argument(*argument.names, help=argument.help.replace("%", "%%"), **argument.options)
    return parser


def parse(command: Command, words: list[str]) -> argparse.Namespace:
    """The arguments of a command; `argv` is what came after `--` where it takes that. Exits with status 2."""
    parser = build(command)
    own, argv = words, []
    if command.rest and "--" in words:
        cut = words.index("--")
        own, argv = words[:cut], words[cut + 1 :]
    args, unknown = parser.parse_known_args(own)
    if unknown and command.rest and not unknown[0].startswith("-"):
        parser.error(f"write the command after --: inn {command.name} {args.vm} -- {' '.join(unknown)}")
    if unknown:
        parser.error(f"not understood: {' '.join(unknown)}")
    args.argv = argv
    args.parser = parser
    if not hasattr(args, "output"):
        args.output = "text"
    return args


def usage_error(args: argparse.Namespace, message: str) -> InvalidInput:
    """What is wrong with the words of this command, to raise; ends with status 2."""
    return UsageError(message, hint=f"see `{args.parser.prog} --help`")


class UsageError(InvalidInput):
    """The words of a command do not fit together."""


def size(text: str) -> int:
    """An argument like `2G`, as bytes."""
    return _checked(parse_size, text)


def duration(text: str) -> float:
    """An argument like `90s`, as seconds."""
    return _checked(parse_duration, text)


def rate(text: str) -> int:
    """An argument like `100mbit`, as bits per second."""
    return _checked(parse_rate, text)


def new_rate(text: str) -> int | str:
    """The same, or `none`."""
    return text if text == "none" else rate(text)


def lifetime(text: str) -> float | str:
    """An argument like `3d`, as seconds, or `never`."""
    return text if text == "never" else duration(text)


def ports(text: str) -> str:
    """An argument like `8080:80`, looked through."""
    _checked(parse_publish, text)
    return text


def _checked(parse: Callable[[str], T], text: str) -> T:
    try:
        return parse(text)
    except InvalidInput as error:
        raise argparse.ArgumentTypeError(f"{error.detail}; {error.hint}") from None


def all_arguments(command: Command) -> tuple[Argument, ...]:
    """The command's own arguments, and `-o` where it prints."""
    if not command.output:
        return command.arguments
    choices, words = OUTPUTS[command.output]
    return (
        *command.arguments,
        Argument(
            ("-o", "--output"),
            words,
            {"choices": ("text", *choices), "default": "text", "metavar": "FORMAT"},
        ),
    )


def synopsis(command: Command) -> str:
    """`VM [--force] [--timeout TIME]`."""
    words: list[str] = []
    for argument in all_arguments(command):
        options = argument.options
        if argument.positional:
            word = str(options.get("metavar") or "|".join(options.get("choices", ())))
            count = options.get("nargs")
            words.insert(
                sum(not w.startswith("[-") for w in words),
                {"?": f"[{word}]", "*": f"[{word}…]", "+": f"{word}…"}.get(str(count), word),
            )
            continue
        text = argument.names[0]
        if argument.takes_value:
            text += " " + str(options.get("metavar") or "|".join(options["choices"]))
        words.append(text if options.get("required") else f"[{text}]")
    if command.rest:
        words.append("[-- COMMAND…]" if command.name == "ssh" else "-- COMMAND…")
    return " ".join(words)


class _Formatter(argparse.RawDescriptionHelpFormatter):
    """Wraps the description, keeps the examples as they are."""

    def __init__(self, prog: str) -> None:
        # The width is told, since argparse would import shutil (3 ms) to find it, and needs none unless help is shown.
        super().__init__(prog, max_help_position=26, width=min(terminal.width(), 100) - 2)

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        if text.startswith("examples:"):
            return super()._fill_text(text, width, indent)
        return argparse.HelpFormatter._fill_text(self, text, width, indent)
