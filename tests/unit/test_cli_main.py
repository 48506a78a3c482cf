"""`inn` as a program, against a real daemon: what it prints where, and how it ends."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from innkeeper.client import Innkeeper, vm_spec

INN = [sys.executable, "-c", "import sys; from innkeeper.cli.main import main; sys.exit(main())"]


def environment(home, **more: str) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("INNKEEPER_", "SUDO_"))}
    return kept | {"INNKEEPER_HOME": str(home), "INNKEEPER_NO_AUTOSTART": "1", **more}


@pytest.fixture
def inn(daemon, tmp_path):
    """Run `inn` on the daemon."""

    def run(*words: str, stdin: str = "", **env: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*INN, *words],
            input=stdin,
            capture_output=True,
            text=True,
            env=environment(daemon.home.data, HOME=str(tmp_path), **env),
            timeout=120,
            check=False,
        )

    return run


def test_a_life_without_a_guest(inn, daemon):
    made = inn("launch", "tiny", "--name", "cli-life", "--memory", "160M", "--no-start", "-o", "json")
    assert made.returncode == 0, made.stderr
    assert json.loads(made.stdout)["state"] == "done"
    assert all(line.startswith("cli-life: ") for line in made.stderr.splitlines())
    assert "cli-life" in inn("ls", "-o", "name").stdout.split()
    assert "cli-life" in [vm["name"] for vm in json.loads(inn("ls", "-o", "json").stdout)]
    listed = inn("ls").stdout
    assert "cli-life" in listed and "\x1b" not in listed and "160 MiB" in listed
    assert json.loads(inn("info", "cli-life", "-o", "json").stdout)["memory"] == 160 << 20
    assert "stopped" in inn("info", "cli-life").stdout
    exported = inn("export", "cli-life").stdout
    assert "memory: 160M" in exported
    assert inn("apply", "-f", "-", stdin=exported).stdout == "nothing to do\n"
    again = inn("launch", "tiny", "--name", "cli-life")
    assert again.returncode == 1 and "cli-life" in again.stderr and "→" in again.stderr
    assert inn("stop", "cli-life").stdout.startswith("cli-life: it is stopped already")
    both = inn("rm", "cli-life", "cli-nobody")
    assert both.returncode == 1
    assert both.stdout == "cli-life is removed\n" and "cli-nobody" in both.stderr
    assert "cli-life" not in inn("ls", "-o", "name").stdout.split()


@pytest.mark.parametrize(
    ("words", "status", "said"),
    [
        (["info", "nobody"], 1, "nobody"),
        (["launch", "no-such-image", "--name", "x"], 1, "no-such-image"),
        (["op", "show", "nothing"], 1, "nothing"),
        (["ssh", "nobody"], 1, "nobody"),
        (["console", "nobody"], 1, "nobody"),
        (["exec", "nobody", "--", "true"], 1, "nobody"),
        (["cp", "/etc/hostname", "nobody:/tmp/"], 1, "nobody"),
        (["image", "rm", "no-such-image"], 1, "no-such-image"),
        (["apply", "-f", "/nowhere.yaml"], 1, "/nowhere.yaml"),
        (["screenshot", "nobody", "/tmp/x.png"], 1, "nobody"),
    ],
)
def test_an_error_is_a_sentence_on_stderr(inn, words, status, said):
    ran = inn(*words)
    assert (ran.returncode, ran.stdout) == (status, "")
    assert ran.stderr.startswith("inn: ") and said in ran.stderr and "Traceback" not in ran.stderr


def test_debugging_shows_the_traceback(inn):
    assert "Traceback" in inn("info", "nobody", INNKEEPER_DEBUG="1").stderr


@pytest.mark.parametrize(
    "words",
    [["host"], ["ls"], ["image", "ls"], ["image", "info", "tiny"], ["image", "ls", "--recipes"], ["op", "ls"],
     ["events"], ["daemon", "status"], ["version"]],
    ids=" ".join,
)  # fmt: skip
def test_what_prints_prints_json_too(inn, words):
    assert json.loads(inn(*words, "-o", "json").stdout) is not None
    plain = inn(*words)
    assert plain.returncode == 0 and "\x1b" not in plain.stdout


def test_without_a_daemon(tmp_path):
    ran = subprocess.run([*INN, "ls"], capture_output=True, text=True, env=environment(tmp_path), check=False)
    assert ran.returncode == 1 and "not running" in ran.stderr and "inn daemon start" in ran.stderr
    for words, status in ((["version"], 0), (["daemon", "status"], 1), (["daemon", "stop"], 0), (["help"], 0)):
        ran = subprocess.run([*INN, *words], capture_output=True, env=environment(tmp_path), check=False)
        assert ran.returncode == status, words
    assert not list(tmp_path.iterdir())


def test_the_reader_of_a_pipe_may_leave(inn, daemon):
    line = f"{sys.executable} -c 'from innkeeper.cli.main import main; import sys; sys.exit(main())' help | head -1"
    ran = subprocess.run(
        line, shell=True, capture_output=True, text=True, env=environment(daemon.home.data), check=True
    )
    assert ran.stdout.startswith("inn: ") and not ran.stderr


def test_the_daemon_starts_by_itself_and_stops(bare_daemon):
    home = bare_daemon.home
    env = environment(home.data, INNKEEPER_NO_AUTOSTART="0")

    def run(*words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([*INN, *words], capture_output=True, text=True, env=env, timeout=60, check=False)

    try:
        assert run("ls", "-o", "json").stdout == "[]\n"
        pid = Innkeeper(home.socket).version()["pid"]
        assert os.getsid(pid) == pid
        assert f"pid {pid}" in run("daemon", "start").stdout
        assert json.loads(run("daemon", "status", "-o", "json").stdout)["pid"] == pid
        assert f"pid {pid}" in run("daemon", "stop").stdout
        assert _ended(pid)
        assert run("daemon", "stop").stdout == "innkeeperd was not running\n"
        assert home.daemon_log.stat().st_mode & 0o777 == 0o600
    finally:
        run("daemon", "stop")


def _ended(pid: int) -> bool:
    """Gone, or a zombie where the first process of this container reaps nobody."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


def test_a_daemon_that_cannot_start_says_why(tmp_path):
    (tmp_path / "run").write_text("in the way")
    env = environment(tmp_path)
    ran = subprocess.run([*INN, "daemon", "start"], capture_output=True, text=True, env=env, timeout=60, check=False)
    assert ran.returncode == 1 and "last words" in ran.stderr and str(tmp_path) in ran.stderr


@pytest.mark.root
@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to be somebody else")
def test_nobody_starts_a_daemon_on_the_folder_of_another(tmp_path):
    os.chown(tmp_path, 65534, 65534)
    env = environment(tmp_path, INNKEEPER_NO_AUTOSTART="0")
    ran = subprocess.run([*INN, "ls"], capture_output=True, text=True, env=env, check=False)
    assert ran.returncode == 1 and "another user's" in ran.stderr
    assert not list(tmp_path.iterdir())


def test_ctrl_c_leaves_the_operation_running(daemon):
    operation = daemon.inn.create(vm_spec("cli-interrupt", "tiny", memory="160M", disk="1G"))
    while operation.poll().document["step"] != "wait-until-ready":
        time.sleep(0.01)
    os.kill(daemon.inn.vm("cli-interrupt").info["pid"], signal.SIGSTOP)  # it will not be ready
    words = [*INN, "op", "show", operation.id, "-f"]
    process = subprocess.Popen(
        words, stderr=subprocess.PIPE, text=True, env=environment(daemon.home.data),
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # tests in the background inherit «ignored»
    )  # fmt: skip
    try:
        assert process.stderr
        process.stderr.readline()
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=30)
        assert process.returncode == 130
        assert f"inn op show {operation.id} -f" in said and f"inn op cancel {operation.id}" in said
        assert operation.poll().state == "running"
    finally:
        process.kill()
        operation.cancel().wait_quietly()
    assert operation.state == "cancelled"
    assert "cli-interrupt" not in [vm["name"] for vm in daemon.inn.vms()]
