"""`inn completion bash|zsh|fish`: shell code made from the command table.

Names of VMs, images and operations are asked for when they are completed (`inn ls -o name`), without ever starting a
daemon for it.
"""

from __future__ import annotations

from argparse import Namespace

from innkeeper.cli import terminal
from innkeeper.cli.commands import COMMANDS
from innkeeper.cli.parser import all_arguments
from innkeeper.cli.table import Argument, Command
from innkeeper.client import Innkeeper

NAMES = {
    "vm": "inn ls -o name",
    "image": "inn image ls -o name",
    "network": "inn network ls -o name",
    "operation": "inn op ls -o name",
    "recipe": "inn image ls --recipes -o name",
}
"""How the shell gets the candidates of each kind."""


def completion(inn: Innkeeper, args: Namespace) -> int:
    terminal.say({"bash": bash, "zsh": zsh, "fish": fish}[args.shell]())
    return 0


def _ask(kind: str) -> str:
    return f"$(INNKEEPER_NO_AUTOSTART=1 {NAMES[kind]} 2>/dev/null)"


def _values(argument: Argument) -> str:
    """Candidates for the value of an argument, as shell text; `@file` for files."""
    if choices := argument.options.get("choices"):
        return " ".join(choices)
    if argument.completes == "file":
        return "@file"
    if argument.completes == "command":
        return " ".join(_words())
    return _ask(argument.completes) if argument.completes else ""


def _words() -> list[str]:
    return list(dict.fromkeys(command.name.split()[0] for command in COMMANDS))


def _groups() -> dict[str, list[str]]:
    groups: dict[str, list[str]] = {}
    for command in COMMANDS:
        first, _, second = command.name.partition(" ")
        if second:
            groups.setdefault(first, []).append(second)
    return groups


def _options(command: Command) -> list[Argument]:
    return [argument for argument in all_arguments(command) if not argument.positional]


def _candidates() -> str:
    """A function for bash and zsh: the command and the word before the cursor → candidates on stdout."""
    lines = ["_inn_candidates() {", '  case "$1|$2" in']
    for command in COMMANDS:
        for option in _options(command):
            if option.takes_value:
                patterns = "|".join(f'"{command.name}|{name}"' for name in option.names)
                lines.append(f'    {patterns}) echo "{_values(option)}"; return;;')
    lines += ["  esac", '  case "$3" in -*) case "$1" in']
    for command in COMMANDS:
        flags = " ".join(name for option in _options(command) for name in option.names)
        lines.append(f'    "{command.name}") echo "{(flags + " --help").strip()}"; return;;')
    lines += ["  esac;; esac", '  case "$1" in', f'    "") echo "{" ".join(_words())}";;']
    lines += [f'    "{group}") echo "{" ".join(seconds)}";;' for group, seconds in _groups().items()]
    for command in COMMANDS:
        values = list(dict.fromkeys(_values(a) for a in command.arguments if a.positional and _values(a)))
        if values:
            lines.append(f'    "{command.name}") echo "{" ".join(values)}";;')
    return "\n".join([*lines, "  esac", "}"])


def _command_words() -> str:
    """Shell code that finds the command among the words typed so far."""
    groups = "|".join(_groups())
    return f"""  local command="" word
  for word in "$@"; do
    case "$word" in -*) continue;; esac
    if [ -z "$command" ]; then command="$word"; case "$command" in {groups}) continue;; *) break;; esac; fi
    command="$command $word"; break
  done
  echo "$command\""""


def bash() -> str:
    """For bash: eval it."""
    return f"""# bash completion for inn; use: eval "$(inn completion bash)"
{_candidates()}
_inn_command() {{
{_command_words()}
}}
_inn() {{
  local cur="${{COMP_WORDS[COMP_CWORD]}}" prev="${{COMP_WORDS[COMP_CWORD-1]}}" word
  for word in "${{COMP_WORDS[@]:1:COMP_CWORD-1}}"; do
    if [ "$word" = "--" ]; then COMPREPLY=($(compgen -c -f -- "$cur")); return; fi
  done
  local command="$(_inn_command "${{COMP_WORDS[@]:1:COMP_CWORD-1}}")"
  local found="$(_inn_candidates "$command" "$prev" "$cur")"
  case "$found" in
    *@file*) compopt -o filenames 2>/dev/null; COMPREPLY=($(compgen -f -W "${{found//@file/}}" -- "$cur"));;
    *) COMPREPLY=($(compgen -W "$found" -- "$cur"));;
  esac
}}
complete -F _inn inn"""


def zsh() -> str:
    """For zsh: eval it after compinit."""
    return f"""# zsh completion for inn; use: eval "$(inn completion zsh)" after compinit
{_candidates()}
_inn_command() {{
{_command_words()}
}}
_inn() {{
  local cur="$words[CURRENT]" prev="$words[CURRENT-1]"
  if (( ${{words[(I)--]}} && ${{words[(I)--]}} < CURRENT )); then _normal; return; fi
  local command="$(_inn_command "${{(@)words[2,CURRENT-1]}}")"
  local -a found=(${{=$(_inn_candidates "$command" "$prev" "$cur")}})
  if (( ${{found[(I)@file]}} )); then _files; found=(${{found:#@file}}); fi
  (( $#found )) && compadd -- $found
}}
compdef _inn inn"""


def fish() -> str:
    """For fish: into ~/.config/fish/completions/inn.fish."""
    lines = ["# fish completion for inn", "complete -c inn -f"]
    groups = _groups()
    for word in _words():
        own = next((command.help for command in COMMANDS if command.name == word), "")
        text = own or f"{', '.join(groups.get(word, ()))}"
        lines.append(f"complete -c inn -n __fish_use_subcommand -a {word} -d {_fish(text)}")
    for command in COMMANDS:
        first, _, second = command.name.partition(" ")
        seen = f"__fish_seen_subcommand_from {first}"
        if second:
            siblings = " ".join(groups[first])
            unseen = f"{seen}; and not __fish_seen_subcommand_from {siblings}"
            lines.append(f"complete -c inn -n {_fish(unseen)} -a {second} -d {_fish(command.help)}")
            seen += f"; and __fish_seen_subcommand_from {second}"
        tails = (_fish_argument(argument) for argument in all_arguments(command))
        lines += [f"complete -c inn -n {_fish(seen)} {tail}".rstrip() for tail in tails]
    return "\n".join(line for line in lines if not line.endswith("@none"))


def _fish_argument(argument: Argument) -> str:
    values = _values(argument)
    if values == "@file":
        tail = "-F"
    elif argument.completes in NAMES:
        tail = f"-a {_fish('(env INNKEEPER_NO_AUTOSTART=1 ' + NAMES[argument.completes] + ' 2>/dev/null)')}"
    else:
        tail = f"-a {_fish(values)}" if values else ""
    if argument.positional:
        return tail or "@none"
    names = " ".join(f"-l {n[2:]}" if n.startswith("--") else f"-s {n[1:]}" for n in argument.names)
    required = " -r" if argument.takes_value else ""
    return f"{names}{required} {tail} -d {_fish(argument.help)}".replace("  ", " ")


def _fish(text: str) -> str:
    """Quoted for fish."""
    return "'" + text.replace("\\", "\\\\").replace("'", "\\'") + "'"
