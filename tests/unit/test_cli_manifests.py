"""YAML files → documents, with file and line for what is wrong."""

from __future__ import annotations

import pytest

from innkeeper.base.errors import InvalidInput
from innkeeper.cli import manifests
from innkeeper.client import ApiError

TEXT = """\
kind: vm
name: web
nics:
  - mode: user
    mac: nonsense
---
# nothing
---
kind: image
name: debian-12
recipe: debian-12
"""
KEY = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIK0wmN/Cr3JXqmLW7u+g9pTh+wyqDHpSQEIQczXkVx9q me@here"


def test_documents_and_their_lines(tmp_path):
    web, image = manifests.parse(TEXT, "a.yaml", tmp_path)
    assert web.content["name"] == "web" and image.content["kind"] == "image"
    assert [web.line(field) for field in ("name", "nics.0.mac", "nics.7", "memroy", "")] == [2, 5, 3, 1, 1]
    assert image.line("recipe") == 11


def test_what_the_daemon_says_gets_file_and_line(tmp_path):
    documents = manifests.parse(TEXT, "a.yaml", tmp_path)
    facts = {"document": 0, "errors": [{"field": "vm.nics.0.mac", "problem": "is not a MAC address"}]}
    error = ApiError({"code": "invalid-input", "detail": "x", "facts": facts}, 422)
    assert str(manifests._located(error, documents)) == "a.yaml:5: nics.0.mac: is not a MAC address"
    plain = ApiError({"code": "name-taken", "detail": "x"}, 409)
    assert manifests._located(plain, documents) is plain


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a: b\n - c: [\n", "a.yaml:2: "),
        ("- a\n", "a.yaml:1: a document is a mapping"),
        ("kind: vm\nname: !!python/object/apply:os.system [id]\n", "a.yaml:2: "),
        ("first_boot:\n  user: x\n  user_data_file: gone\n", "a.yaml:3: first_boot.user_data_file gone: No such file"),
        ("first_boot:\n  ssh_key_files: [gone]\n", "a.yaml:2: first_boot.ssh_key_files there is no SSH key"),
        ("first_boot:\n  user_data: x\n  user_data_file: y\n", "there are both"),
    ],
)
def test_errors_name_the_line(text, said, tmp_path):
    with pytest.raises(InvalidInput) as caught:
        manifests.parse(text, "a.yaml", tmp_path)
    assert said in caught.value.detail


def test_files_are_found_beside_the_manifest(tmp_path, monkeypatch):
    folder = tmp_path / "machines"
    folder.mkdir()
    (folder / "init.yaml.txt").write_text("#cloud-config\n")
    (folder / "key.pub").write_text(KEY)
    text = (
        "iso: disc.iso\nfirst_boot:\n  user_data_file: init.yaml.txt\n  ssh_keys: [a b]\n  ssh_key_files: [key.pub]\n"
    )
    (folder / "b.yaml").write_text(text)
    (folder / "a.yml").write_text("name: first\n---\nname: second\n")
    (folder / "notes.txt").write_text(": : :")
    monkeypatch.chdir(tmp_path)
    documents = manifests.read("machines")
    assert [document.content.get("name") for document in documents] == ["first", "second", None]
    assert documents[2].content == {
        "iso": str(folder / "disc.iso"),
        "first_boot": {"user_data": "#cloud-config\n", "ssh_keys": ["a b", KEY]},
    }
    for nothing in ("gone", str(tmp_path)):
        with pytest.raises(InvalidInput, match="there is no"):
            manifests.read(nothing)


def test_a_difference_is_shown_as_a_diff(capsys):
    changes = [
        {"kind": "vm", "name": "web", "action": "update", "note": "later",
         "differences": [{"field": "memory", "old": 1 << 30, "new": 2 << 30},
                         {"field": "note", "old": None, "new": "x"}]},
        {"kind": "vm", "name": "db", "action": "none", "differences": []},
    ]  # fmt: skip
    manifests._show(changes, dry_run=True)
    assert capsys.readouterr().out.splitlines() == [
        "~ vm web  update",
        "    - memory: 1 GiB",
        "    + memory: 2 GiB",
        "    + note: x",
        "  web: later",
        "nothing was changed: this was a dry run",
    ]
    manifests._show(changes[1:], dry_run=True)
    assert capsys.readouterr().out == "nothing to do\n"


def test_an_export_is_written_for_people():
    document = {"name": "web", "memory": 3 << 29, "disks": [{"size": 20 << 30, "serial": ""}], "nics": [], "cpus": 2}
    assert manifests._written(document) == {"name": "web", "memory": "1536M", "disks": [{"size": "20G"}], "cpus": 2}
