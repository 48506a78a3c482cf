"""Clones of real guests: what was on the disks is on the clone's, and neither sees what the other writes later."""

import os
import re
import socket
import subprocess
from contextlib import contextmanager, suppress

import pytest
from conftest import CACHE, Daemon, _folder, file_system
from inside import crashed, layers, mounted, on_disk, sh
from test_snapshots import all_written, write_on

from innkeeper.client.errors import ApiError

pytestmark = pytest.mark.guest

BLOB = 150 << 20


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture(scope="module")
def source(daemon):
    """A VM with what no fork has: a seed from the start, and a host port that leads to it."""
    made = daemon.inn.launch("tiny", name="source", memory="256M", disk="256M", publish=[f"{free_port()}:80"])
    sh(made, "mkfs.ext4 -q /dev/vda; sync")
    yield made
    made.delete(force=True)


@pytest.fixture
def launched(source, tidy):
    """Its clones are gone afterwards."""
    return source


def started(daemon, name: str):
    """A clone with its disk checked and mounted."""
    clone = daemon.inn.vm(name)
    clone.start()
    mounted(clone)
    return clone


def test_a_running_vm_is_cloned_at_one_moment_and_goes_on(daemon, vm):
    write_on(vm)
    sh(vm, "while [ $(ls /data | wc -l) -lt 4 ]; do sleep 0.1; done; sync", timeout=120)
    vm.clone("full").wait()
    vm.clone("linked", linked=True).wait()
    vm.clone("frozen", quiesce=True).wait()
    assert layers(daemon, vm) == 2  # its own, and the one that the linked clone stands on with it
    assert vm.state == "running"
    vm.pause()  # its clone boots more quickly then
    for name in ("full", "frozen"):
        (there,) = on_disk(daemon, daemon.inn.vm(name), "ls -p /")
        assert "/file-1/" in there
    clone = started(daemon, "linked")
    assert int(sh(clone, "ls /data | wc -l")) > 1
    sh(clone, "rm -rf /data/*; echo its own >/data/mine; sync")
    clone.stop(force=True)
    vm.resume()
    all_written(vm)  # the checksums that the guest has in memory are right, whatever its clone wrote
    assert on_disk(daemon, clone, "cat /mine") == ["its own\n"]


def test_a_clone_is_a_machine_of_its_own(daemon, launched):
    vm = launched
    remarks = vm.clone("other").wait().result["warnings"]
    source, clone = vm.info, daemon.inn.vm("other").info
    (port,) = [forward["host"] for forward in source["forwards"]]
    assert any(str(port) in remark for remark in remarks)
    assert clone["state"] == "stopped" and clone["cloned_from"] == "source" and clone["linked_to"] == []
    assert clone["forwards"] == [] and clone["ssh_port"] != source["ssh_port"]
    for what in ("uuid", "macs"):
        assert clone["machine"][what] != source["machine"][what]
    assert clone["machine"]["type"] == source["machine"]["type"]
    other = started(daemon, "other")
    look = "hostname; cat /sys/class/net/eth0/address"
    assert sh(other, look).split() == ["other", *clone["machine"]["macs"]]
    assert sh(vm, look).split() == ["source", *source["machine"]["macs"]]


def test_a_clone_may_keep_the_identity(daemon, launched):
    vm = launched
    vm.stop(force=True)
    (remark,) = [r for r in vm.clone("twin", keep_identity=True).wait().result["warnings"] if "identity" in r]
    assert "never have both on one network" in remark
    twin = daemon.inn.vm("twin").info
    for what in ("uuid", "macs"):
        assert twin["machine"][what] == vm.info["machine"][what]
    folders = [daemon.home.vm(one["id"]) for one in (twin, vm.info)]
    assert len({(folder / "seed.iso").read_bytes() for folder in folders}) == 1
    assert twin["ssh_port"] != vm.info["ssh_port"]
    started(daemon, "twin")


def test_a_snapshot_from_before_the_first_start_brings_back_that_the_guest_is_still_somebody_else(daemon, vm):
    def due(clone) -> bool:
        return daemon.documents()[f"vm/{clone.info['id']}"]["identity_due"]

    vm.clone("other", linked=True).wait()
    clone = daemon.inn.vm("other")
    clone.snapshots.create("fresh").wait()
    clone.start()
    assert not due(clone)
    clone.stop(force=True)
    kept = clone.snapshots.restore("fresh").wait().result["kept"]
    assert due(clone)
    clone.snapshots.restore(kept).wait()
    assert not due(clone)
    clone.snapshots.restore("fresh", start=True).wait()
    assert not due(clone)
    told = [(event["kind"], event["target"]["id"]) for event in daemon.inn.events()]
    assert (
        told.count(("vm.ready", clone.info["id"])) == 2
    )  # each time somebody waited for its agent, to tell it who it is


def test_what_a_linked_clone_stands_on_stays(daemon, vm):
    sh(vm, "echo A >/data/a; sync")
    vm.clone("linked", linked=True).wait()
    sh(vm, "echo B >/data/a; sync")
    vm.clone("second", linked=True).wait()
    with pytest.raises(ApiError, match="linked, second") as refused:
        vm.delete(force=True)
    assert refused.value.code == "in-use" and refused.value.facts["users"] == ["linked", "second"]
    assert vm.state == "running" and vm.info["linked_clones"] == ["linked", "second"]
    vm.snapshots.create("here").wait()
    linked = started(daemon, "linked")  # has the shared layers open while those of the source are merged
    vm.snapshots.delete("here").wait()
    vm.snapshots.prune().wait()
    assert layers(daemon, vm) == 3
    assert sh(linked, "cat /data/a") == "A\n"
    second = daemon.inn.vm("second")
    assert on_disk(daemon, second, "cat /a") == ["B\n"]
    linked.clone("alone").wait()  # full: it takes all layers along, those of the source too
    linked.delete(force=True)
    second.delete(force=True)
    assert layers(daemon, vm) == 1 and vm.state == "running"  # what only they needed is merged
    assert sh(vm, "cat /data/a") == "B\n"
    vm.delete(force=True)
    assert on_disk(daemon, daemon.inn.vm("alone"), "cat /a") == ["A\n"]


def test_a_paused_and_a_crashed_vm_are_cloned(daemon, vm):
    sh(vm, "echo A >/data/a; sync")
    vm.pause()
    vm.clone("of-paused").wait()
    assert vm.state == "paused" and layers(daemon, vm) == 1
    os.kill(vm.info["pid"], 9)
    crashed(vm)
    vm.clone("of-crashed").wait()
    for name in ("of-paused", "of-crashed"):
        assert on_disk(daemon, daemon.inn.vm(name), "cat /a") == ["A\n"]


def test_clones_that_cannot_be(daemon, vm):
    with pytest.raises(ApiError, match="already") as taken:
        vm.clone("own")
    assert taken.value.code == "name-taken"
    with pytest.raises(ApiError) as invalid:
        vm.clone("no/name")
    assert invalid.value.code == "invalid-input"
    vm.stop(force=True)
    with pytest.raises(ApiError, match="does not run"):
        vm.clone("other", quiesce=True).wait()
    assert "other" not in [one["name"] for one in daemon.inn.vms()] and layers(daemon, vm) == 1


def test_a_full_clone_is_cancelled_in_the_middle(daemon, vm):
    sh(vm, f"yes innkeeper | head -c {BLOB // 3} >/data/blob; sync; md5sum /data/blob >/tmp/sum")
    for attempt in range(20):  # until it is not the copy that is quicker
        operation = vm.clone(f"other-{attempt}")
        while operation.poll(0.05).step != "copy" and not operation.ended:
            pass
        with suppress(ApiError):  # it has ended
            operation.cancel()
        if operation.wait_quietly().state == "cancelled":
            break
        daemon.inn.vm(f"other-{attempt}").delete(force=True)
    assert operation.state == "cancelled"
    assert [one["name"] for one in daemon.inn.vms() if "other" in one["name"]] == []
    assert len(list(daemon.home.vms.iterdir())) == len(daemon.inn.vms()) and not list(daemon.home.work.iterdir())
    assert vm.state == "running" and layers(daemon, vm) == 1
    sh(vm, "umount /data; mount /dev/vda /data; md5sum -c /tmp/sum >&2", timeout=120)


@contextmanager
def daemon_in(pool):
    """A daemon whose pool is that folder, with the tiny image."""
    CACHE.mkdir(mode=0o711, exist_ok=True)
    made = Daemon(_folder(), pool)
    try:
        made.add_image("tiny")
        yield made.start()
    finally:
        made.clean()


def filled(daemon):
    """A VM with a disk full of data, stopped."""
    vm = daemon.inn.launch("tiny", name="source", memory="256M", disk="256M")
    fill = f"head -c {BLOB} /dev/urandom >/data/blob; sync"
    sh(vm, f"mkfs.ext4 -q /dev/vda; mkdir -p /data; mount /dev/vda /data; {fill}")
    vm.stop(force=True)
    return vm


@pytest.mark.root
@pytest.mark.parametrize("kind", ["xfs", "btrfs"])
@pytest.mark.slow
def test_a_full_clone_shares_blocks_where_the_file_system_can(kind):
    with file_system(kind, "600M") as pool, daemon_in(pool) as daemon:
        vm = filled(daemon)
        os.sync()
        before = os.statvfs(pool)
        for number in range(3):  # a copy of each would not fit
            vm.clone(f"clone-{number}").wait()
        os.sync()
        taken = (before.f_bfree - os.statvfs(pool).f_bfree) * before.f_frsize
        assert taken < 100 << 20
        (theirs,) = daemon.home.vm(vm.info["id"]).glob("disk0-*.qcow2")
        (ours,) = daemon.home.vm(daemon.inn.vm("clone-0").info["id"]).glob("disk0-*.qcow2")
        shown = subprocess.run(["filefrag", "-v", ours], capture_output=True, text=True, check=True).stdout
        assert re.search(r"\bshared\b", shown) and ours.read_bytes() == theirs.read_bytes()
        clone = started(daemon, "clone-2")
        vm.delete()
        assert int(sh(clone, "wc -c </data/blob")) == BLOB


@pytest.mark.root
@pytest.mark.slow
def test_a_full_pool_leaves_the_source_as_it_was():
    with file_system("tmpfs", "300M") as pool, daemon_in(pool) as daemon:
        vm = filled(daemon)
        vm.start()
        with pytest.raises(ApiError) as full:
            vm.clone("other").wait()
        assert full.value.code == "pool-full"
        assert [one["name"] for one in daemon.inn.vms()] == ["source"] and layers(daemon, vm) == 1
        mounted(vm)
        assert int(sh(vm, "wc -c </data/blob")) == BLOB
