"""Words → arguments, and what is said about words that make no sense."""

from __future__ import annotations

import pytest

from innkeeper.cli import parser
from innkeeper.cli.commands import COMMANDS
from innkeeper.cli.main import main
from innkeeper.cli.table import find


def parsed(line: str):
    command, rest = find(COMMANDS, line.split())
    assert command is not None
    return parser.parse(command, rest)


def test_what_follows_the_dashes_is_the_guests():
    args = parsed("exec web -e A=1 -- ls -la -- --help")
    assert (args.vm, args.env, args.argv) == ("web", ["A=1"], ["ls", "-la", "--", "--help"])


def test_the_defaults_of_launch_leave_everything_to_the_daemon():
    args = parsed("launch debian-12")
    values = {name: value for name, value in vars(args).items() if name not in ("parser", "argv")}
    assert {name for name, value in values.items() if value} == {"image", "output"}


def test_values_are_understood():
    args = parsed("launch tiny --memory 1.5G --disk 20G --disk 1T -p 8080:80 -p 0.0.0.0:53:53/udp")
    assert args.memory == 3 << 29
    assert args.disk == [20 << 30, 1 << 40]
    assert args.publish == ["8080:80", "0.0.0.0:53:53/udp"]
    assert parsed("stop web --timeout 2m").timeout == 120.0


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("launch tiny --memory 2X", "size '2X' is not understood"),
        ("launch tiny --publish 80", "'80' is not a port to publish"),
        ("launch tiny --publish 0:80", "'0:80' is not a port to publish"),
        ("launch tiny --cpus two", "invalid int value"),
        ("launch tiny --firmware efi", "invalid choice"),
        ("launch", "name an image"),
        ("launch tiny --nic none --publish 1:1", "--nic none"),
        ("launch --iso /nowhere.iso", "there is no such file"),
        ("launch tiny --env NOT_SET_ANYWHERE", "not set here"),
        ("stop web --timeout soon", "duration 'soon' is not understood"),
        ("stop", "the following arguments are required: VM"),
        ("stop web --nonsense", "not understood: --nonsense"),
        ("stop web --forc", "not understood: --forc"),
        ("exec web ls", "write the command after --: inn exec web -- ls"),
        ("exec web", "no command"),
        ("info web -o name", "invalid choice"),
        ("image pull http://example.org/x.qcow2", "--sha256"),
        ("image import /nowhere.qcow2", "there is no file"),
        ("cp a b", "neither side is in a guest"),
        ("help lanch", "there is no command"),
    ],
)
def test_usage_errors_end_with_status_2(line, said, capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("INNKEEPER_HOME", str(tmp_path))
    monkeypatch.setenv("INNKEEPER_NO_AUTOSTART", "1")
    monkeypatch.delenv("NOT_SET_ANYWHERE", raising=False)
    if line == "launch tiny --env NOT_SET_ANYWHERE":
        monkeypatch.setattr("innkeeper.cli.launch._keys", lambda inn, args: ([], []))
    assert main(line.split()) == 2
    out, err = capsys.readouterr()
    assert not out
    assert err.startswith("inn: ") and said in err
    assert "--help" in err or "→" in err


def test_environment_takes_values_from_here(monkeypatch):
    from innkeeper.cli.execute import environment

    monkeypatch.setenv("FROM_HERE", "x=y")
    assert environment(parsed("exec web -- true"), ["A=1", "FROM_HERE", "EMPTY="]) == {
        "A": "1",
        "FROM_HERE": "x=y",
        "EMPTY": "",
    }


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command.name)
def test_the_synopsis_names_every_argument(command):
    synopsis = parser.synopsis(command)
    for argument in parser.all_arguments(command):
        assert (argument.options.get("metavar") if argument.positional else argument.names[0]) or "" in synopsis
