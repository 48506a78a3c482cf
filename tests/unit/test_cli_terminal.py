"""Tables, pages and colours; and that nothing from a guest can move the cursor."""

from __future__ import annotations

import os
import pty
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from innkeeper.cli import host, terminal, vms
from innkeeper.cli.logs import _harmless, _lines, harmless


def test_a_table_is_aligned_and_drops_empty_columns():
    text = terminal.table(("NAME", "STATE", "IMAGE", "NOTE"), [("a", "running", "", ""), ("long-name", "x", "", "why")])
    assert text.splitlines() == ["NAME       STATE    NOTE", "a          running", "long-name  x        why"]


def test_a_note_without_room_goes_below_its_row(monkeypatch):
    monkeypatch.setattr(terminal, "width", lambda: 30)
    rows = [("web", "paused", "the pool is full, and will stay so for a while"), ("db", "running", "")]
    text = terminal.table(("NAME", "STATE", "NOTE"), rows)
    assert text.splitlines() == ["NAME  STATE", "web   paused", "  └ the pool is full, and wil…", "db    running"]


def test_a_page_wraps_under_its_value(monkeypatch):
    monkeypatch.setattr(terminal, "width", lambda: 40)
    lines = terminal.page([("Label", "word " * 12), ("", [("a", "bold"), "b"])]).splitlines()
    assert lines[0].startswith("Label   word") and lines[1].startswith("        word") and lines[-1] == "        ab"
    assert all(len(line) <= 40 for line in lines)


@pytest.mark.parametrize(("fraction", "columns"), [(0, 0), (0.0001, 1), (0.5, 5), (1, 10), (7.5, 10)])
def test_a_bar_is_always_as_long(fraction, columns):
    cells = terminal.bar([(fraction, "green")], 10)
    text = "".join(cell if isinstance(cell, str) else cell[0] for cell in cells)
    assert len(text) == 10 and text.count("█") == columns


@given(st.text())
def test_clean_text_has_no_control_characters(text):
    assert not any(ord(c) < 32 or 127 <= ord(c) < 160 for c in terminal.clean(text))
    assert len(terminal.clean(text)) == len(text)


@given(st.lists(st.text(max_size=20), min_size=3, max_size=3))
def test_a_row_stays_a_row(cells):
    lines = terminal.table(("A", "B", "C"), [cells])
    assert lines.count("\n") == 1 and "\x1b" not in lines


@pytest.mark.parametrize(
    ("printed", "shown"),
    [
        (b"\x1b[0;32mok\x1b[0m\r\n", b"\x1b[0;32mok\x1b[0m\n"),
        (b"\x1b[2J\x1b[H\x1b[1;1Hmenu", b"menu"),
        (b"\x1bcreset\x1b[6nask", b"resetask"),
        (b"\x1b]0;title\x07\x1b]52;c;ZXZpbA==\x07x", b"x"),
        (b"a\x07b\x08c\x7f\td\n", b"abc\td\n"),
        (b"\xc2\x9b2Jx \xc3\xa4", b"2Jx \xc3\xa4"),
    ],
)
def test_a_log_keeps_only_its_colours(printed, shown):
    assert harmless(printed) == shown


@given(st.binary(max_size=60))
def test_no_escape_survives_but_colours(data):
    left = harmless(data, colour=False)
    assert b"\x1b" not in left and not any(byte < 32 and byte not in b"\t\n" for byte in left)


def test_a_sequence_cut_in_two_is_still_one():
    assert b"".join(_harmless([b"a\x1b", b"[2Jb\x1b[3", b"1mred"], True)) == b"ab\x1b[31mred"


def test_lines_come_whole():
    assert list(_lines([b"a\r\nb", b"c\n\nd"])) == [b"a", b"bc", b"", b"d"]


VM = {
    "id": "0123456789ab", "name": "web", "state": "running", "reason": "", "since": "2026-01-01T00:00:00.000Z",
    "created": "2026-01-01T00:00:00.000Z", "image": "debian-12", "cpus": 2, "memory": 2 << 30, "operation": None,
    "ready": True, "agent": True, "pid": 1, "address": "127.0.0.1", "ssh_port": 2222, "user": "debian",
    "forwards": [{"host": 53, "guest": 53, "protocol": "udp", "address": "0.0.0.0"}], "spec": {}, "machine": {},
    "allowed_actions": {},
}  # fmt: skip


def test_the_ports_of_a_vm():
    assert vms.ports(VM) == "2222→22 0.0.0.0:53→53/udp"
    assert vms.ports(VM | {"ssh_port": None, "forwards": []}) == ""


@pytest.mark.parametrize(
    ("change", "remark"),
    [
        ({}, ""),
        ({"ready": False}, ("booting", "dim")),
        ({"state": "paused", "reason": "pool full"}, ("pool full", "red")),
        ({"operation": {"id": "x", "kind": "vm-stop"}}, ("vm-stop", "cyan")),
    ],
)
def test_the_remark_on_a_vm(change, remark):
    assert vms.remark(VM | change) == remark


def test_the_page_of_a_host_says_when_it_is_overcommitted():
    facts = {
        "hostname": "shire", "os": "Debian", "kernel": "6.1", "arch": "x86_64", "virtualized_by": None,
        "cpu": {"model": "CPU", "threads": 2, "cores": 2, "sockets": 1, "numa": []},
        "capacity": {
            "memory_total": 8 << 30, "memory_available": 4 << 30, "memory_promised": 16 << 30, "vcpus": 2,
            "vcpus_promised": 6, "pool_total": 100, "pool_free": 50, "vms": 3, "vms_running": 2,
        },
        "accelerator": {"name": "tcg", "reason": "because", "hint": "do this", "cpu_model": "X"},
    }  # fmt: skip
    text = terminal.page([(label, value) for label, value in host.page(facts) if value])
    for part in (
        "3.0× overcommitted",
        "2.0× overcommitted",
        "because",
        "→ do this",
        "2 running of 3 VMs",
        "not installed",
    ):
        assert part in text
    assert "\x1b" not in text


def on_terminal(code: str, **env: str) -> str:
    """What a piece of Python prints when its stdout is a terminal."""
    leader, follower = pty.openpty()
    environment = {**os.environ, "TERM": "xterm", **env}
    for name in ("CI", "NO_COLOR") if not env else ():
        environment.pop(name, None)
    subprocess.run([sys.executable, "-c", code], stdout=follower, env=environment, check=True)
    os.close(follower)
    try:
        return os.read(leader, 65536).decode()
    finally:
        os.close(leader)


COLOURED = "from innkeeper.cli import terminal; terminal.say(terminal.paint('x', 'bold red'))"


def test_colours_only_where_they_are_shown():
    assert on_terminal(COLOURED) == "\x1b[1;31mx\x1b[0m\r\n"
    assert on_terminal(COLOURED, NO_COLOR="1") == "x\r\n"
    assert on_terminal(COLOURED, TERM="dumb") == "x\r\n"
    piped = subprocess.run([sys.executable, "-c", COLOURED], capture_output=True, check=True)
    assert piped.stdout == b"x\n"
