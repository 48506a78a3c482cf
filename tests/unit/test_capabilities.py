"""What a QEMU can do, asked over QMP."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

from innkeeper.base.errors import QemuFailed
from innkeeper.base.home import Home
from innkeeper.qemu.capabilities import FEATURES, TCG_CPUS, Schema, _versioned_q35, capabilities, find_qemu

BINARY = find_qemu()
needs_qemu = pytest.mark.skipif(BINARY is None, reason="QEMU is not installed")


@pytest.fixture
def home(tmp_path: Path) -> Home:
    return Home(tmp_path / "data", tmp_path / "run", tmp_path / "data")


@pytest.fixture
def open_folder() -> Iterator[Path]:
    """One that unprivileged users can enter, unlike pytest's."""
    with TemporaryDirectory() as name:
        Path(name).chmod(0o755)
        yield Path(name)


@needs_qemu
async def test_this_qemu(home: Home) -> None:
    facts = await capabilities(BINARY, home)
    assert facts is not None
    assert facts.path == str(BINARY)
    assert facts.machine == facts.machines[0]
    assert facts.machine.startswith("pc-q35-")
    assert facts.tcg_cpu in TCG_CPUS
    # the baseline, QEMU 7.2 (DESIGN.md 2.10)
    assert facts.features >= {"screendump-png", "netdev-stream", "x-ignore-shared", "memfd", "blockdev-reopen"}
    assert facts.features <= FEATURES.keys()
    assert facts.devices >= {"virtio-blk-pci", "virtio-net-pci", "pcie-root-port", "isa-debug-exit"}


@needs_qemu
async def test_asked_once_per_binary(home: Home, open_folder: Path) -> None:
    assert BINARY
    script, count = open_folder / "qemu", open_folder / "count"
    script.write_text(f'#!/bin/sh\necho ran >> {count}\nexec {BINARY} "$@"\n')
    script.chmod(0o755)
    count.touch()
    count.chmod(0o666)
    first = await capabilities(script, home)
    assert await capabilities(script, home) == first
    assert count.read_text() == "ran\n"
    os.utime(script, (1, 1))  # as an upgrade does
    assert await capabilities(script, home) == first
    assert count.read_text() == "ran\nran\n"
    for damage in (b"", b"{", b"[]", json.dumps({"key": [], "facts": {}}).encode()):
        (home.data / "qemu.json").write_bytes(damage)
        assert await capabilities(script, home) == first
    assert [path.name for path in home.data.iterdir()] == ["qemu.json"]


async def test_no_qemu(home: Home) -> None:
    assert await capabilities(None, home) is None


async def test_a_binary_that_is_not_qemu(home: Home) -> None:
    with pytest.raises(QemuFailed, match="/bin/false does not answer"):
        await capabilities(Path("/bin/false"), home)
    assert not home.data.exists()


def test_newest_machine_is_first() -> None:
    names = ["pc-q35-9.2", "q35", "pc-q35-10.0", "pc-i440fx-11.0", "pc-q35-4.0", "pc-q35-4.0.1", "none"]
    found = _versioned_q35([{"name": name} for name in names])
    assert found == ["pc-q35-10.0", "pc-q35-9.2", "pc-q35-4.0.1", "pc-q35-4.0"]


def test_schema_paths() -> None:
    schema = Schema(
        [
            {"name": "str", "meta-type": "builtin", "json-type": "string"},
            {"name": "add", "meta-type": "command", "arg-type": "0", "ret-type": "9"},
            {
                "name": "0",
                "meta-type": "object",
                "members": [{"name": "type", "type": "1"}, {"name": "list", "type": "[2]"}],
                "tag": "type",
                "variants": [{"case": "file", "type": "2"}],
            },
            {"name": "1", "meta-type": "enum", "members": [], "values": ["file", "null"]},
            {"name": "[2]", "meta-type": "array", "element-type": "2"},
            {"name": "2", "meta-type": "object", "members": [{"name": "path", "type": "str"}]},
            {"name": "9", "meta-type": "object", "members": []},
        ]
    )
    for there in ("add", "add.type", "add.type=null", "add.type=file.path", "add.list.path"):
        assert schema.has(there), there
    for absent in ("remove", "str", "add.size", "add.type=raw", "add.type=null.path", "add.list.type", "add.type.path"):
        assert not schema.has(absent), absent
