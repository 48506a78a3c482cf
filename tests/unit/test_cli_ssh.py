"""ssh and cp over a real sshd, which stands for the guest's."""

from __future__ import annotations

import getpass
import os
import shutil
import socket
import subprocess
from pathlib import Path

import pytest

from innkeeper.base.errors import InvalidInput
from innkeeper.cli import copy
from innkeeper.cli.guest_shell import SshShell
from innkeeper.cli.ssh import full_command_line, wait_for_sshd
from innkeeper.client import Innkeeper

SSHD = shutil.which("sshd", path="/usr/sbin:/usr/bin:/sbin")
pytestmark = pytest.mark.skipif(SSHD is None, reason="needs sshd: apt-get install openssh-server")


@pytest.fixture
def way(tmp_path, monkeypatch):
    """What the API says of a guest whose SSH server is one of this host, with the keys of this test only."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("SUDO_USER", raising=False)
    monkeypatch.delenv("XDG_CONFIG_HOME", raising=False)
    for name in ("host", "mine", "other"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(tmp_path / name)], check=True)
    (tmp_path / "authorized").write_text((tmp_path / "mine.pub").read_text())
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    if os.geteuid() == 0:
        Path("/run/sshd").mkdir(mode=0o755, exist_ok=True)
    options = {
        "Port": port, "ListenAddress": "127.0.0.1", "HostKey": tmp_path / "host", "StrictModes": "no",
        "AuthorizedKeysFile": tmp_path / "authorized", "PidFile": "none", "UsePAM": "no", "PermitRootLogin": "yes",
    }  # fmt: skip
    (tmp_path / "sshd_config").write_text("".join(f"{name} {value}\n" for name, value in options.items()))
    assert SSHD
    with (tmp_path / "sshd.log").open("wb") as log:
        server = subprocess.Popen([SSHD, "-D", "-e", "-f", str(tmp_path / "sshd_config")], stderr=log)
    found = {"address": "127.0.0.1", "port": port, "user": getpass.getuser(), "alias": "0123456789ab"}
    found["host_key"] = (tmp_path / "host.pub").read_text().strip()
    wait_for_sshd(found, 10)
    yield found
    server.terminate()
    server.wait()


def run(way, *words: str, identity: str) -> subprocess.CompletedProcess[str]:
    command = full_command_line(way, [identity])
    command[1:1] = ["-o", "BatchMode=yes", "-F", "none"]
    return subprocess.run([*command, *words], capture_output=True, text=True, timeout=30, check=False)


def test_the_guest_is_known_and_nobody_else(way, tmp_path):
    ran = run(way, "echo hi; exit 7", identity=str(tmp_path / "mine"))
    assert (ran.returncode, ran.stdout, ran.stderr) == (7, "hi\n", "")
    pretended = way | {"host_key": (tmp_path / "other.pub").read_text().strip()}
    ran = run(pretended, "echo hi", identity=str(tmp_path / "mine"))
    assert ran.returncode == 255 and not ran.stdout and "Host key verification failed" in ran.stderr
    assert run(way, "true", identity=str(tmp_path / "other")).returncode == 255


def test_files_and_folders_over_ssh(way, tmp_path):
    vm = Innkeeper(tmp_path / "no.sock").vm("web")
    shell = SshShell(full_command_line(way, [str(tmp_path / "mine")]))
    source, guest = tmp_path / "source", tmp_path / "guest's files"
    (source / "sub dir").mkdir(parents=True), guest.mkdir()
    (source / "sub dir" / "$(reboot)").write_bytes(os.urandom(3_000_000))
    (source / "run").write_text("x")
    (source / "run").chmod(0o751)

    copy.upload(vm, shell, source, f"{guest}/")
    there = guest / "source"
    assert (there / "sub dir" / "$(reboot)").read_bytes() == (source / "sub dir" / "$(reboot)").read_bytes()
    assert (there / "run").stat().st_mode & 0o777 == 0o751
    copy.upload(vm, shell, source / "run", str(guest / "-renamed"))
    assert (guest / "-renamed").read_text() == "x"

    copy.download(vm, shell, str(there), tmp_path / "back")
    assert (tmp_path / "back/sub dir/$(reboot)").read_bytes() == (source / "sub dir" / "$(reboot)").read_bytes()
    assert copy.download(vm, shell, str(guest / "-renamed"), tmp_path / "one") == 1
    assert (tmp_path / "one").read_text() == "x"

    with pytest.raises(InvalidInput, match="there is no"):
        copy.download(vm, shell, str(guest / "nothing"), tmp_path / "x")
    with pytest.raises(InvalidInput, match="there is no folder"):
        copy.upload(vm, shell, source, str(guest / "no/such/folder"))
    with pytest.raises(InvalidInput, match="neither a file nor a folder"):
        copy.download(vm, shell, "/dev/null", tmp_path / "x")
    assert not (tmp_path / "x").exists()


def test_a_guest_that_refuses_says_why(way, tmp_path):
    vm = Innkeeper(tmp_path / "no.sock").vm("web")
    command = full_command_line(way, [str(tmp_path / "other")])
    command[1:1] = ["-o", "BatchMode=yes", "-o", "IdentitiesOnly=yes"]
    with pytest.raises(InvalidInput, match="ermission denied"):
        copy.upload(vm, SshShell(command), tmp_path / "host", "/tmp/")


@pytest.mark.parametrize(
    ("text", "place"),
    [
        ("web:/srv", ("web", "/srv")),
        ("web:", ("web", ".")),
        ("./a:b", ("", "./a:b")),
        ("/x", ("", "/x")),
        (":x", ("", ":x")),
    ],
)
def test_which_side_is_a_guest(text, place):
    assert copy.place(text) == place
