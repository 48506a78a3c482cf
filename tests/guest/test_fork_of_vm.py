"""Forks of a VM that runs: it goes on, they go on from the same moment, and each is a machine of its own."""

import subprocess
import sys
import time

import pytest
from conftest import running_daemon
from inside import begin, mounted, sh

from innkeeper.client.errors import ApiError

pytestmark = pytest.mark.guest

COUNT = "i=0; while usleep 100000; do i=$((i+1)); echo $i >/run/n.new; mv /run/n.new /run/n; done"
IDENTITY = (
    "hostname",
    "cat /sys/class/net/eth0/address",
    "cat /sys/class/dmi/id/product_uuid",
    "cat /proc/sys/kernel/random/uuid",
)


@pytest.fixture(scope="module")
def daemon():
    with running_daemon("tiny") as made:
        yield made


@pytest.fixture(scope="module")
def parent(daemon):
    vm = daemon.inn.launch("tiny", name="parent", memory="256M", disk="256M", cpus=1)
    sh(vm, "mkdir -p /run /data; mkfs.ext4 -q /dev/vda; mount /dev/vda /data; echo A >/data/a; sync")
    begin(vm, COUNT)
    sh(vm, "while [ ! -e /run/n ]; do :; done")
    return vm


def told(vm, script: str) -> str:
    return sh(vm, script).strip()


def tidied(daemon, vm, layers: int) -> None:
    """What was taken for the forks has gone, and the VM's disk consists of so many layers."""
    deadline = time.monotonic() + 60
    while True:
        present = vm.snapshots.overview()
        documents = daemon.inn.operations()
        if present["present"]["layers"] == layers and all(operation.ended for operation in documents):
            break
        assert time.monotonic() < deadline, present
        time.sleep(0.1)
    assert not present["snapshots"] and not list(daemon.home.vm(vm.info["id"]).glob("memory-*"))


def test_all_go_on_from_one_moment_and_are_machines_of_their_own(daemon, parent):
    before = int(told(parent, "cat /run/n"))
    for operation in daemon.inn.forks("parent", ["one", "two"]):
        operation.wait()
    forks = [daemon.inn.vm(name) for name in ("one", "two")]
    try:
        assert parent.state == "running"
        for vm in forks:
            count, mac, uuid, now = told(vm, f"cat /run/n; {IDENTITY[1]}; {IDENTITY[2]}; date +%s").split()
            info = vm.info
            assert int(count) >= before and abs(int(now) - time.time()) < 30  # it counts on from there
            assert info["cloned_from"] == "parent" and [mac] == info["machine"]["macs"]
            assert uuid == info["machine"]["uuid"]
        for answers in zip(*(told(vm, "; ".join(IDENTITY)).splitlines() for vm in (parent, *forks)), strict=True):
            assert len(set(answers)) == 3
        for vm in (parent, *forks):
            sh(vm, "hostname >/data/mine; sync")
        for vm in (parent, *forks):
            goes_on = "n=$(cat /run/n); while [ $(cat /run/n) -le $n ]; do usleep 20000; done"
            assert told(vm, f"cat /data/a /data/mine; {goes_on}") == f"A\n{vm.name}"
        with pytest.raises(ApiError, match="one, two"):
            parent.delete(force=True)
        tidied(daemon, parent, 2)

        with daemon.inn.fork("one", name="child") as child:  # a fork is a VM like any other
            assert told(child, "cat /data/a /data/mine; hostname") == "A\none\nchild"
        forks[0].restart(force=True)
        mounted(forks[0])
        assert told(forks[0], "cat /data/mine; hostname") == "one\none"
    finally:
        for vm in forks:
            vm.delete(force=True)
    assert told(parent, "cat /data/mine; umount /data; e2fsck -fn /dev/vda >&2; mount /dev/vda /data") == "parent"


def test_a_snapshot_with_memory_can_be_forked_as_often_as_one_likes(daemon, parent):
    sh(parent, "echo then >/run/when; echo then >/data/when; sync")
    parent.snapshots.create("then", memory=True).wait()
    sh(parent, "echo now >/run/when; echo now >/data/when; sync")
    for name in ("first", "second"):
        with daemon.inn.fork("parent", snapshot="then", name=name) as vm:
            assert told(vm, "cat /run/when /data/when; hostname") == f"then\nthen\n{name}"
    assert told(parent, "cat /run/when /data/when") == "now\nnow"
    parent.snapshots.create("disks").wait()
    with pytest.raises(ApiError, match="no memory to go on from"):
        daemon.inn.fork("parent", snapshot="disks")
    for name in ("then", "disks"):
        parent.snapshots.delete(name).wait()


def test_a_command_in_a_fork_that_is_thrown_away(daemon, parent):
    program = [sys.executable, "-c", "import sys; from innkeeper.cli.main import main; sys.exit(main())"]
    words = ["fork", "parent", "--rm", "--", "sh", "-c", "cat /data/a; exit 7"]
    environment = {"INNKEEPER_HOME": str(daemon.home.data), "PATH": "/usr/bin:/bin", "HOME": str(daemon.home.data)}
    for _ in range(2):  # at once after one another
        done = subprocess.run([*program, *words], env=environment, capture_output=True, text=True, timeout=300)
        assert (done.stdout, done.returncode) == ("A\n", 7), done
        assert [vm["name"] for vm in daemon.inn.vms()] == ["parent"]
    tidied(daemon, parent, 1)


def test_one_without_a_disk_has_memory_to_fork(daemon):
    with daemon.inn.launch("tiny", name="diskless", memory="192M", cpus=1, disk=()) as vm:
        sh(vm, "echo here >/tmp/file")
        with daemon.inn.fork("diskless") as fork:
            assert told(fork, "cat /tmp/file") == "here"


def test_what_cannot_be_forked_says_why(daemon, parent):
    with pytest.raises(ApiError, match="no image and no VM"):
        daemon.inn.fork("nobody")
    parent.pause()
    with pytest.raises(ApiError, match="is paused") as caught:
        daemon.inn.fork("parent")
    assert "resume" in caught.value.hint
    parent.resume()
    assert parent.info["allowed_actions"]["fork"]["allowed"]
