"""Snapshots of real guests: what was written before one is there after it, what was written later is not."""

import os
import random
import signal
import subprocess
import time

import pytest
from inside import begin, crashed, layers, mounted, on_disk, over, sh

from innkeeper.client.errors import ApiError, DaemonUnreachable

pytestmark = pytest.mark.guest

NEVER = None


def remove_all(vm) -> None:
    """One by one: a removal that was broken off goes on with the next."""
    while left := names(vm):
        vm.snapshots.delete(left[0]).wait()


def names(vm) -> list[str]:
    return [snapshot["name"] for snapshot in vm.snapshots.list()]


def test_a_restore_brings_back_what_was_there_and_can_be_undone(daemon, vm):
    sh(vm, "echo A >/data/a; sync")
    vm.snapshots.create("before", note="for the test").wait()
    sh(vm, "echo B >/data/b; sync")
    (one,) = vm.snapshots.list()
    assert one["here"] and one["taken"] == "running" and one["stored_size"] > 0 and one["layers"] == 1
    with pytest.raises(ApiError, match="running"):
        vm.snapshots.restore("before").wait()
    kept = vm.snapshots.restore("before", start=True).wait().result["kept"]
    mounted(vm)
    assert sh(vm, "ls /data").split() == ["a", "lost+found"] and sh(vm, "cat /data/a") == "A\n"
    sh(vm, "umount /data")
    vm.snapshots.restore(kept, start=True).wait()
    mounted(vm)
    assert sh(vm, "cat /data/a /data/b") == "A\nB\n"
    assert len(names(vm)) == 3 and set(names(vm)) >= {"before", kept}
    vm.stop(force=True)
    vm.snapshots.restore("before", keep=False).wait()
    assert len(names(vm)) == 3  # the present that nobody kept was not one of them
    assert vm.snapshots.overview()["present"]["at"] == "before"
    vm.snapshots.prune(automatic=True).wait()
    assert names(vm) == ["before"] and layers(daemon, vm) == 2
    (there,) = on_disk(daemon, vm, "ls -p /")
    assert "/a/" in there and "/b/" not in there


WRITER = """
i=0; while [ ! -e /tmp/stop ]; do i=$((i+1)); head -c $((i % 7 * 65536 + 5000)) /dev/urandom >/tmp/blob
cp /tmp/blob /data/file-$((i % 60)); sync; md5sum </tmp/blob | cut -d' ' -f1 >/tmp/sum-$((i % 60))
done; touch /tmp/stopped"""
CHECK = """
n=0; for sum in /tmp/sum-*; do k=${sum#/tmp/sum-}; [ "$(md5sum </data/file-$k | cut -d' ' -f1)" = "$(cat $sum)" ]
n=$((n+1)); done; echo $n"""


def write_on(vm) -> None:
    """From now on the guest writes files and remembers their checksums in its memory."""
    begin(vm, WRITER)


def all_written(vm) -> None:
    """The guest writes no more, and reads back from its disk what it wrote."""
    sh(vm, "touch /tmp/stop; while [ ! -e /tmp/stopped ]; do sleep 0.1; done; umount /data", timeout=300)
    sh(vm, "e2fsck -fn /dev/vda; mount /dev/vda /data", timeout=300)
    assert int(sh(vm, CHECK, timeout=300)) > 5


@pytest.mark.parametrize("count", [4, pytest.param(12, marks=pytest.mark.slow)])
def test_snapshots_go_in_any_order_while_the_guest_writes(daemon, vm, tmp_path, count):
    write_on(vm)
    chance = random.Random(7)
    taken = []
    for number in range(count):
        vm.snapshots.create(f"s{number}", ttl=NEVER).wait()
        taken.append(f"s{number}")
        time.sleep(chance.random())
    assert vm.snapshots.overview()["present"]["layers"] == count + 1
    chance.shuffle(taken)
    for name in taken:
        vm.snapshots.delete(name).wait()
        assert name not in names(vm)
        assert vm.state == "running"
    assert layers(daemon, vm) == 1
    all_written(vm)
    sh(vm, "cd /data; md5sum file-* >sums; cd /; umount /data")
    vm.stop(force=True)
    on_disk(daemon, vm, f"rdump / {tmp_path}")
    subprocess.run(["md5sum", "--check", "--quiet", "sums"], cwd=tmp_path, check=True)


def test_what_a_stopped_vm_does_not_need_is_merged_without_it(daemon, vm):
    for number in range(4):
        sh(
            vm,
            f"echo {number} >/data/n; head -c 300000 /dev/urandom >/data/f{number}; md5sum /data/f* >/data/sums; sync",
        )
        vm.snapshots.create(f"s{number}").wait()
    vm.stop(force=True)
    vm.snapshots.restore("s1").wait()  # the present is a branch of its own now
    for name in ("s2", "s0"):
        vm.snapshots.delete(name).wait()
    vm.start()
    mounted(vm)
    assert sh(vm, "cat /data/n; md5sum -c /data/sums >&2") == "1\n"
    vm.snapshots.delete("s3").wait()  # of the branch that the running VM does not stand on
    vm.snapshots.restore("auto-1", start=True).wait()
    mounted(vm)
    assert sh(vm, "cat /data/n; md5sum -c /data/sums >&2") == "3\n"
    vm.snapshots.delete("s1").wait()
    vm.snapshots.prune(automatic=True).wait()
    assert names(vm) == [] and layers(daemon, vm) == 1
    assert sh(vm, "cat /data/n; md5sum -c /data/sums >&2") == "3\n"


def test_a_quiesced_snapshot_has_all_that_was_written(daemon, vm):
    sh(vm, "mkdir /data/q; for i in $(seq 50); do echo $i >/data/q/$i; done")  # and no sync
    vm.snapshots.create("quiet", quiesce=True).wait()
    assert vm.snapshots.get("quiet")["quiesced"]
    sh(vm, "echo after >/data/after; sync")  # it is thawed
    vm.snapshots.restore("quiet", force=True).wait()
    there, *written = on_disk(daemon, vm, "ls -p /", *(f"cat /q/{number}" for number in range(1, 51)))
    assert "/after/" not in there and written == [f"{number}\n" for number in range(1, 51)]


def test_a_chain_has_a_limit_and_a_clear_refusal(daemon):
    daemon.inn.create({"name": "long", "image": None, "disks": [{"size": "1M"}]}, start=False).wait()
    vm = daemon.inn.vm("long")
    try:
        for _ in range(15):
            vm.snapshots.create().wait()
        with pytest.raises(ApiError, match="16 layers") as caught:
            vm.snapshots.create()
        assert "prune" in caught.value.hint
        with pytest.raises(ApiError, match="named 'snap-1' already"):
            vm.snapshots.create("snap-1")
        for name in names(vm)[3:10]:
            vm.snapshots.delete(name).wait()
        assert len(names(vm)) == 8 and layers(daemon, vm) == 9
        vm.snapshots.create("again", ttl=1).wait()
        deadline = time.monotonic() + 60
        while "again" in names(vm):
            assert time.monotonic() < deadline
            time.sleep(0.2)
        kinds = [event["kind"] for event in daemon.inn.events()]
        assert "snapshot.expired" in kinds
    finally:
        vm.delete(force=True)


def test_what_a_chain_costs_is_measured(daemon, vm):
    sh(vm, "head -c 20000000 /dev/urandom >/data/blob; sync")
    for number in range(3):
        vm.snapshots.create(f"s{number}").wait()
    begin(vm, WRITER)  # to the layer above
    (one,) = vm.snapshots.measure("s0").wait().result["disks"]
    (all_of_them,) = vm.snapshots.measure("s2").wait().result["disks"]
    assert one["layers"] == 1 and all_of_them["layers"] == 3
    assert one["through"] > 0 and all_of_them["through"] > 0 and all_of_them["alone"] > 0
    assert vm.state == "running" and len(names(vm)) == 3
    all_written(vm)


# --- in between, somebody dies ---


@pytest.mark.parametrize("times", [3, pytest.param(10, marks=pytest.mark.slow)])
def test_a_daemon_that_dies_at_any_moment_loses_nothing(daemon, vm, times):
    chance = random.Random()
    write_on(vm)
    for number in range(times):
        taken = names(vm)
        if len(taken) < 2 or chance.random() < 0.4:
            vm.snapshots.create(f"s{number}")
        else:
            vm.snapshots.delete(chance.choice(taken))
        time.sleep(chance.random() * 0.4)
        daemon.kill()
        daemon.start()
        over(daemon)
        assert vm.state == "running"
    remove_all(vm)
    vm.snapshots.prune().wait()
    assert names(vm) == [] and layers(daemon, vm) == 1
    all_written(vm)


@pytest.mark.parametrize("times", [1, pytest.param(4, marks=pytest.mark.slow)])
def test_a_guest_that_is_killed_at_any_moment_keeps_what_it_had_written_out(daemon, vm, times):
    chance = random.Random()
    for _ in range(times):
        for name in ("one", "two"):
            vm.snapshots.create(name).wait()
            sh(vm, "head -c 9000000 /dev/urandom >/data/$$; sync")
        sh(vm, "cd /data; md5sum [0-9]* >sums; sync")
        operation = vm.snapshots.delete(chance.choice(["one", "two"]))
        time.sleep(chance.random() * 0.4)
        os.kill(vm.info["pid"], signal.SIGKILL)
        operation.wait_quietly()
        crashed(vm)
        remove_all(vm)
        assert layers(daemon, vm) == 1
        vm.start()
        mounted(vm)
        sh(vm, "cd /data; md5sum -c sums", timeout=300)


def test_a_merge_is_cancelled_in_the_middle_and_gone_on_with(daemon, vm):
    sh(vm, "yes one | head -c 20000000 >/data/big; sync")
    vm.snapshots.create("big").wait()
    sh(vm, "yes two | head -c 25000000 >/data/more; sync; cd /data; md5sum big more >sums; sync")
    pid = vm.info["pid"]
    os.kill(pid, signal.SIGSTOP)  # so it is in the middle of merging for as long as we like
    try:
        operation = vm.snapshots.delete("big")
        while operation.poll(0.05).step != "merge":
            assert not operation.ended
        operation.cancel()
    finally:
        os.kill(pid, signal.SIGCONT)
    assert operation.wait_quietly().state == "cancelled"
    assert vm.state == "running" and layers(daemon, vm) == 2
    vm.snapshots.prune().wait()
    remove_all(vm)
    assert layers(daemon, vm) == 1
    sh(vm, "cd /; umount /data; e2fsck -fn /dev/vda; mount /dev/vda /data; cd /data; md5sum -c sums", timeout=300)


@pytest.mark.parametrize(
    ("fault", "taken"),
    [
        ("snapshot-create/freeze/after/kill", True),
        ("snapshot-create/switch/after/kill", True),
        pytest.param("snapshot-create/freeze/after/fail", False, marks=pytest.mark.slow),  # undone as the next one is
        ("snapshot-create/switch/before/fail", False),
        ("snapshot-create/switch/before/fail,snapshot-create/freeze/undo/kill", False),
    ],
)
def test_a_frozen_guest_is_thawed_whatever_happens(daemon, vm, fault, taken):
    sh(vm, "echo A >/data/a")
    daemon.kill()
    daemon.start(fault)
    with pytest.raises((ApiError, DaemonUnreachable, OSError)):
        vm.snapshots.create("quiet", quiesce=True).wait()
    if not fault.endswith("kill"):
        daemon.kill()  # for the tests that come later it has no fault
    daemon.start()
    over(daemon)
    assert names(vm) == (["quiet"] if taken else [])
    sh(vm, "echo B >/data/b; sync; cat /data/a /data/b", timeout=60)  # would never end in a frozen file system


def test_what_cannot_be_quiesced_is_said_at_once(daemon, vm):
    vm.pause()
    with pytest.raises(ApiError, match="nothing to quiesce"):
        vm.snapshots.create(quiesce=True).wait()
    vm.resume()
    sh(vm, "umount /data")
    (warning, *_) = vm.snapshots.create("nothing-frozen", quiesce=True).wait().result["warnings"]
    assert "no file system" in warning and not vm.snapshots.get("nothing-frozen")["quiesced"]
