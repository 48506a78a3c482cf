"""The NoCloud seed: what is in it, what is refused, and that other programs read the image."""

from __future__ import annotations

import email
import shutil
import stat
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from innkeeper.base.errors import InvalidInput, SeedInvalid
from innkeeper.plan.seed import HostKey, SeedFiles, compose, environment_lines, validate
from innkeeper.storage.hostkeys import known_hosts_line, make_host_key, make_user_key
from innkeeper.storage.seed import write_seed

KEY = make_host_key("test")
HOST = HostKey(private="-----BEGIN\nsecret\n-----END\n", public="ssh-ed25519 AAAA host")


def seed(**changes: Any) -> SeedFiles:
    wish: dict[str, Any] = {
        "instance_id": "i-1",
        "hostname": "d1",
        "user": None,
        "ssh_keys": [KEY.public],
        "host_key": HOST,
        "user_data": None,
        "vendor_data": None,
        "network_config": None,
        "env": {},
        "mac": "52:54:00:12:34:56",
    }
    return compose(**(wish | changes))


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def parts(files: SeedFiles) -> dict[str, str]:
    """The parts of vendor-data by content type, as a MIME reader sees them."""
    message = email.message_from_string(files.vendor_data)
    return {part.get_content_type(): part.get_payload() for part in message.get_payload()}  # type: ignore[union-attr,misc]


def vendor_config(files: SeedFiles) -> dict[str, Any]:
    text = parts(files)["text/cloud-config"]
    assert text.startswith("#cloud-config\n")
    return yaml.safe_load(text)  # type: ignore[no-any-return]


# --- compose ---------------------------------------------------------------------------------------------------


def test_meta_data_names_the_guest_and_its_keys() -> None:
    meta = yaml.safe_load(seed().meta_data)
    assert meta == {"instance-id": "i-1", "local-hostname": "d1", "public-keys": [KEY.public]}


def test_host_key_comes_by_vendor_data_and_survives_unchanged() -> None:
    config = vendor_config(seed())
    assert config["ssh_keys"] == {"ed25519_private": HOST.private, "ed25519_public": HOST.public}
    assert config["ssh_deletekeys"] is True


@pytest.mark.parametrize(
    "text",
    [
        "#cloud-config\nruncmd:\n  - [ls, -l]   # mine\n",
        "#!/bin/sh\necho hi\n",
        "## template: jinja\n#cloud-config\nhostname: {{ v1.region }}\n",
        "#include\nhttps://example.org/x\n",
        'MIME-Version: 1.0\nContent-Type: multipart/mixed; boundary="b"\n\n--b\n\n#!/bin/sh\n\n--b--\n',
    ],
)
def test_user_data_is_never_rewritten(text: str) -> None:
    assert seed(user_data=text).user_data == text
    assert validate("user-data", text, "f") == []


def test_what_innkeeper_adds_uses_no_list_that_user_data_could_replace() -> None:
    assert not [key for key, value in vendor_config(seed(env={"A": "1"})).items() if isinstance(value, list)]


def test_vendor_data_of_the_caller_is_one_more_part() -> None:
    files = seed(vendor_data="#cloud-config\nlocale: C\n")
    assert parts(files)["text/plain"].strip() == "#cloud-config\nlocale: C"
    mime = 'MIME-Version: 1.0\nContent-Type: multipart/mixed; boundary="b"\n\n--b\n\n#!/bin/sh\n\n--b--\n'
    nested = email.message_from_string(seed(vendor_data=mime).vendor_data)
    assert [part.get_payload() for part in nested.walk()][-1] == "#!/bin/sh\n"


def test_our_own_files_pass_our_own_check() -> None:
    files = seed(env={"A": "x"}, user="alice")
    assert vendor_config(files)["user"] == {"name": "alice"}
    assert validate("vendor-data", files.vendor_data, "v") == []
    assert validate("user-data", files.user_data, "u") == []
    assert validate("meta-data", files.meta_data, "m") == []
    assert validate("network-config", files.network_config, "n") == []
    assert validate("network-config", seed(mac=None).network_config, "n") == []


def test_network_is_matched_by_mac() -> None:
    nic = yaml.safe_load(seed(mac="52:54:00:AB:CD:EF").network_config)["ethernets"]["eth0"]
    assert nic["match"] == {"macaddress": "52:54:00:ab:cd:ef"}
    assert nic["dhcp4"] is True


@pytest.mark.parametrize(
    "change",
    [
        {"ssh_keys": ["hello"]},
        {"ssh_keys": [KEY.public + "\nssh-rsa x"]},
        {"user": "a b"},
        {"user": "root\n"},
        {"mac": "1:2"},
        {"env": {"A B": "1"}},
        {"env": {"1A": "1"}},
        {"env": {"A": "x\ny"}},
        {"env": {"A": "x#y"}},
        {"env": {"A": "x" * 2000}},
        {"env": {"A": "\udcff"}},
    ],
)
def test_what_cannot_work_is_refused(change: Mapping[str, Any]) -> None:
    with pytest.raises(SeedInvalid):
        seed(**change)


def test_secrets_are_not_shown() -> None:
    assert "secret" not in repr(seed()) + repr(HOST)
    with pytest.raises(SeedInvalid) as caught:
        environment_lines({"TOKEN": "hunter2#"})
    assert "TOKEN" in str(caught.value) and "hunter2" not in str(caught.value)


def pam_env(line: str) -> tuple[str, str]:
    """A transcription of what Linux-PAM's `_parse_env_file` makes of one line."""
    name, _, value = line.split("#")[0].partition("=")
    if value[:1] in ("'", '"'):
        inner = value[1:]
        value = inner[:-1] if inner[-1:] in ("'", '"') else inner
    return name, value


@given(st.text(alphabet=st.characters(exclude_characters="#\n\0", exclude_categories=["Cc", "Cs"]), max_size=80))
def test_environment_reads_back(value: str) -> None:
    [line] = environment_lines({"NAME": value})
    assert pam_env(line) == ("NAME", value)


def test_environment_is_written_by_the_boothook_once(tmp_path: Path) -> None:
    """The real script, on a file of ours in place of /etc/environment."""
    file = tmp_path / "environment"
    file.write_text("PATH=/bin\n")
    values = {"A": 'it\'s "q" $HOME `id` \\', "B": ""}
    script = parts(seed(env=values))["text/cloud-boothook"].replace("/etc/environment", str(file))
    for _ in range(2):
        subprocess.run(["sh", "-c", script], check=True)
    lines = [line for line in file.read_text().splitlines() if not line.startswith("#")]
    assert lines[0] == "PATH=/bin"
    assert dict(pam_env(line) for line in lines[1:]) == values
    assert names(tmp_path) == ["environment"]


# --- validate --------------------------------------------------------------------------------------------------

BAD = [
    ("user-data", "#cloud-config\na: 1\nb: [1, 2\nc: 3\n", 4, 2, "YAML"),
    ("user-data", "#cloud-config\nusers:\n\t- name: a\n", 3, 1, "tab"),
    ("user-data", "#cloud-config\na:\n  x: 1\n  y: 2\n  x: 3\n", 5, 3, "twice"),
    ("user-data", "runcmd: [ls]\n", 1, 1, "first line"),
    ("user-data", "# cloud-config\nruncmd: [ls]\n", 1, 1, "first line"),
    ("user-data", "\ufeff#cloud-config\n", 1, 1, "byte order mark"),
    ("user-data", "#cloud-config\nx: a\0b\n", 2, 5, "NUL"),
    ("user-data", "#cloud-config\nx: a\x07b\n", 2, 5, "control"),
    ("user-data", b"#cloud-config\nx: \xff\n", 2, 4, "UTF-8"),
    ("user-data", b"\x1f\x8b\x08", 1, 1, "gzip"),
    ("user-data", "#cloud-config\n- a\n", 2, 1, "mapping"),
    ("user-data", "#cloud-config\nruncmd: ls\n", 2, 9, "a list"),
    ("user-data", "#cloud-config\nruncmd:\n  - ls\n  - echo foo: bar\n", 4, 5, "item 2"),
    ("user-data", "#cloud-config\nwrite_files:\n  - content: x\n", 3, 5, "path"),
    ("user-data", "#cloud-config\nusers:\n  - shell: x\n", 3, 5, "name"),
    ("user-data", "#cloud-config\nusers:\n  - name: x\n    ssh_authorized_keys: k\n", 4, 26, "list"),
    ("user-data", "#cloud-config\nssh_authorized_keys: [{a: b}]\n", 2, 23, "item 1"),
    ("user-data", "#cloud-config\ngrowpart: yes\n", 2, 11, "mapping"),
    ("user-data", "#cloud-config\npackage_update: maybe\n", 2, 17, "true or false"),
    ("user-data", "#cloud-config\nx: !!python/object:os.system {}\nx: 1", 3, 1, "twice"),
    ("user-data", "#cloud-config\n" + "[" * 50_000, 2, 101, "deep"),
    ("user-data", "#cloud-config-jsonp\n[{,}]\n", 2, 3, ""),
    ("user-data", "#cloud-config-archive\na: 1\n", 1, 1, "list"),
    ("user-data", "x" * (1 << 20) + "y", 1, 1, "large"),
    ("vendor-data", "hello", 1, 1, "first line"),
    ("meta-data", "- a", 1, 1, "mapping"),
    ("network-config", "ethernets: {}\n", 1, 1, "version"),
    ("network-config", "version: 3\n", 1, 1, "version"),
    ("network-config", "version: 2\nethernets: [eth0]\n", 2, 12, "mapping"),
    ("network-config", "network:\n  version: 2\n  ethernets:\n    eth0: dhcp\n", 4, 11, "mapping"),
    ("network-config", "version: 1\nconfig:\n  - type: foo\n", 3, 5, "foo"),
    ("network-config", "version: 1\nconfig: {}\n", 2, 9, "list"),
    ("network-config", "", 1, 1, "mapping"),
]


@pytest.mark.parametrize(("kind", "text", "line", "column", "word"), BAD)
def test_mistakes_are_told_with_their_place(kind: Any, text: str | bytes, line: int, column: int, word: str) -> None:
    with pytest.raises(SeedInvalid) as caught:
        validate(kind, text, "cfg.yaml")
    error = caught.value
    assert "cfg.yaml" in error.detail and word in error.detail
    assert (error.facts["line"], error.facts["column"]) == (line, column), error.detail


def test_mistakes_inside_a_mime_part_have_the_line_of_the_file() -> None:
    text = (
        'Content-Type: multipart/mixed; boundary="b"\nMIME-Version: 1.0\n\n'
        "--b\nContent-Type: text/cloud-config\n\n#cloud-config\nruncmd: ls\n\n--b--\n"
    )
    with pytest.raises(SeedInvalid) as caught:
        validate("user-data", text, "f")
    assert caught.value.facts["line"] == 8


def test_doubtful_things_are_warnings() -> None:
    [warning] = validate("user-data", "#cloud-config\npackges: [vim]\n", "f")
    assert "line 2" in warning and "'packages'" in warning
    assert "CRLF" in validate("user-data", "#cloud-config\r\nruncmd: [ls]\r\n", "f")[0]
    assert "host key" in validate("user-data", "#cloud-config\nvendor_data: {enabled: false}\n", "f")[0]
    assert "instance-id" in validate("meta-data", "a: 1", "f")[0]
    assert "URL" in validate("user-data", "#include\nfoo\n", "f")[0]


def test_an_alias_bomb_is_no_burden() -> None:
    levels = "".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 40))
    validate("user-data", f"#cloud-config\na0: &a0 [x]\n{levels}", "f")


@given(st.text(max_size=200))
def test_any_text_gives_an_answer(text: str) -> None:
    for kind in ("user-data", "vendor-data", "meta-data", "network-config"):
        for first in ("", "#cloud-config\n", "MIME-Version: 1.0\n"):
            try:
                validate(kind, first + text, "f")
            except SeedInvalid as error:
                assert error.facts["line"] >= 1


# --- the image and the keys ------------------------------------------------------------------------------------


def test_image_is_private_whole_and_reproducible(tmp_path: Path) -> None:
    target = tmp_path / "seed.iso"
    write_seed(seed(), target)
    first = target.read_bytes()
    write_seed(seed(), target)
    assert target.read_bytes() == first
    assert stat.S_IMODE(target.stat().st_mode) == 0o600
    assert names(tmp_path) == ["seed.iso"]


def test_a_failed_write_leaves_nothing(tmp_path: Path) -> None:
    target = tmp_path / "seed.iso"
    target.mkdir()
    with pytest.raises(OSError):
        write_seed(seed(), target)
    assert names(tmp_path) == ["seed.iso"]


@pytest.mark.parametrize(
    "command",
    [["isoinfo", "-R", "-x", "/user-data", "-i"], ["isoinfo", "-J", "-x", "/user-data", "-i"], ["bsdtar", "-xOf"]],
)
def test_other_programs_read_the_image(tmp_path: Path, command: list[str]) -> None:
    if not shutil.which(command[0]):
        pytest.skip(f"{command[0]} is not installed (packages genisoimage, libarchive-tools)")
    target = tmp_path / "seed.iso"
    text = "#cloud-config\n# é\n" + "x: 1\n" * 1000
    write_seed(seed(user_data=text), target)
    member = ["user-data"] if command[0] == "bsdtar" else []
    assert subprocess.run([*command, target, *member], check=True, capture_output=True).stdout.decode() == text


def test_the_label_is_what_cloud_init_looks_for(tmp_path: Path) -> None:
    if not shutil.which("blkid"):
        pytest.skip("blkid is not installed (package util-linux)")
    target = tmp_path / "seed.iso"
    write_seed(seed(), target)
    found = subprocess.run(["blkid", "-p", "-o", "export", target], check=True, capture_output=True, text=True).stdout
    assert "LABEL=cidata" in found and "TYPE=iso9660" in found


def test_host_key_is_one_that_ssh_accepts(tmp_path: Path) -> None:
    if not shutil.which("ssh-keygen"):
        pytest.skip("ssh-keygen is not installed (package openssh-client)")
    file = tmp_path / "key"
    file.touch(0o600)
    file.write_text(KEY.private)
    derived = subprocess.run(["ssh-keygen", "-y", "-f", file], check=True, capture_output=True, text=True).stdout
    assert derived.split()[:2] == KEY.public.split()[:2]


def test_known_hosts_line() -> None:
    assert known_hosts_line("innkeeper-ab12", "ssh-ed25519 AAAA me") == "innkeeper-ab12 ssh-ed25519 AAAA"
    for alias in ("", "a*", "a,b", "!a", "@cert-authority", "a b", "|1|x"):
        with pytest.raises(InvalidInput):
            known_hosts_line(alias, "ssh-ed25519 AAAA")


def test_user_key_is_made_once(tmp_path: Path) -> None:
    path = make_user_key(tmp_path / "ssh")
    private, public = path.read_text(), path.with_suffix(".pub").read_text()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600 and "PRIVATE" not in public
    path.with_suffix(".pub").unlink()
    assert make_user_key(tmp_path / "ssh").read_text() == private
    assert path.with_suffix(".pub").read_text() == public
    assert names(tmp_path / "ssh") == ["id_ed25519", "id_ed25519.pub"]
