"""Facts of the host, memory admission, ports."""

from __future__ import annotations

import json
import os
import socket
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from innkeeper.base.errors import InvalidInput, NotEnoughMemory, PortTaken
from innkeeper.base.home import Home
from innkeeper.base.units import GIB, MIB
from innkeeper.host import kvm, users
from innkeeper.host.accelerator import Verdict
from innkeeper.host.cpu import parse_list
from innkeeper.host.facts import HostFacts, Memory
from innkeeper.host.firmware import firmware
from innkeeper.host.gather import gather
from innkeeper.host.memory import available_for_guests, check_memory, kept_for_host
from innkeeper.network.ports import free_port, is_free, who_listens

VERDICT = Verdict(
    name="tcg",
    reason="a test",
    cpu_model="qemu64",
    seconds=0,
    boot_id="",
    qemu_version="",
    kvm_device="",
    checked="2026-01-01T00:00:00.000Z",
)


async def test_facts_are_those_of_this_host_and_survive_json(tmp_path: Path) -> None:
    facts = await gather(Home(tmp_path, tmp_path, tmp_path), VERDICT, None)
    assert facts.hostname == socket.gethostname()
    assert facts.kernel == os.uname().release
    assert facts.root == (os.geteuid() == 0)
    assert facts.memory.total == psutil.virtual_memory().total
    assert 0 < facts.memory.available <= facts.memory.total
    assert facts.cpu.threads == os.cpu_count()
    assert 1 <= facts.cpu.sockets <= facts.cpu.cores <= facts.cpu.threads
    assert sorted(cpu for node in facts.cpu.numa for cpu in node.cpus) == list(range(facts.cpu.threads))
    assert facts.accelerator == VERDICT
    assert HostFacts.model_validate(json.loads(facts.model_dump_json())) == facts


async def test_facts_are_frozen(tmp_path: Path) -> None:
    facts = await gather(Home(tmp_path, tmp_path, tmp_path), VERDICT, None)
    with pytest.raises(ValueError, match="frozen"):
        facts.hostname = "other"  # type: ignore[misc]


def test_cpu_lists() -> None:
    assert parse_list("0-3,8\n") == (0, 1, 2, 3, 8)
    assert parse_list("5") == (5,)
    assert parse_list("\n") == ()


def test_uid_maps() -> None:
    whole = "         0          0 4294967295\n"
    nested = "0 100000 65536\n65536 500000 1000\n"
    assert users.covers(whole, users.FIRST, users.COUNT)
    assert not users.covers(nested, users.FIRST, users.COUNT)
    assert users.covers(nested, 0, 65536)
    assert not users.covers(nested, 1, 65536)
    assert not users.covers("", 0, 1)


# --- firmware ---------------------------------------------------------------------------------------------------


def _descriptor(folder: Path, name: str, size: int, **changes: object) -> Path:
    code, template = folder / f"{name}.code", folder / f"{name}.vars"
    with code.open("wb") as file:
        file.truncate(size)
    template.write_bytes(b"v")
    document: dict[str, object] = {
        "interface-types": ["uefi"],
        "mapping": {
            "device": "flash",
            "executable": {"filename": str(code), "format": "raw"},
            "nvram-template": {"filename": str(template), "format": "raw"},
        },
        "targets": [{"architecture": "x86_64", "machines": ["pc-i440fx-*", "pc-q35-*"]}],
        "features": ["acpi-s3"],
    }
    folder.joinpath(f"{name}.json").write_text(json.dumps(document | changes))
    return code


def _chosen(*folders: Path) -> str | None:
    found = firmware(folders).uefi
    return Path(found.code).stem if found else None


def test_firmware_is_plain_large_and_for_this_machine(tmp_path: Path) -> None:
    assert _chosen(tmp_path) is None
    _descriptor(tmp_path, "10-secure", 4 << 20, features=["secure-boot", "requires-smm"])
    _descriptor(tmp_path, "20-arm", 4 << 20, targets=[{"architecture": "aarch64", "machines": ["virt-*"]}])
    _descriptor(tmp_path, "25-bios", 4 << 20, **{"interface-types": ["bios"]})
    (tmp_path / "26-broken.json").write_text("{")
    (tmp_path / "27-list.json").write_text("[]")
    assert _chosen(tmp_path) is None
    _descriptor(tmp_path, "30-small", 2 << 20)
    assert _chosen(tmp_path) == "30-small"
    _descriptor(tmp_path, "40-large", 4 << 20)
    _descriptor(tmp_path, "50-later", 4 << 20)
    assert _chosen(tmp_path) == "40-large"
    (tmp_path / "40-large.code").unlink()
    assert _chosen(tmp_path) == "50-later"


def test_firmware_descriptor_is_masked_by_an_empty_one(tmp_path: Path) -> None:
    system, own = tmp_path / "system", tmp_path / "own"
    system.mkdir()
    own.mkdir()
    _descriptor(system, "40-large", 4 << 20)
    assert _chosen(system, own) == "40-large"
    (own / "40-large.json").touch()
    assert _chosen(system, own) is None


# --- /dev/kvm as a file -----------------------------------------------------------------------------------------


@contextmanager
def _as_user(uid: int) -> Iterator[None]:
    groups = os.getgroups()
    os.setgroups([])
    os.seteuid(uid)
    try:
        yield
    finally:
        os.seteuid(0)
        os.setgroups(groups)


def test_kvm_missing_or_something_else(tmp_path: Path) -> None:
    missing = kvm.device(str(tmp_path / "kvm"))
    assert (missing.identity, "is missing" in missing.problem, bool(missing.hint)) == ("missing", True, True)
    (tmp_path / "file").touch()
    assert "not a character device" in kvm.device(str(tmp_path / "file")).problem
    assert kvm.device("/dev/null") == kvm.KvmDevice(kvm.device("/dev/null").identity)


@pytest.mark.root
@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to make a device and to become another user")
def test_kvm_permissions_name_the_group(tmp_path: Path) -> None:
    path = tmp_path / "kvm"
    try:
        os.mknod(path, stat.S_IFCHR | 0o600, os.makedev(1, 3))
    except PermissionError:
        pytest.skip("this container may not make devices")
    tmp_path.chmod(0o755)
    closed = []
    for mode, group in ((0o600, 0), (0o660, 31_337)):
        path.chmod(mode)
        os.chown(path, 0, group)
        here = os.open(tmp_path, os.O_PATH)
        try:
            with _as_user(65_534):
                closed.append(kvm.device(f"/proc/self/fd/{here}/kvm"))
        finally:
            os.close(here)
    only_root, grouped = closed
    assert "for user root only" in only_root.problem
    assert (only_root.group, grouped.group) == (None, 31_337)
    assert "for group 31337" in grouped.problem
    assert "usermod -aG 31337" in grouped.hint
    assert only_root.identity != grouped.identity
    assert kvm.device(str(path)).problem == ""  # root may
    path.chmod(0o600)
    assert kvm.device(str(path)).root_only


# --- memory -----------------------------------------------------------------------------------------------------


def _memory(total: int, available: int) -> Memory:
    return Memory(total=total, available=available, swap_total=64 * GIB, swap_free=64 * GIB)


def test_memory_kept_for_the_host() -> None:
    assert kept_for_host(24 * GIB) == 2 * GIB
    assert kept_for_host(2 * GIB) == 512 * MIB
    assert kept_for_host(1024 * GIB) == 8 * GIB


def test_memory_refusal_has_the_numbers() -> None:
    host = _memory(24 * GIB, int(3.1 * GIB))
    with pytest.raises(NotEnoughMemory) as refused:
        check_memory(8 * GIB, host)
    assert refused.value.detail == (
        "needs 8 GiB, host has 3.1 GiB available of 24 GiB, and 2 GiB are kept for the host"
    )
    assert "--force" in refused.value.hint
    check_memory(1 * GIB, host)


def test_memory_promised_to_running_vms_is_not_available() -> None:
    host = _memory(24 * GIB, 20 * GIB)
    assert available_for_guests(host) == 18 * GIB
    assert available_for_guests(host, promised=10 * GIB) == 8 * GIB
    assert available_for_guests(host, promised=30 * GIB) == 0
    check_memory(8 * GIB, host, promised=10 * GIB)
    with pytest.raises(NotEnoughMemory, match="10 GiB of it promised to running VMs"):
        check_memory(8 * GIB + 1, host, promised=10 * GIB)


# --- ports ------------------------------------------------------------------------------------------------------


def test_port_holder_is_named() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        assert who_listens(port) == f"{psutil.Process().name()} (pid {os.getpid()})"
        assert who_listens(port, address="127.0.0.1") is not None
        assert who_listens(port, address="127.0.0.2") is None
        assert who_listens(port, "udp") is None
        assert not is_free(port, address="127.0.0.1")
        assert free_port(port) > port
    assert who_listens(port) is None
    assert is_free(port, address="127.0.0.1")


def test_port_held_on_udp_and_on_ipv6() -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as udp:
        udp.bind(("127.0.0.1", 0))
        port = udp.getsockname()[1]
        assert who_listens(port, "udp") is not None
        assert not is_free(port, "udp", "127.0.0.1")
    if socket.has_dualstack_ipv6():
        with socket.create_server(("::", 0), family=socket.AF_INET6, dualstack_ipv6=True) as server:
            assert who_listens(server.getsockname()[1], address="127.0.0.1") is not None


def test_free_port_avoids_what_others_were_promised() -> None:
    first = free_port(40_000)
    assert free_port(first, avoid={first}) > first
    with pytest.raises(PortTaken, match="no free tcp port from 65535"):
        free_port(65_535, avoid={65_535})


def test_address_that_is_none() -> None:
    with pytest.raises(InvalidInput, match="'localhost' is not an IP address"):
        is_free(80, address="localhost")
