"""Recipes: what is accepted, what is refused with which words; and the pure parts of building from them."""

from __future__ import annotations

import io
import shutil
import struct
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from innkeeper.base.errors import NotFound, RecipeInvalid, ToolFailed, ToolMissing, Unsupported
from innkeeper.spec.recipe import load_recipe, parse_recipe, recipe_names, recipes_folder
from innkeeper.storage.build import recipe_digest
from innkeeper.storage.build_disk import CORE_AT, early_files, esp_files, install_grub_bios, late_files
from innkeeper.storage.build_initramfs import Tree, add_overlay, cpio, link_applets, needed_libraries
from innkeeper.storage.build_packages import Progress, keyring, sources

MIB = 1 << 20


def minimal() -> dict[str, Any]:
    return {
        "name": "mine",
        "description": "a test",
        "suite": "bookworm",
        "kernel": "linux-image-cloud-amd64",
        "user": "root",
        "guest_agent": False,
        "cloud_init": False,
        "min_memory": "64M",
        "firmware": ["bios"],
        "cmdline": "console=ttyS0",
        "initramfs": {"programs": ["busybox"]},
    }


def parse(data: Any, path: Path = Path("/somewhere/mine.yaml")) -> Any:
    return parse_recipe(yaml.safe_dump(data), path)


def test_the_recipes_that_come_along_are_valid() -> None:
    assert {"debian-12", "debian-13", "tiny"} <= set(recipe_names())
    for name in recipe_names():
        recipe = load_recipe(name)
        assert recipe.name == name
        assert load_recipe(recipes_folder() / f"{name}.yaml") == recipe
        assert len(recipe_digest(recipe)) == 64


def test_debian_12_and_13_differ_only_in_what_they_are() -> None:
    twelve, thirteen = (load_recipe(name).model_dump() for name in ("debian-12", "debian-13"))
    assert {key for key in twelve if twelve[key] != thirteen[key]} == {"name", "description", "suite"}


def test_a_minimal_recipe() -> None:
    recipe = parse(minimal())
    assert recipe.min_memory == 64 * MIB and recipe.architecture == "amd64" and recipe.disk is None


@pytest.mark.parametrize(
    ("change", "field", "words"),
    [
        ({"nmae": "x"}, "nmae", "Extra inputs are not permitted"),
        ({"initramfs": {"programs": ["busybox"], "modlues": []}}, "initramfs.modlues", "not permitted"),
        ({"suite": "sid"}, "suite", "'bookworm' or 'trixie', not 'sid'"),
        ({"architecture": "arm64"}, "architecture", "not 'arm64'"),
        ({"name": "Not A Name"}, "name", "'Not A Name'"),
        ({"kernel": None}, "kernel", "valid string"),
        ({"packages": ["--allow-unauthenticated"]}, "packages.0", "'--allow-unauthenticated'"),
        ({"packages": ["a,b"]}, "packages.0", "'a,b'"),
        ({"packages": "busybox"}, "packages", "valid list"),
        ({"min_memory": "lots"}, "min_memory", "'lots' is not understood"),
        ({"min_memory": 12}, "min_memory", "greater than or equal"),
        ({"min_memory": True}, "min_memory", "not a size"),
        ({"guest_agent": "yes"}, "guest_agent", "valid boolean"),
        ({"firmware": []}, "firmware", "at least 1"),
        ({"firmware": ["coreboot"]}, "firmware.0", "'coreboot'"),
        ({"cmdline": "a\nb"}, "cmdline", "pattern"),
        ({"files": "../../etc"}, "files", "inside the recipes folder"),
        ({"files": "/etc"}, "files", "inside the recipes folder"),
        ({"files": "absent"}, "files", "is not there"),
        ({"initramfs": {"programs": []}}, "initramfs.programs", "at least 1"),
        ({"initramfs": {"programs": ["../sh"]}}, "initramfs.programs.0", "'../sh'"),
        ({"initramfs": None}, "recipe", "exactly one of 'disk' and 'initramfs'"),
        ({"disk": {}}, "recipe", "exactly one of 'disk' and 'initramfs'"),
        ({"initramfs": None, "disk": {"esp": "1K"}}, "disk.esp", "greater than or equal"),
        ({"initramfs": None, "disk": {"script": "absent.sh"}}, "disk.script", "is not there"),
        ({"initramfs": None, "disk": {"mask": ["a/../b.timer"]}}, "disk.mask.0", "'a/../b.timer'"),
    ],
)
def test_a_bad_recipe_is_refused_with_file_field_and_value(change: Any, field: str, words: str) -> None:
    with pytest.raises(RecipeInvalid) as caught:
        parse(minimal() | change)
    assert caught.value.detail.startswith("/somewhere/mine.yaml")
    assert field in caught.value.facts["fields"]
    assert words in caught.value.detail


def test_every_missing_field_is_named() -> None:
    with pytest.raises(RecipeInvalid) as caught:
        parse({"name": "mine"})
    assert {"suite", "kernel", "user", "firmware", "cmdline"} <= set(caught.value.facts["fields"])


@pytest.mark.parametrize("content", ["", "- a\n- b\n", "just text\n"])
def test_what_is_not_a_mapping_is_refused(content: str) -> None:
    with pytest.raises(RecipeInvalid, match="mapping"):
        parse_recipe(content, Path("/x.yaml"))


def test_what_is_not_yaml_is_refused_with_its_line_and_without_quoting_it() -> None:
    with pytest.raises(RecipeInvalid, match=r"/x\.yaml, line 2: not YAML") as caught:
        parse_recipe("a: 1\nsecret: ]", Path("/x.yaml"))
    assert "secret" not in caught.value.detail


@pytest.mark.parametrize("name", ["absent", "../tiny", "Tiny", "", "/nowhere/at-all.yaml"])
def test_an_unknown_recipe_names_those_there_are(name: str) -> None:
    with pytest.raises(NotFound) as caught:
        load_recipe(name)
    assert "tiny" in caught.value.hint


def test_a_recipe_of_ones_own_brings_its_files_and_they_count_in_its_digest(tmp_path: Path) -> None:
    (tmp_path / "extra/etc").mkdir(parents=True)
    (tmp_path / "extra/etc/motd").write_text("hello")
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(minimal() | {"files": "extra"}))
    recipe = load_recipe(tmp_path / "mine.yaml")
    assert recipe.files_folder == tmp_path / "extra"
    before = recipe_digest(recipe)
    (tmp_path / "extra/etc/motd").rename(tmp_path / "extra/motd")
    moved = recipe_digest(recipe)
    (tmp_path / "extra/motd").write_text("goodbye")
    assert len({before, moved, recipe_digest(recipe)}) == 3


# --- the host's mirror -----------------------------------------------------------------------------------------


def test_the_mirror_is_the_one_of_the_hosts_apt_with_the_suite_exchanged() -> None:
    targets = """\
http://m.example/debian/|bookworm|main|Debian|Packages
http://m.example/debian/|bookworm|main|Debian|Translations
http://m.example/debian/|bookworm|contrib|Debian|Packages
http://m.example/debian/|bookworm-updates|main|Debian|Packages
http://m.example/debian/|bookworm-backports|main|Debian Backports|Packages
http://s.example/debian-security/|bookworm-security|main|Debian|Packages
https://third.example/apt/debian|bookworm|main|Third Party|Packages
"""
    assert sources(targets, "trixie") == [
        "deb http://m.example/debian/ trixie main",
        "deb http://m.example/debian/ trixie-updates main",
        "deb http://s.example/debian-security/ trixie-security main",
    ]


def test_before_the_first_update_a_mirror_is_known_by_its_path() -> None:
    targets = """\
https://third.example/linux/|bookworm|main|$(ORIGIN)|Packages
http://m.example/some/debian/|bookworm|main|$(ORIGIN)|Packages
http://m.example/some/debian-security|bookworm-security|main||Packages
"""
    assert sources(targets, "bookworm") == [
        "deb http://m.example/some/debian/ bookworm main",
        "deb http://m.example/some/debian-security bookworm-security main",
    ]


@pytest.mark.parametrize("targets", ["", "https://third.example/apt/|stable|main|Other|Packages\n", "|||\nx"])
def test_a_host_without_debian_is_told_so(targets: str) -> None:
    with pytest.raises(Unsupported, match="no source for Debian"):
        sources(targets, "bookworm")


@pytest.mark.parametrize("suffix", ["gpg", "pgp"])
def test_the_keyring_must_know_the_suite(tmp_path: Path, suffix: str) -> None:
    with pytest.raises(ToolMissing, match="keys of Debian's archive"):
        keyring("trixie", tmp_path)
    (tmp_path / f"debian-archive-keyring.{suffix}").touch()
    (tmp_path / f"debian-archive-bookworm-stable.{suffix}").touch()
    with pytest.raises(Unsupported, match="does not know Debian trixie"):
        keyring("trixie", tmp_path)
    assert keyring("bookworm", tmp_path) == tmp_path / f"debian-archive-keyring.{suffix}"


def test_progress_counts_packages_over_both_runs_of_apt() -> None:
    seen: list[float | None] = []
    progress = Progress(lambda fraction, text: seen.append(fraction), [0.3, 0.65], steps=3)
    run = [
        "0 upgraded, 2 newly installed, 0 to remove and 0 not upgraded.",
        "Get:1 http://m.example/debian bookworm/main amd64 libc6 amd64 2.36-9 [2757 kB]",
        "Get:2 http://m.example/debian bookworm/main amd64 dash amd64 0.5.12-2 [97.2 kB]",
        "dpkg --unpack /x/var/cache/apt/archives/libc6_2.36-9_amd64.deb /x/archives/dash_1%3a0.5.12-2_amd64.deb",
        "Unpacking libc6:amd64 (2.36-9) ...",
        "Unpacking dash (0.5.12-2) ...",
        "Setting up libc6:amd64 (2.36-9) ...",
        "Setting up dash (0.5.12-2) ...",
    ]
    progress.line("Get:1 http://m.example/debian bookworm InRelease [140 kB]")
    for line in run:
        progress.line(line)
    assert progress.fraction == pytest.approx(0.3)
    for line in run:
        progress.line(line)
    assert progress.fraction == pytest.approx(0.95)
    assert seen[0] is None
    known = [fraction for fraction in seen if fraction is not None]
    assert known == sorted(known) and len(set(known)) == 12
    assert progress.packages == {"libc6": "2.36-9", "dash": "1:0.5.12-2"}


# --- the initramfs ---------------------------------------------------------------------------------------------


def test_the_archive_is_one_that_cpio_reads(tmp_path: Path) -> None:
    tree = Tree()
    tree.file("usr/bin/x", b"odd", 0o755)
    tree.link("bin", "usr/bin")
    tree.character_device("dev/console", 5, 1, 0o600)
    (tmp_path / "etc").mkdir()
    (tmp_path / "etc/rc").write_text("#!/bin/sh\n")
    (tmp_path / "etc/motd").write_text("hello\n")
    add_overlay(tree, tmp_path)
    link_applets(tree, ["bin/ls", "usr/sbin/x", "linuxrc"])
    archive = b"".join(cpio(tree.entries))
    assert archive == b"".join(cpio(tree.entries))
    if not shutil.which("cpio"):
        pytest.skip("cpio is not installed")
    listed = subprocess.run(["cpio", "-itv", "--quiet", "-n"], input=archive, capture_output=True, check=True)
    lines = {line.split()[-1]: line for line in listed.stdout.decode().splitlines() if "->" not in line}
    assert lines["usr/bin/x"].startswith("-rwxr-xr-x") and lines["etc/rc"].startswith("-rwxr-xr-x")
    assert lines["etc/motd"].startswith("-rw-r--r--") and lines["dev/console"].startswith("crw-------")
    assert lines["usr/bin"].startswith("drwxr-xr-x") and b"bin -> usr/bin" in listed.stdout
    assert b"usr/bin/ls -> /usr/bin/busybox" in listed.stdout and b"usr/sbin/x" not in listed.stdout


def test_the_libraries_that_a_program_needs() -> None:
    needed = needed_libraries(Path("/bin/sh").read_bytes())
    assert "libc.so.6" in needed and any(name.startswith("/lib") for name in needed)
    assert needed_libraries(b"#!/bin/sh\n") == []


# --- the disk --------------------------------------------------------------------------------------------------


def test_grub_is_put_where_the_bios_finds_it_and_the_partition_table_stays() -> None:
    disk = io.BytesIO(bytes(range(256)) * 2 + bytes(2 * MIB))
    boot = bytes(0x1FE) + b"\x55\xaa"
    core = b"\xeb" * 512 + b"k" * 1000
    install_grub_bios(disk, boot, core)  # type: ignore[arg-type]
    written = disk.getvalue()
    assert struct.unpack_from("<Q", written, 0x5C) == (CORE_AT // 512,)
    assert written[0x64] == 0xFF and written[0x66:0x68] == b"\x90\x90"
    assert written[0x1B8:0x1FE] == (bytes(range(256)) * 2)[0x1B8:0x1FE]
    assert struct.unpack_from("<QHH", written, CORE_AT + 500) == (CORE_AT // 512 + 1, 2, 0x820)
    assert written[CORE_AT + 512 : CORE_AT + len(core)] == core[512:]


@pytest.mark.parametrize(
    ("boot", "core"), [(b"", bytes(1024)), (bytes(512), bytes(1024)), (bytes(510) + b"\x55\xaa", bytes(2 * MIB))]
)
def test_what_is_not_grub_is_not_written(boot: bytes, core: bytes) -> None:
    disk = io.BytesIO(bytes(1024))
    with pytest.raises(ToolFailed):
        install_grub_bios(disk, boot, core)  # type: ignore[arg-type]
    assert disk.getvalue() == bytes(1024)


def test_the_files_of_a_disk_agree_on_its_root() -> None:
    recipe, uuid = load_recipe("debian-12"), "0b1e-root"
    early, late = early_files(recipe, uuid, "ABCD1234"), late_files(recipe, uuid)
    fstab = early["etc/fstab"]
    assert isinstance(fstab, str) and f"UUID={uuid} / ext4" in fstab and "UUID=ABCD-1234 /boot/efi" in fstab
    assert early["etc/systemd/system/apt-daily.timer"] == "->/dev/null"
    grub = late["boot/grub/grub.cfg"]
    assert isinstance(grub, str) and f"root=UUID={uuid} ro {recipe.cmdline}" in grub and "/initrd.img" in grub
    signed = {f"{name}.efi.signed": name.encode() for name in ("shimx64", "grubx64", "mmx64")}
    esp = esp_files(signed, uuid)
    assert esp["EFI/BOOT/BOOTX64.EFI"] == b"shimx64" and uuid.encode() in esp["EFI/debian/grub.cfg"]
