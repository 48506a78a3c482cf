"""The command table is complete, and everything made from it says the same."""

from __future__ import annotations

import inspect
import subprocess
from pathlib import Path

import pytest

from innkeeper.cli import completion, helping, parser
from innkeeper.cli.commands import COMMANDS
from innkeeper.cli.main import action, main
from innkeeper.cli.table import SYNONYMS, find, nearest

ROOT = Path(__file__).parents[2]
every_command = pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command.name)

PRINTS_NOTHING = {"ssh", "console", "completion", "help"}


@every_command
def test_a_command_is_complete(command):
    assert command.help and not command.help.endswith(".")
    assert command.examples
    for example in command.examples:
        assert f"inn {command.name}" in example
    assert list(inspect.signature(action(command)).parameters) == ["inn", "args"]
    assert bool(command.output) == (command.name not in PRINTS_NOTHING)
    for argument in parser.all_arguments(command):
        assert argument.help and not argument.help.endswith("."), argument.names


@every_command
def test_help_of_a_command(command, capsys):
    assert main([*command.name.split(), "--help"]) == 0
    said = capsys.readouterr().out
    assert said.startswith(f"usage: inn {command.name}")
    assert all(example in said for example in command.examples)
    for argument in parser.all_arguments(command):
        if not argument.positional:
            assert argument.names[0] in said
    assert main(["help", *command.name.split()]) == 0
    assert capsys.readouterr().out == said


@every_command
def test_a_command_is_in_the_documentation_and_in_completion(command):
    assert f"\n### inn {command.name}\n" in helping.markdown()
    assert f'"{command.name}"' in completion.bash() and f'"{command.name}"' in completion.zsh()
    words = command.name.split()
    fish = completion.fish().splitlines()
    assert any(f"-a {words[-1]} " in line for line in fish)
    for argument in parser.all_arguments(command):
        for name in argument.names if not argument.positional else ():
            assert name in completion.bash()
            assert any((f"-l {name[2:]} " if name.startswith("--") else f"-s {name[1:]} ") in line for line in fish)


@every_command
def test_every_command_is_in_the_short_help(command):
    first, _, second = command.name.partition(" ")
    line = next(line for line in helping.overview().splitlines() if line.startswith(f"  {first} "))
    assert second in line


def test_the_documentation_is_the_one_in_the_repository():
    """If this fails: inn help --markdown > docs/cli.md"""
    assert (ROOT / "docs/cli.md").read_text() == helping.markdown()


def test_everything_the_issue_names_is_there():
    names = {command.name for command in COMMANDS}
    wanted = (
        "host launch ls info start stop restart pause resume rm exec ssh cp console logs screenshot apply export "
        "events completion version"
    )
    assert names >= set(wanted.split())
    assert names >= {f"image {verb}" for verb in ("build", "import", "pull", "ls", "info", "rm")}
    assert names >= {f"op {verb}" for verb in ("ls", "show", "cancel")}
    assert names >= {f"daemon {verb}" for verb in ("start", "stop", "status")}


def test_find_takes_the_longest_name():
    command, rest = find(COMMANDS, ["image", "ls", "-o", "json"])
    assert command and command.name == "image ls" and rest == ["-o", "json"]
    assert find(COMMANDS, ["image"])[0] is None
    assert find(COMMANDS, ["ls"])[0] is not None


@pytest.mark.parametrize(
    ("typed", "meant"), [("lanch", "launch"), ("delete", "rm"), ("list", "ls"), ("imag ls", "image ls"), ("qqq", "")]
)
def test_the_nearest_command(typed, meant):
    assert nearest(COMMANDS, typed) == meant


def test_synonyms_lead_to_commands():
    assert set(SYNONYMS.values()) <= {command.name for command in COMMANDS}
    assert not set(SYNONYMS) & {command.name for command in COMMANDS}


def test_an_unknown_command_is_a_usage_error(capsys):
    assert main(["lanch"]) == 2
    said = capsys.readouterr()
    assert not said.out and "did you mean `inn launch`?" in said.err
    assert main(["image", "lss"]) == 2
    assert "inn image ls" in capsys.readouterr().err


def test_a_group_alone_lists_its_commands(capsys):
    assert main(["image"]) == 2
    assert "image pull" in capsys.readouterr().out
    assert main(["image", "--help"]) == 0


def test_inn_alone_shows_how_to_begin(capsys):
    assert main([]) == 0
    assert "inn launch debian-12" in capsys.readouterr().out
    assert main(["--help"]) == 0
    assert "image build" in capsys.readouterr().out


COMPLETE = r"""
source <(cat "$1"); inn() { case "$*" in "ls -o name") echo "web db";; "image ls -o name") echo debian-12;; esac; }
shift; COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); _inn; printf '%s\n' "${COMPREPLY[@]}"
"""


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["inn", "la"], {"launch"}),
        (["inn", "image", "p"], {"pull"}),
        (["inn", "start", ""], {"web", "db"}),
        (["inn", "launch", "deb"], {"debian-12"}),
        (["inn", "launch", "--firmware", ""], {"bios", "uefi"}),
        (["inn", "stop", "--f"], {"--force"}),
        (["inn", "ls", "-o", ""], {"text", "json", "name"}),
        (["inn", "completion", "z"], {"zsh"}),
    ],
)
def test_bash_completes(words, expected, tmp_path):
    script = tmp_path / "completion"
    script.write_text(completion.bash())
    ran = subprocess.run(
        ["bash", "--norc", "-c", COMPLETE, "bash", str(script), *words], capture_output=True, text=True, check=True
    )
    assert set(ran.stdout.split()) == expected, ran.stderr
