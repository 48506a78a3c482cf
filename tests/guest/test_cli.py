"""`inn` with a guest that runs: commands, files, the console, what it printed and shows."""

from __future__ import annotations

import json
import os
import pty
import select
import subprocess
import sys
import termios
import time

import pytest

pytestmark = pytest.mark.guest

INN = [sys.executable, "-c", "import sys; from innkeeper.cli.main import main; sys.exit(main())"]


@pytest.fixture
def env(daemon, tmp_path):
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("INNKEEPER_", "SUDO_"))}
    return kept | {"INNKEEPER_HOME": str(daemon.home.data), "HOME": str(tmp_path), "TERM": "xterm"}


@pytest.fixture
def inn(guest, env):
    """Run `inn` with bytes in and out; the guest runs."""

    def run(*words: str, stdin: bytes = b"") -> subprocess.CompletedProcess[bytes]:
        return subprocess.run([*INN, *words], input=stdin, capture_output=True, env=env, timeout=240, check=False)

    return run


def test_streams_and_status_pass_through(inn):
    every_byte = bytes(range(256)) * 40
    ran = inn("exec", "shared", "--", "sh", "-c", "cat; echo oops >&2; exit 7", stdin=every_byte)
    assert (ran.returncode, ran.stdout, ran.stderr) == (7, every_byte, b"oops\n")
    ran = inn("exec", "shared", "-o", "json", "-n", "-e", "A=b c", "--cwd", "/etc", "--", "sh", "-c", "echo $A; pwd")
    assert json.loads(ran.stdout) == {"stdout": "b c\n/etc\n", "stderr": "", "status": 0}
    assert inn("exec", "shared", "-n", "--", "sh", "-c", "kill -9 $$").returncode == 137


def test_much_stdin_goes_by_a_file_that_is_gone_afterwards(inn):
    data = os.urandom(1_500_000)
    assert inn("exec", "shared", "--", "cat", stdin=data).stdout == data
    left = inn("exec", "shared", "-n", "--", "ls", "-A", "/tmp").stdout
    assert b"innkeeper-stdin" not in left


def test_files_and_folders_there_and_back(inn, tmp_path):
    source = tmp_path / "source"
    (source / "sub").mkdir(parents=True)
    (source / "sub" / "it's").write_bytes(os.urandom(300_000))
    (source / "run").write_text("x")
    (source / "run").chmod(0o751)
    (source / "link").symlink_to("run")
    try:
        assert inn("cp", str(source), "shared:/tmp/").returncode == 0
        assert inn("cp", "shared:/tmp/source", "shared:/tmp/second").returncode == 0
        assert inn("cp", "shared:/tmp/second", str(tmp_path / "back")).returncode == 0
        assert (tmp_path / "back/sub/it's").read_bytes() == (source / "sub/it's").read_bytes()
        assert (tmp_path / "back/run").stat().st_mode & 0o777 == 0o751
        assert (tmp_path / "back/link").readlink().as_posix() == "run"
        assert inn("cp", "shared:/tmp/source/run", str(tmp_path / "one")).returncode == 0
        assert (tmp_path / "one").read_text() == "x" and (tmp_path / "one").stat().st_mode & 0o777 == 0o751
        lost = inn("cp", "shared:/no/such/file", str(tmp_path / "x"))
        assert lost.returncode == 1 and b"there is no /no/such/file in shared" in lost.stderr
        lost = inn("cp", str(source), "shared:/no/such/folder")
        assert lost.returncode == 1 and b"there is no folder /no/such in shared" in lost.stderr
        assert not (tmp_path / "x").exists()
    finally:
        inn("exec", "shared", "-n", "--", "rm", "-rf", "/tmp/source", "/tmp/second")


def test_what_it_printed_and_shows(inn, tmp_path):
    assert len(inn("logs", "shared", "--tail", "2").stdout.splitlines()) <= 2
    assert inn("logs", "shared").stdout
    first = inn("logs", "shared", "-o", "json").stdout.splitlines()[0]
    assert set(json.loads(first)) == {"line"}
    assert inn("screenshot", "shared", str(tmp_path / "s.png")).returncode == 0
    assert (tmp_path / "s.png").read_bytes().startswith(b"\x89PNG")
    assert inn("screenshot", "shared", "-").stdout.startswith(b"\x89PNG")
    ran = inn("ssh", "shared")
    assert ran.returncode == 1 and b"SSH" in ran.stderr


def _until(leader: int, wanted: bytes, seconds: float = 60) -> bytes:
    seen = b""
    end = time.monotonic() + seconds
    while wanted not in seen and time.monotonic() < end:
        if select.select([leader], [], [], 1)[0]:
            try:
                seen += os.read(leader, 65536)
            except OSError:  # the last process of the terminal has gone
                break
    assert wanted in seen, seen
    return seen


def test_the_console_is_the_terminal_until_it_is_left(guest, env):
    leader, follower = pty.openpty()
    before = termios.tcgetattr(follower)
    process = subprocess.Popen(
        [*INN, "console", "shared"], stdin=follower, stdout=follower, stderr=follower, env=env, start_new_session=True
    )
    _until(leader, b"ctrl-] leaves")
    time.sleep(1)  # until the terminal is raw; what is typed before would be seen by it instead of the guest
    os.write(leader, b"echo $((6*7))x\r")
    _until(leader, b"42x")
    assert termios.tcgetattr(follower) != before
    os.write(leader, b"\x1d")
    _until(leader, b"left the console")
    assert process.wait(30) == 0
    assert termios.tcgetattr(follower) == before
    os.close(leader), os.close(follower)


def test_nothing_is_remembered_of_a_guest_that_is_removed(inn, daemon, tmp_path):
    assert inn("launch", "tiny", "--name", "forgotten", "--memory", "160M", "--no-start").returncode == 0
    kept = tmp_path / ".config/innkeeper/guests" / daemon.inn.vm("forgotten").info["id"]
    kept.mkdir(parents=True)
    (kept / "known_hosts").write_text("key")
    assert inn("rm", "forgotten").stdout == b"forgotten is removed\n"
    assert not kept.exists()
