"""Confinement, in the real cgroup file systems of this host."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from innkeeper.base.errors import InvalidInput
from innkeeper.base.home import Home
from innkeeper.base.ids import new_id
from innkeeper.host import cgroups
from innkeeper.host.cgroups import Hierarchy
from innkeeper.host.facts import Cgroup
from innkeeper.qemu import cgroup
from innkeeper.qemu.cgroup import Limits, detect, list_ours, place, remove

MODE = detect().mode
confined = pytest.mark.skipif(MODE == "none", reason=f"no cgroups to confine with: {detect().reason}")
only_v1 = pytest.mark.skipif(MODE != "v1", reason=f"cgroups here are {MODE}")


@pytest.fixture
def home(tmp_path: Path) -> Home:
    return Home(tmp_path, tmp_path / "run", tmp_path)


@pytest.fixture
def process() -> Iterator[subprocess.Popen[bytes]]:
    with subprocess.Popen(["sleep", "60"]) as child:
        yield child
        child.kill()


def _folders(pid: int) -> dict[str, Path]:
    """Controller → folder of the group that a process is in; v2 is ``."""
    return {name: each.own for each in cgroups.hierarchies(str(pid)) for name in each.controllers or {""}}


@confined
async def test_a_vm_has_its_own_group_until_it_is_removed(home: Home, process: subprocess.Popen[bytes]) -> None:
    vm_id = new_id()
    assert await list_ours(home) == set()
    await place(home, vm_id, process.pid)
    assert vm_id in Path(f"/proc/{process.pid}/cgroup").read_text()
    assert await list_ours(home) == {vm_id}
    await place(home, vm_id, process.pid)  # repeating it changes nothing
    assert await list_ours(home) == {vm_id}
    process.kill()
    process.wait()
    assert await remove(home, vm_id)
    assert await list_ours(home) == set()
    assert await remove(home, vm_id)


@confined
async def test_a_busy_group_stays(
    home: Home, process: subprocess.Popen[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cgroup, "REMOVE_SECONDS", 0.1)
    vm_id = new_id()
    await place(home, vm_id, process.pid)
    assert not await remove(home, vm_id)
    assert process.poll() is None
    assert await list_ours(home) == {vm_id}
    process.kill()
    process.wait()
    assert await remove(home, vm_id)


@confined
async def test_homes_do_not_see_each_other(home: Home, tmp_path: Path, process: subprocess.Popen[bytes]) -> None:
    other = Home(tmp_path / "other", tmp_path, tmp_path)
    vm_id = new_id()
    await place(home, vm_id, process.pid)
    assert await list_ours(other) == set()
    assert await remove(other, vm_id)
    assert await list_ours(home) == {vm_id}
    process.kill()
    process.wait()
    assert await remove(home, vm_id)


@only_v1
async def test_v1_limits(home: Home, process: subprocess.Popen[bytes]) -> None:
    vm_id = new_id()
    before = _folders(process.pid)
    assert await place(home, vm_id, process.pid, Limits(cpu_weight=200, pids=77)) == ""
    after = _folders(process.pid)
    assert (after["cpu"] / "cpu.shares").read_text() == "2048\n"
    assert (after["pids"] / "pids.max").read_text() == "77\n"
    assert after["freezer"].parent.parent == before["freezer"]  # below the daemon's own group
    assert after["memory"] == before["memory"]
    process.kill()
    process.wait()
    assert await remove(home, vm_id)
    assert not after["cpu"].parent.exists()


@only_v1
@pytest.mark.skipif(
    MODE == "v1" and _folders(os.getpid()).get("memory") != Path("/sys/fs/cgroup/memory"),
    reason="the tests run inside a memory group of somebody else's, in which they make nothing",
)
async def test_v1_memory_limit(home: Home, process: subprocess.Popen[bytes]) -> None:
    vm_id = new_id()
    assert await place(home, vm_id, process.pid, Limits(memory=512 << 20)) == ""
    assert (_folders(process.pid)["memory"] / "memory.limit_in_bytes").read_text() == f"{512 << 20}\n"
    process.kill()
    process.wait()
    assert await remove(home, vm_id)


async def test_v2_without_controllers_still_groups(
    home: Home, process: subprocess.Popen[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The unified hierarchy of a hybrid host: groups can be made, and the missing limits are told."""
    unified: Hierarchy | None = next((each for each in cgroups.hierarchies() if each.version == 2), None)
    if unified is None or unified.controllers & cgroups.V2_CONTROLLERS or not os.access(unified.own, os.W_OK):
        pytest.skip("no unified hierarchy without controllers here")
    monkeypatch.setattr(cgroup, "detect", lambda: Cgroup(mode="v2", reason="a test"))
    monkeypatch.setattr(cgroup, "v2_hierarchy", lambda: unified)
    vm_id = new_id()
    said = await place(home, vm_id, process.pid)
    assert "cpu.weight is not set" in said
    assert "pids.max is not set" in said
    own = next(each.own for each in cgroups.hierarchies(str(process.pid)) if each.version == 2)
    assert (own.name, own.parent.parent) == (f"vm-{vm_id}", unified.own)
    process.kill()
    process.wait()
    assert await remove(home, vm_id)
    assert not own.parent.exists()


@confined
async def test_a_process_that_is_gone_is_a_warning(home: Home, process: subprocess.Popen[bytes]) -> None:
    process.kill()
    process.wait()
    vm_id = new_id()
    assert f"VM {vm_id} is not fully confined" in await place(home, vm_id, process.pid)
    assert await remove(home, vm_id)
    assert await list_ours(home) == set()


async def test_no_cgroups_is_a_warning(home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cgroup, "detect", lambda: Cgroup(mode="none", reason="none is mounted"))
    assert await place(home, "abc", os.getpid()) == "VM abc is not confined: none is mounted"


@pytest.mark.parametrize("vm_id", ["", "../x", "a/b", "A", "-x", "x\n", "a.scope"])
async def test_ids_that_are_no_group_name(home: Home, vm_id: str) -> None:
    with pytest.raises(InvalidInput):
        await place(home, vm_id, os.getpid())
    with pytest.raises(InvalidInput):
        await remove(home, vm_id)


def test_limits_that_make_no_sense() -> None:
    for wrong in ({"cpu_weight": 0}, {"cpu_weight": 10_001}, {"pids": 0}, {"memory": -1}):
        with pytest.raises(InvalidInput):
            Limits(**wrong)
