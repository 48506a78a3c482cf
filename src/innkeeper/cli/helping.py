"""`inn`, `inn help` and the Markdown of docs/cli.md: all from the command table."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Iterable

from innkeeper.cli import parser, terminal
from innkeeper.cli.commands import COMMANDS
from innkeeper.cli.table import Command, find
from innkeeper.client import Innkeeper

START_HERE = (
    ("inn image build debian-12", "a golden image, once"),
    ("inn launch debian-12 --name web", "a VM from it"),
    ("inn ssh web", "and in"),
)


def help_(inn: Innkeeper, args: Namespace) -> int:
    if args.markdown:
        terminal.say(markdown().rstrip("\n"))
        return 0
    if not args.words:
        terminal.say(overview(every=True))
        return 0
    command, rest = find(COMMANDS, args.words)
    if command and not rest:
        parser.build(command).print_help()
        return 0
    group = [one for one in COMMANDS if one.name.split()[0] == args.words[0]]
    if group and len(args.words) == 1:
        terminal.say(section(group))
        return 0
    raise parser.usage_error(args, f"there is no command {' '.join(args.words)!r}")


def overview(every: bool = False) -> str:
    """Commands by section; those in groups (`inn image …`) on one line each group, unless `every` is wanted."""
    lines = [
        terminal.paint("inn", "bold") + ": virtual machines that are quick to make, cheap to keep, hard to lose",
        "",
    ]
    for name, commands in _sections():
        lines.append(terminal.paint(name, "bold"))
        lines += _lines(commands, every)
        lines.append("")
    if not every:
        lines.append(terminal.paint("Begin with", "bold"))
        lines += [f"  {command:<34} {terminal.paint(text, 'dim')}" for command, text in START_HERE]
        lines.append("")
    lines.append(terminal.paint("inn COMMAND --help tells more; -o json on every command that prints", "dim"))
    return "\n".join(lines)


def _sections() -> Iterable[tuple[str, list[Command]]]:
    sections: dict[str, list[Command]] = {}
    for command in COMMANDS:
        sections.setdefault(command.section, []).append(command)
    return sections.items()


def _lines(commands: list[Command], every: bool) -> list[str]:
    entries: dict[str, str] = {}
    for command in commands:
        first, _, second = command.name.partition(" ")
        if second and not every:
            entries[first] = f"{entries[first]}|{second}" if first in entries else second
        else:
            entries[command.name] = command.help
    groups = {command.name.split()[0] for command in commands if " " in command.name} if not every else set()
    return [
        f"  {terminal.paint(name.ljust(16), 'cyan')} {terminal.paint(text, 'dim') if name in groups else text}"
        for name, text in entries.items()
    ]


def section(commands: list[Command]) -> str:
    """The commands of one group."""
    return "\n".join([*_lines(commands, True), "", terminal.paint("inn COMMAND --help tells more", "dim")])


def markdown() -> str:
    """docs/cli.md."""
    lines = [
        "# The `inn` command",
        "",
        "<!-- made by `inn help --markdown > docs/cli.md`; a test keeps it so -->",
        "",
        "Every command that prints takes `-o json`; lists also take `-o name`.",
        "The exit status is 0, 1 (failed), 2 (the words were not understood) or 130 (ctrl-C);",
        "`exec` and `ssh` end with the status of the guest's command.",
        "Errors go to stderr as one sentence and a hint; so does progress, and stdout is only ever the result.",
        "",
        "| variable | meaning |",
        "|---|---|",
        "| `INNKEEPER_HOME` | one folder for everything: data, images, VMs and the socket |",
        "| `INNKEEPER_NO_AUTOSTART` | `1`: never start the daemon by itself |",
        "| `INNKEEPER_DEBUG` | show a traceback instead of a sentence |",
        "| `NO_COLOR` | no colours |",
        "| `CI` | plain lines instead of live progress |",
    ]
    for name, commands in _sections():
        lines += ["", f"## {name}"]
        for command in commands:
            lines += _chapter(command)
    return "\n".join(lines) + "\n"


def _chapter(command: Command) -> list[str]:
    lines = [
        "",
        f"### inn {command.name}",
        "",
        f"{command.help[0].upper()}{command.help[1:]}. {command.details}".rstrip(),
    ]
    lines += ["", "    " + f"inn {command.name} {parser.synopsis(command)}".rstrip()]
    arguments = parser.all_arguments(command)
    if arguments:
        lines += ["", "| argument | |", "|---|---|"]
    for argument in arguments:
        value = argument.options.get("metavar") or "|".join(argument.options.get("choices", ()))
        names = value if argument.positional else ", ".join(argument.names)
        if not argument.positional and argument.takes_value:
            names += f" {value}"
        lines.append(f"| `{names.replace('|', chr(92) + '|')}` | {argument.help.replace('|', chr(92) + '|')} |")
    return [*lines, "", *(f"    {example}" for example in command.examples)]
