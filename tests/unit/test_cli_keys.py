"""Which SSH keys a new guest gets, and what ssh is told."""

from __future__ import annotations

import os
import re
import subprocess

import pytest

from innkeeper.base.errors import InvalidInput
from innkeeper.cli import identity, keys
from innkeeper.cli.names import friendly_name
from innkeeper.cli.ssh import command_line

KEY = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIK0wmN/Cr3JXqmLW7u+g9pTh+wyqDHpSQEIQczXkVx9q me@here"


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("SUDO_USER", "XDG_CONFIG_HOME"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path


def test_all_public_keys_of_the_user_are_taken_but_no_certificates(home):
    folder = home / ".ssh"
    folder.mkdir()
    (folder / "id_ed25519.pub").write_text(KEY + "\n")
    (folder / "id_rsa.pub").write_text(KEY.replace("me@", "old@"))
    (folder / "id_ed25519-cert.pub").write_text("ssh-ed25519-cert-v01@openssh.com AAAA x")
    (folder / "id_rsa").write_text("-----BEGIN OPENSSH PRIVATE KEY-----\n")
    lines, private = keys.public_keys(None)
    assert lines == [KEY, KEY.replace("me@", "old@")] and private == [folder / "id_rsa"]


def test_without_any_key_one_is_made_once(home, capsys):
    lines, private = keys.public_keys(None)
    assert lines[0].startswith("ssh-ed25519 ") and len(private) == 1
    assert private[0] == home / ".config/innkeeper/id_ed25519" and private[0].stat().st_mode & 0o777 == 0o600
    assert private[0].parent.stat().st_mode & 0o777 == 0o700
    assert "made" in capsys.readouterr().err
    assert keys.public_keys(None) == (lines, private)
    assert not capsys.readouterr().err
    assert keys.private_keys() == private


def test_a_private_key_stands_for_its_public_one(home):
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(home / "mine")], check=True)
    public = (home / "mine.pub").read_text().strip()
    assert keys.public_keys([str(home / "mine")]) == ([public], [home / "mine"])
    assert keys.public_keys([str(home / "mine.pub")]) == ([public], [home / "mine"])
    (home / "mine.pub").unlink()
    with pytest.raises(InvalidInput) as caught:
        keys.public_keys([str(home / "mine")])
    assert "ssh-keygen -y" in caught.value.hint


@pytest.mark.parametrize("text", ["", "hello", "\n\n", f"{KEY}\n{KEY}\n"])
def test_what_is_no_public_key_is_refused(home, text):
    (home / "x.pub").write_text(text)
    with pytest.raises(InvalidInput, match=r"x\.pub is not an SSH public key"):
        keys.public_keys([str(home / "x.pub")])
    with pytest.raises(InvalidInput, match="there is no SSH key"):
        keys.public_keys([str(home / "nowhere")])


@pytest.mark.root
@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to stand for sudo")
def test_under_sudo_the_keys_are_the_callers(home, monkeypatch):
    monkeypatch.setenv("SUDO_USER", "nobody")
    folder, uid, _ = keys.person()
    assert folder != home and uid == 65534
    monkeypatch.setenv("SUDO_USER", "no-such-user")
    assert keys.person()[0] == home
    monkeypatch.setattr(keys, "person", lambda: (home / "theirs", 65534, 65534))
    (home / "theirs").mkdir()
    _, private = keys.public_keys(None)
    for path in (private[0], private[0].with_suffix(".pub"), private[0].parent, private[0].parent.parent):
        assert path.stat().st_uid == 65534


def test_ssh_trusts_only_the_key_that_the_daemon_named(home):
    way = {"address": "127.0.0.1", "port": 2222, "user": "debian", "host_key": KEY, "alias": "0123456789ab"}
    (home / "with space").write_text("x")
    command = command_line(way, [str(home / "with space")])
    options = dict(word.split("=", 1) for word in command if "=" in word)
    assert options["StrictHostKeyChecking"] == "yes" and options["GlobalKnownHostsFile"] == "/dev/null"
    assert options["IdentityFile"] == f'"{home}/with space"' and options["HostKeyAlias"] == "0123456789ab"
    known = home / ".config/innkeeper/guests/0123456789ab/known_hosts"
    assert known.read_text() == f"0123456789ab {' '.join(KEY.split()[:2])}\n"
    assert known.stat().st_mode & 0o777 == 0o600
    shown = subprocess.run([*command, "-G", "127.0.0.1"], capture_output=True, text=True, check=True).stdout
    assert f"userknownhostsfile {known}\n" in shown and "stricthostkeychecking true" in shown
    found = subprocess.run(["ssh-keygen", "-F", "0123456789ab", "-f", str(known)], capture_output=True, check=False)
    assert found.returncode == 0


def test_the_keys_of_a_launch_are_remembered(home):
    (home / "mine").write_text("x")
    identity.remember("0123456789ab", [home / "mine", home / "gone"])
    assert identity.remembered("0123456789ab") == [home / "mine"]
    assert identity.remembered("ffffffffffff") == []
    for bad in ("", "../x", "a/b"):
        with pytest.raises(ValueError, match="is not an id"):
            identity.folder(bad)


def test_friendly_names_are_hostnames():
    from innkeeper.base.ids import NAME_PATTERN

    names = {friendly_name() for _ in range(50)}
    assert len(names) > 25 and all(re.fullmatch(NAME_PATTERN, name) for name in names)
