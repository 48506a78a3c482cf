"""Snapshots with the memory of real guests: what they were doing goes on from there, with disks of the same moment."""

import os
import random
import signal
import time

import pytest
from inside import begin, crashed, on_disk, over, ready, sh

from innkeeper.client.errors import ApiError

pytestmark = pytest.mark.guest

COUNT = "i=0; while usleep 20000; do i=$((i+1)); echo $i >/run/count.new; mv /run/count.new /run/count; done"
"""In memory only."""
BOTH = """i=0; while [ ! -e /run/stop ]; do i=$((i+1)); echo $i >/data/n; sync
echo $i >/run/n.new; mv /run/n.new /run/n; done; touch /run/stopped"""
"""On disk first, in memory then: of one moment, the disk is never behind and at most one ahead."""


def counted(vm) -> int:
    return int(sh(vm, "cat /run/count"))


@pytest.fixture
def booted(daemon):
    """One that has booted, for what a fork's memory does not show."""
    made = daemon.inn.launch("tiny", name="booted", memory="256M", disk="256M")
    sh(made, "mkdir -p /run; mkfs.ext4 -q /dev/vda; mkdir -p /data; mount /dev/vda /data")
    yield made
    made.delete(force=True)


def files(daemon, vm) -> list[str]:
    return sorted(path.name for path in daemon.home.vm(vm.info["id"]).glob("memory-*"))


def test_a_restore_goes_on_with_what_the_guest_was_doing(daemon, booted):
    vm = booted
    sh(vm, "echo A >/data/a; sync")
    begin(vm, COUNT)
    sh(vm, "while [ ! -e /run/count ]; do :; done")
    boot = sh(vm, "cat /proc/sys/kernel/random/boot_id")  # made when it is first read
    before = counted(vm)
    result = vm.snapshots.create("then", memory=True).wait().result
    after = counted(vm)
    one = vm.snapshots.get("then")
    assert result["memory"]["size"] == one["memory"]["size"] > 10_000_000 and one["memory"]["pause"] > 0
    assert one["stored_size"] >= one["memory"]["size"] and len(files(daemon, vm)) == 1
    path = daemon.home.vm(vm.info["id"]) / files(daemon, vm)[0]
    assert path.stat().st_mode & 0o777 == 0o600 and path.stat().st_uid == os.geteuid()
    sh(vm, "echo B >/data/b; sync; echo 10000000 >/run/count")
    with pytest.raises(ApiError, match="running"):
        vm.snapshots.restore("then").wait()

    result = vm.snapshots.restore("then", force=True).wait().result
    assert result["went_on"] == "running" and vm.state == "running"
    assert sh(vm, "ls /data").split() == ["a", "lost+found"]
    now = counted(vm)
    assert before <= now < 10_000_000
    assert sh(vm, "cat /proc/sys/kernel/random/boot_id") == boot  # it has not booted
    assert "reseeded" in sh(vm, "dmesg")  # and knows that this is another life
    assert abs(int(sh(vm, "date +%s")) - time.time()) < 60
    deadline = time.monotonic() + 60
    while counted(vm) <= max(now, after):  # it goes on counting
        assert time.monotonic() < deadline
    vm.snapshots.restore(result["kept"], force=True).wait()
    assert on_disk(daemon, vm, "cat /a", "cat /b") == ["A\n", "B\n"]
    for name in [one["name"] for one in vm.snapshots.list()]:
        vm.snapshots.delete(name).wait()
    assert files(daemon, vm) == []


def agree(vm) -> None:
    """Stop writing; what the file system says, what is on the disk, and what is in memory belong together."""
    at, seen = sh(vm, "touch /run/stop; while [ ! -e /run/stopped ]; do :; done; cat /data/n /run/n").split()
    assert at == seen
    assert sh(vm, "umount /data; e2fsck -fn /dev/vda >&2; mount /dev/vda /data; cat /data/n").strip() == seen


def test_memory_and_disks_are_of_one_moment(daemon, vm):
    """The guest's cache says what its disk holds: were one older than the other, the file system would fall apart."""
    begin(vm, BOTH)
    sh(vm, "while [ ! -e /run/n ]; do :; done")
    for name in ("one", "two"):
        vm.snapshots.create(name, memory=True).wait()
    for name in ("one", "two", "one"):
        vm.snapshots.restore(name, force=True, keep=False).wait()
        agree(vm)
    vm.stop()  # its devices, which were loaded, are reset then
    assert (vm.state, vm.info["reason"]) == ("stopped", "the guest shut down")


def test_what_was_paused_stays_so_and_the_disks_can_be_had_alone(vm):
    begin(vm, COUNT)
    sh(vm, "while [ ! -e /run/count ]; do :; done; echo A >/data/a; sync")
    vm.snapshots.create("then", memory=True).wait()
    assert vm.snapshots.restore("then", force=True, paused=True).wait().result["went_on"] == "paused"
    assert vm.state == "paused"
    vm.resume()
    assert counted(vm) > 0
    vm.snapshots.restore("then", start=True, disks_only=True).wait()
    ready(vm)
    sh(vm, "[ ! -e /run/count ]; fsck.ext4 -p /dev/vda >&2 || [ $? = 1 ]; mkdir -p /data; mount /dev/vda /data")
    assert sh(vm, "cat /data/a") == "A\n"


def test_what_makes_no_sense_is_refused_with_the_reason(daemon, vm):
    with pytest.raises(ApiError, match="frozen") as caught:
        vm.snapshots.create(memory=True, quiesce=True)
    assert caught.value.code == "invalid-input"
    vm.snapshots.create("disks").wait()
    with pytest.raises(ApiError, match="nothing to pause"):
        vm.snapshots.restore("disks", force=True, paused=True)
    vm.pause()
    with pytest.raises(ApiError, match="is paused") as caught:
        vm.snapshots.create(memory=True)
    assert "resume" in caught.value.hint
    vm.stop(force=True)
    with pytest.raises(ApiError, match="is stopped"):
        vm.snapshots.create(memory=True)
    assert files(daemon, vm) == [] and [one["name"] for one in vm.snapshots.list()] == ["disks"]


def test_a_fork_goes_on_from_its_memory_too(daemon, vm):
    """Its devices are those of the warm image until it boots for the first time."""
    begin(vm, COUNT)
    sh(vm, "while [ ! -e /run/count ]; do :; done")
    vm.snapshots.create("then", memory=True).wait()
    who = sh(vm, "hostname; cat /sys/class/net/*/address; echo 10000000 >/run/count")
    vm.snapshots.restore("then", force=True, keep=False).wait()
    assert counted(vm) < 10_000_000 and sh(vm, "hostname; cat /sys/class/net/*/address") == who
    vm.snapshots.restore("then", start=True, disks_only=True, keep=False).wait()
    ready(vm)
    vm.snapshots.restore("then", force=True).wait()  # its own life has begun meanwhile
    assert counted(vm) < 10_000_000


def test_the_machine_is_set_back_to_the_one_that_the_memory_fits(daemon, vm):
    begin(vm, COUNT)
    sh(vm, "while [ ! -e /run/count ]; do :; done")
    vm.snapshots.create("then", memory=True).wait()
    vm.stop(force=True)
    document = {"kind": "vm", "state": "stopped"} | vm.info["spec"] | {"cpus": 3, "memory": "320M", "note": "mine"}
    document.pop("first_boot")
    (operation,) = daemon.inn.apply([document])["operations"]
    daemon.inn.operation(operation).wait()
    warnings = vm.snapshots.restore("then").wait().result["warnings"]
    assert "vCPUs (3 → 2)" in warnings[0] and "memory in MiB (320 → 256)" in warnings[0]
    info = vm.info
    assert (info["cpus"], info["memory"], info["spec"]["note"]) == (2, 256 << 20, "mine") and not info["pending"]
    assert counted(vm) > 0


def test_memory_that_cannot_be_loaded_leaves_everything_as_it_was(daemon, vm):
    sh(vm, "echo A >/data/a; sync")
    vm.snapshots.create("then", memory=True).wait()
    sh(vm, "echo B >/data/b; sync")
    path = daemon.home.vm(vm.info["id"]) / files(daemon, vm)[0]
    size = path.stat().st_size
    os.truncate(path, size // 2)
    vm.stop(force=True)
    spec = vm.info["spec"]
    with pytest.raises(ApiError, match="not whole") as caught:
        vm.snapshots.restore("then")
    assert "--disks-only" in caught.value.hint
    os.truncate(path, size)  # all zeros where the devices were
    with pytest.raises(ApiError, match="cannot be gone on from") as caught:
        vm.snapshots.restore("then").wait()
    assert "--disks-only" in caught.value.hint
    assert vm.state == "stopped" and [one["name"] for one in vm.snapshots.list()] == ["then"]
    assert vm.info["spec"] == spec
    path.unlink()
    path.symlink_to("/etc/passwd")
    with pytest.raises(ApiError, match="is gone"):
        vm.snapshots.restore("then")
    assert on_disk(daemon, vm, "cat /a", "cat /b") == ["A\n", "B\n"]


# --- in between, somebody dies ---


@pytest.mark.slow
def test_a_daemon_that_is_killed_at_any_moment_leaves_a_guest_that_runs(daemon, vm):
    begin(vm, BOTH)
    chance = random.Random()
    taken = []
    for number in range(6):
        vm.snapshots.create(f"s{number}", memory=True)
        time.sleep(chance.random() * 1.5)
        daemon.kill()
        daemon.start()
        over(daemon)
        assert vm.state == "running"
        sh(vm, "n=$(cat /data/n); while [ $(cat /data/n) = $n ]; do :; done", timeout=60)  # it goes on writing
        taken = [one["name"] for one in vm.snapshots.list()]
        assert len(files(daemon, vm)) == len(taken)
    for name in taken:
        vm.snapshots.restore(name, force=True, keep=False).wait()
        agree(vm)


def test_a_guest_that_is_killed_while_its_memory_is_saved_loses_nothing_else(daemon, vm):
    sh(vm, "echo A >/data/a; sync; dd if=/dev/urandom of=/run/noise bs=1M count=60 2>/dev/null")
    operation = vm.snapshots.create("s", memory=True)
    while operation.poll(0.05).step != "switch":
        assert not operation.ended
    os.kill(vm.info["pid"], signal.SIGKILL)
    if operation.wait_quietly().state == "failed":
        assert vm.snapshots.list() == [] and files(daemon, vm) == []
    crashed(vm)
    assert on_disk(daemon, vm, "cat /a") == ["A\n"]


def test_a_save_can_be_cancelled(daemon, vm):
    begin(vm, COUNT)
    sh(vm, "dd if=/dev/urandom of=/run/noise bs=1M count=60 2>/dev/null")
    operation = vm.snapshots.create("s", memory=True)
    operation.cancel()
    assert operation.wait_quietly().state == "cancelled"
    assert vm.state == "running" and files(daemon, vm) == [] and vm.snapshots.list() == []
    before = counted(vm)
    while counted(vm) == before:
        pass
    vm.snapshots.create("s", memory=True).wait()
