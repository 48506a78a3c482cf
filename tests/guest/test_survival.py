"""Guests outlive the daemon, and whatever befalls a guest, its disk or its QEMU is told as it is."""

import asyncio
import contextlib
import io
import os
import re
import signal
import subprocess
import tempfile
import time
from pathlib import Path

import pycdlib
import pytest
from conftest import CACHE, Daemon, _folder

from innkeeper.client import Innkeeper
from innkeeper.client.errors import ApiError
from innkeeper.client.wishes import vm_spec
from innkeeper.machine.serial_log import KEPT
from innkeeper.qemu import cgroup
from innkeeper.qemu.process import Pid

pytestmark = pytest.mark.guest


@pytest.fixture(scope="module")
def own():
    """A daemon that the tests of this file may kill; it runs again at the end of each."""
    CACHE.mkdir(mode=0o711, exist_ok=True)
    daemon = Daemon(_folder())
    daemon.add_image("tiny")
    daemon.start().inn.warm("tiny", vm_spec("warming", "tiny", **SIZE)).wait()
    yield daemon
    daemon.clean()


@pytest.fixture
def survivor(own):
    """A running guest of that daemon: a fork."""
    yield own.inn.fork("tiny-warm", name="survivor")
    own.inn.vm("survivor").delete(force=True)


@pytest.fixture(scope="module")
def booted(own):
    """A guest of that daemon that was not forked: QEMU 7.2 crashes when a fork's guest powers off."""
    yield launch(own, "booted")
    own.inn.vm("booted").delete(force=True)


@pytest.fixture
def awake(booted):
    """The same, shared by what leaves it in order: it runs, and its agent answers."""
    if booted.state != "running":
        booted.start()
    until(lambda: agent_answers(booted), 90)
    return booted


SIZE = {"memory": "160M", "disk": "1G", "cpus": 1}


def launch(daemon, name):
    return daemon.inn.launch("tiny", name=name, **SIZE)


def sh(vm, script: str) -> str:
    result = vm.exec(["sh", "-c", script])
    assert result.status == 0, result
    return result.stdout.decode()


def until(what, seconds=30.0):
    """Wait for `what()` to be true; returns it."""
    deadline = time.monotonic() + seconds
    while not (found := what()):
        assert time.monotonic() < deadline, "it did not come about"
        time.sleep(0.02)
    return found


def state(vm) -> tuple[str, str]:
    info = vm.info
    return info["state"], info["reason"]


def events(daemon, kind: str, name: str) -> list[str]:
    return [e["text"] for e in daemon.inn.events() if e["kind"] == kind and e["target"]["name"] == name]


def document(daemon, vm_id: str) -> dict:
    import json
    import sqlite3

    with contextlib.closing(sqlite3.connect(f"file:{daemon.home.store}?mode=ro", uri=True)) as db:
        return json.loads(db.execute("SELECT value FROM document WHERE key = ?", (f"vm/{vm_id}",)).fetchone()[0])


# --- the daemon dies ---

COUNT = "i=0; while :; do i=$((i+1)); echo $i >/tmp/new; mv /tmp/new /tmp/count; sleep 0.1; done"


@pytest.mark.parametrize("times", [4, pytest.param(100, marks=[pytest.mark.slow, pytest.mark.timeout(1800)])])
def test_killing_the_daemon_again_and_again_harms_no_guest(own, times):
    names = [f"counter-{number}" for number in range(3)]
    for operation in own.inn.forks("tiny-warm", names):
        operation.wait()
    guests = [own.inn.vm(name) for name in names]
    for vm in guests:
        sh(vm, f"({COUNT}) >/dev/null 2>&1 </dev/null &")
    before = {vm["name"]: vm["pid"] for vm in own.inn.vms()}
    assert set(before) == set(names) and all(before.values())
    counts = [0, 0, 0]
    slowest = 0.0
    for _ in range(times):
        own.kill()
        begun = time.monotonic()
        own.start()
        listed = own.inn.vms()
        slowest = max(slowest, time.monotonic() - begun)
        assert {vm["name"]: vm["pid"] for vm in listed} == before
        assert [vm["state"] for vm in listed] == ["running"] * 3
        now = [int(sh(vm, "cat /tmp/count")) for vm in guests]
        assert all(new > old for new, old in zip(now, counts, strict=True)), (counts, now)
        counts = now
    assert {pid.number for pid in own.qemus()} == set(before.values())
    print(f"\n{times} kills; the slowest right answer came {slowest:.2f} s after the kill; counters at {counts}")
    for vm in guests:
        vm.delete(force=True)


def test_a_graceful_stop_ends_well_when_the_daemon_is_killed_in_it(own, awake):
    vm = awake
    sh(vm, "mke2fs -q /dev/vda && mkdir -p /mnt && mount /dev/vda /mnt && echo kept >/mnt/file")
    vm.act("stop")
    own.kill()
    own.start()
    until(lambda: vm.state == "stopped" and vm.info["operation"] is None, 90)
    assert "crashed" not in " ".join(events(own, "vm.crashed", "booted"))
    vm.start()
    until(lambda: vm.info["agent"], 90)
    assert sh(vm, "mkdir -p /mnt && mount /dev/vda /mnt && cat /mnt/file") == "kept\n"


# --- QEMU dies, or does not answer ---


def test_qemu_killed_from_outside_is_a_crash(own, survivor):
    vm_id = survivor.info["id"]
    os.kill(survivor.info["pid"], signal.SIGKILL)
    until(lambda: state(survivor) == ("crashed", "QEMU was killed by SIGKILL"), 5)
    assert survivor.info["pid"] is None
    assert len(events(own, "vm.crashed", "survivor")) == 1
    survivor.start()
    assert survivor.state == "running"
    own.kill()
    (pid,) = (pid for pid, owner in own.qemus().items() if owner == vm_id)
    os.kill(pid.number, signal.SIGKILL)
    until(lambda: vm_id not in own.qemus().values())
    own.start()
    assert survivor.state == "crashed" and "no daemon" in survivor.info["reason"]
    assert not list(own.home.vm(survivor.info["id"]).glob("*.sock"))
    survivor.start()
    assert survivor.state == "running"


def test_qemu_that_ends_while_it_is_being_stopped_and_the_daemon_is_dead(own, awake):
    vm, vm_id = awake, awake.info["id"]
    vm.pause()
    vm.resume()
    operation = vm.act("stop", timeout=60)
    until(lambda: vm.state == "stopping", 5)
    own.kill()
    for pid, owner in own.qemus().items():
        if owner == vm_id:
            os.kill(pid.number, signal.SIGKILL)
    until(lambda: vm_id not in own.qemus().values())
    own.start()
    own.inn.operation(operation.id).wait()
    assert vm.state == "stopped"


def test_qemu_that_does_not_answer(own, survivor):
    other = own.inn.create(
        {"name": "other", "image": None, "memory": "32M", "disks": [{"size": "1M"}], "nics": []}, ready=False
    )
    other.wait()
    pid = survivor.info["pid"]
    os.kill(pid, signal.SIGSTOP)
    assert survivor.state == "running"
    own.inn.vm("other").pause()
    own.kill()
    own.start()  # it waits a moment for an answer, and does not hang
    assert survivor.info["pid"] == pid and survivor.state == "running"
    own.inn.vm("other").resume()
    with pytest.raises(ApiError):
        survivor.pause()
    os.kill(pid, signal.SIGCONT)  # it comes back, and so does the daemon's hold on it
    until(lambda: agent_answers(survivor))
    survivor.pause()
    survivor.resume()
    os.kill(pid, signal.SIGSTOP)
    survivor.stop(force=True)
    assert state(survivor)[0] == "stopped" and "did not end by itself" in survivor.info["reason"]
    assert Pid.of(pid) is None
    assert own.inn.vm("other").state == "running"
    own.inn.vm("other").delete(force=True)


def status(vm, *argv: str) -> int | None:
    """The exit status of a command in the guest; None while nobody answers."""
    with contextlib.suppress(ApiError):
        return vm.exec(argv).status
    return None


def agent_answers(vm) -> bool:
    return status(vm, "true") == 0


# --- the guest does something by itself ---


def test_a_guest_powers_itself_off(own, awake):
    sh(awake, "(sleep 2; poweroff) >/dev/null 2>&1 &")
    until(lambda: state(awake) == ("stopped", "the guest shut down"), 60)
    awake.start()
    until(lambda: agent_answers(awake), 60)
    sh(awake, "(sleep 2; poweroff) >/dev/null 2>&1 &")
    own.kill()
    time.sleep(5)
    own.start()
    until(lambda: state(awake) == ("stopped", "the guest shut down"), 60)


def test_a_guest_that_reboots_goes_on(own, awake):
    pid = awake.info["pid"]
    sh(awake, "touch /tmp/before; (sleep 2; reboot) >/dev/null 2>&1 &")
    until(lambda: status(awake, "test", "-e", "/tmp/before") == 1, 90)
    assert awake.state == "running" and awake.info["pid"] == pid


def test_a_guest_whose_kernel_panics_is_paused_and_can_be_looked_at(own, awake):
    sh(awake, "(sleep 2; echo c >/proc/sysrq-trigger) >/dev/null 2>&1 &")
    until(lambda: state(awake) == ("paused", "the guest's kernel panicked"))
    assert len(events(own, "vm.panicked", "booted")) == 1
    assert awake.screenshot().startswith(b"\x89PNG")
    assert b"sysrq" in b"".join(awake.logs()).lower()
    own.kill()
    own.start()
    assert state(awake) == ("paused", "the guest's kernel panicked")
    awake.stop(force=True)
    awake.start()
    until(lambda: agent_answers(awake), 60)


def test_a_console_that_is_flooded_stays_bounded(own, survivor):
    log = own.home.vm(survivor.info["id"]) / "serial.log"
    survivor.pause()
    with log.open("ab") as file:  # what an hour of flooding leaves
        file.write(b"flood\n" * (3 * KEPT // 6))
    survivor.resume()
    sh(survivor, "(for i in $(seq 2000); do echo flooding line $i; done >/dev/console) 2>/dev/null")
    until(lambda: log.stat().st_blocks * 512 <= 2 * KEPT, 60)
    until(lambda: b"flooding line 2000" in b"".join(survivor.logs(tail=3)))


# --- disks and stores that are full or broken ---


@pytest.fixture
def small_disk():
    """An ext4 file system of 300 MB, as a folder."""
    if os.geteuid() != 0:
        pytest.skip("mounting needs root")
    image = Path(tempfile.mkstemp(prefix="inn-test-", suffix=".img")[1])
    folder = Path(tempfile.mkdtemp(prefix="inn-test-"))
    image.write_bytes(b"")
    os.truncate(image, 300 << 20)
    subprocess.run(["mke2fs", "-q", "-t", "ext4", "-m", "0", "-F", image], check=True)
    if subprocess.run(["mount", "-o", "loop", image, folder], capture_output=True).returncode:
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=300m", "tmpfs", folder], check=True)
    folder.chmod(0o711)
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)
    folder.rmdir()
    image.unlink()


@pytest.mark.parametrize("what", ["the pool", "everything"])
@pytest.mark.timeout(600)
def test_a_full_disk_pauses_the_guest_until_there_is_room(small_disk, what):
    daemon = Daemon(small_disk / "home") if what == "everything" else Daemon(_folder(), pool=small_disk / "pool")
    try:
        _fill_up(daemon, small_disk)
    finally:
        daemon.clean()


def _fill_up(daemon: Daemon, disk: Path) -> None:
    daemon.add_image("tiny")
    daemon.start()
    vm = launch(daemon, "hungry")
    sh(
        vm,
        "mkfs.ext4 -q /dev/vda && mkdir -p /mnt && mount /dev/vda /mnt && dd if=/dev/urandom of=/tmp/8M bs=1M count=8",
    )
    ballast, room = disk / "ballast", os.statvfs(disk)
    ballast.write_bytes(os.urandom(room.f_bavail * room.f_frsize - (40 << 20)))
    write = "for i in 1 2 3 4 5 6 7 8; do cp /tmp/8M /mnt/$i; sync; done; touch /tmp/done"
    sh(vm, f"({write}) >/dev/null 2>&1 </dev/null &")
    until(lambda: state(vm) == ("paused", "the pool is full"), 240)
    assert any("full" in text for text in events(daemon, "vm.paused", "hungry"))
    with pytest.raises(ApiError) as refused:
        daemon.inn.launch(None, name="one-more", memory="32M", disk=["1M"] * 12)
    assert refused.value.code == "pool-full"
    pid = vm.info["pid"]
    daemon.kill()
    daemon.start()
    assert state(vm) == ("paused", "the pool is full") and vm.info["pid"] == pid
    daemon.stop()
    daemon.start()
    assert state(vm) == ("paused", "the pool is full") and vm.info["pid"] == pid
    assert [v["name"] for v in daemon.inn.vms()] == ["hungry"]
    ballast.unlink()
    until(lambda: vm.state == "running")
    until(lambda: events(daemon, "vm.room", "hungry"))
    until(lambda: status(vm, "test", "-e", "/tmp/done") == 0, 240)
    assert vm.state == "running" and vm.info["pid"] == pid
    sh(vm, "umount /mnt && e2fsck -fn /dev/vda && mount /dev/vda /mnt")
    sh(vm, "for i in 1 2 3 4 5 6 7 8; do cmp /tmp/8M /mnt/$i || exit 1; done")
    vm.stop(force=True)
    (disk,) = daemon.home.vm(vm.info["id"]).glob("disk0-*.qcow2")
    subprocess.run(["qemu-img", "check", "-q", disk], check=True)


def test_a_store_that_cannot_be_written_harms_no_guest(small_disk):
    pool = _folder()
    daemon = Daemon(small_disk / "home", pool=pool)
    try:
        daemon.add_image("tiny")
        daemon.start()
        vm = launch(daemon, "steady")
        sh(vm, f"({COUNT}) >/dev/null 2>&1 </dev/null &")
        filler = small_disk / "filler"
        with contextlib.suppress(OSError), filler.open("wb", buffering=0) as file:
            while True:
                file.write(bytes(1 << 20))
        daemon.home.store.with_name("store.db.ballast").unlink(missing_ok=True)
        with contextlib.suppress(OSError), filler.open("ab", buffering=0) as file:
            while True:
                file.write(bytes(4096))
        before = int(sh(vm, "cat /tmp/count"))
        with pytest.raises(ApiError, match="could not be written"):
            for _ in range(200):  # the store's write-ahead log has room for some more; then there is none
                vm.pause()
                vm.resume()
        assert daemon.inn.vms()[0]["state"] in ("running", "paused")
        daemon.kill()
        daemon.start()
        filler.unlink()
        until(lambda: not [o for o in daemon.inn.operations() if not o.ended])
        if vm.state == "paused":
            vm.resume()
        assert int(sh(vm, "cat /tmp/count")) > before
        vm.pause()
        vm.resume()
        assert vm.state == "running"
    finally:
        daemon.clean()
        subprocess.run(["rm", "-rf", pool], check=True)


# --- nothing stays behind ---


def _host(daemon: Daemon) -> dict[str, object]:
    """What the daemon could leave behind on the host."""
    files = set()
    for top in ("/run", "/var/lib/innkeeper", "/var/tmp", "/etc", "/dev/shm"):
        for folder, _, names in os.walk(top):
            files |= {f"{folder}/{name}" for name in names}
    sockets = {
        line.split()[-1]
        for line in Path("/proc/net/unix").read_text().splitlines()[1:]
        if str(daemon.home.data) in line
    }
    mine = set()
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            if entry.name.isdigit() and os.fsencode(daemon.home.data) in (entry / "environ").read_bytes():
                mine.add(entry.name)
    groups = asyncio.run(cgroup.list_ours(daemon.home))
    return {"files": files, "sockets": sockets, "processes": mine, "cgroups": groups}


def test_after_rm_and_daemon_stop_the_host_is_as_before(bare_daemon):
    bare_daemon.add_image("tiny")
    before = _host(bare_daemon)
    bare_daemon.start()
    vm = launch(bare_daemon, "passing")
    assert _host(bare_daemon)["processes"]
    vm.delete(force=True)
    bare_daemon.inn.image_delete("tiny").wait()
    bare_daemon.stop()
    after = _host(bare_daemon)
    # Others work on this host too: a file counts when it names Innkeeper or this test's folder.
    ours = {f for f in after["files"] - before["files"] if "innkeeper" in f or bare_daemon.home.data.name in f}
    assert not ours
    assert {k: v for k, v in after.items() if k != "files"} == {k: v for k, v in before.items() if k != "files"}
    home = bare_daemon.home
    assert not [*home.vms.iterdir(), *home.images.iterdir(), *home.work.iterdir()]
    assert not home.socket.exists()


# --- discs ---

REBOOT = bytes.fromhex("b0fee664")  # mov al, 0xfe; out 0x64, al: the keyboard controller resets the CPU
POWER_OFF = bytes.fromhex("ba0406b80020ef")  # mov dx, 0x604; mov ax, 0x2000; out dx, ax: ACPI S5 of q35


def disc(path: Path, then: bytes, ticks: int) -> Path:
    """A bootable disc that waits for some timer interrupts (18 in a second) and then does something."""
    wait = bytes.fromhex("fbb9") + ticks.to_bytes(2, "little") + bytes.fromhex("f4e2fd")  # sti; cx = ticks; hlt; loop
    code = wait + then + bytes.fromhex("ebfe")
    iso = pycdlib.PyCdlib()
    iso.new()
    iso.add_fp(io.BytesIO(code.ljust(2048, b"\0")), 2048, "/BOOT.;1")
    iso.add_eltorito("/BOOT.;1")
    iso.write(str(path))
    iso.close()
    return path


def boot_disc(inn: Innkeeper, name: str, iso: Path):
    spec = {"name": name, "image": None, "iso": str(iso), "memory": "64M", "disks": [{"size": "1M"}], "nics": []}
    inn.create(spec, ready=False).wait()
    return inn.vm(name)


@pytest.mark.parametrize("daemon_dead", [False, True])
def test_a_disc_is_ejected_when_the_guest_restarts_out_of_it(own, tmp_path, daemon_dead):
    name = "dead" if daemon_dead else "alive"
    vm = boot_disc(own.inn, name, disc(tmp_path / "reboot.iso", REBOOT, 60))
    vm_id = vm.info["id"]
    assert document(own, vm_id)["disc"]
    if daemon_dead:
        own.kill()
        time.sleep(6)
        own.start()
    until(lambda: not document(own, vm_id)["disc"], 60)
    until(lambda: events(own, "vm.ejected", name))
    until(lambda: vm.state == "running")
    time.sleep(1)
    assert vm.state == "running"  # on its empty disk, where the firmware finds nothing and stays
    vm.restart(force=True)
    command = Path(f"/proc/{vm.info['pid']}/cmdline").read_text()
    assert not re.search(r"ide-cd|add-fd", command)
    vm.delete(force=True)


def test_a_guest_that_powers_off_while_no_daemon_looks_keeps_its_disc_and_stays_off(own, tmp_path):
    vm = boot_disc(own.inn, "off", disc(tmp_path / "off.iso", POWER_OFF, 60))
    own.kill()
    time.sleep(6)
    own.start()
    until(lambda: state(vm) == ("stopped", "the guest shut down"))
    assert document(own, vm.info["id"])["disc"] and not events(own, "vm.ejected", "off")
    vm.delete()
