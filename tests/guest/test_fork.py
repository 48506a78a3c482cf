"""Forks of a warm guest: they go on where it was, share nothing that they write, and are machines of their own."""

import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import running_daemon

from innkeeper.client.errors import ApiError
from innkeeper.client.wishes import vm_spec

pytestmark = pytest.mark.guest


@pytest.fixture(scope="module")
def warm():
    """A daemon with a warm tiny, whose guest had made a file in its memory before it was captured."""
    with running_daemon("tiny") as daemon:
        spec = vm_spec("warming", "tiny", memory="256M", disk="1G", cpus=1)
        daemon.inn.warm("tiny", spec, until="echo before >/tmp/warmed").wait()
        yield daemon


def sh(vm, script: str) -> str:
    result = vm.exec(["sh", "-c", script])
    assert result.status == 0, result
    return result.stdout.decode().strip()


def huge_pages(pid: int) -> str:
    (said,) = [line for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith("THP_enabled")]
    return said.split()[1]


IDENTITY = {
    "hostname": "cat /proc/sys/kernel/hostname",
    "mac": "cat /sys/class/net/eth0/address",
    "uuid": "cat /sys/class/dmi/id/product_uuid",
    "random": "head -c 16 /dev/urandom | od -An -tx1",
    "kernel's random": "cat /proc/sys/kernel/random/uuid",
}


def identity(vm) -> dict[str, str]:
    """All of them, in one question."""
    return dict(zip(IDENTITY, sh(vm, "; ".join(IDENTITY.values())).splitlines(), strict=True))


def test_forks_go_on_and_are_machines_of_their_own(warm):
    names = [f"one-of-{number}" for number in range(4)]
    for operation in warm.inn.forks("tiny", names):
        operation.wait()
    forks = [warm.inn.vm(name) for name in names]
    try:
        assert [sh(vm, "cat /tmp/warmed") for vm in forks] == ["before"] * 4
        assert warm.inn.image("tiny-warm")["warm"]["waits"]
        told = [identity(vm) for vm in forks]
        for what in IDENTITY:
            assert len({each[what] for each in told}) == 4, what
        assert [each["hostname"] for each in told] == names
        for vm, each in zip(forks, told, strict=True):
            machine = vm.info["machine"]
            assert [each["mac"]] == machine["macs"] and each["uuid"] == machine["uuid"]
            assert abs(int(sh(vm, "date +%s")) - time.time()) < 30
        used = [vm.info["memory_used"] for vm in forks]
        listed = {vm["name"]: vm["memory_used"] for vm in warm.inn.vms(memory_used=True)}
        assert all(listed[name]["private"] > 1 << 20 for name in names), listed
        assert all(each["private"] + each["shared"] < 200 << 20 and each["shared"] > 1 << 20 for each in used), used
        # Huge pages would cost each of them some MiB; the daemon, from which they have that, is as before.
        pids = [vm.info["pid"] for vm in forks]
        assert {huge_pages(pid) for pid in pids} == {"0"} and huge_pages(warm.inn.version()["pid"]) == "1"
        for key in ("uuid", "macs"):
            assert len({str(vm.info["machine"][key]) for vm in forks}) == 4
        assert len({vm.info["ssh_port"] for vm in forks}) == 4

        sh(forks[0], "mke2fs -q /dev/vda && echo mine >/tmp/warmed && dd if=/dev/zero of=/tmp/100M bs=1M count=60")
        assert [sh(vm, "cat /tmp/warmed; head -c 4096 /dev/vda | tr -d '\\0' | wc -c") for vm in forks[1:]] == [
            "before\n0"
        ] * 3
    finally:
        for vm in forks:
            vm.delete(force=True)


def test_forks_outlive_the_daemon_and_boot_after_a_stop(warm):
    with warm.inn.fork("tiny-warm", name="stays") as vm:
        pid = vm.info["pid"]
        warm.kill()
        warm.start()
        assert vm.info["pid"] == pid and sh(vm, "cat /tmp/warmed; hostname") == "before\nstays"
        sh(vm, "mke2fs -q /dev/vda && mkdir -p /mnt && mount /dev/vda /mnt && echo kept >/mnt/file && umount /mnt")
        vm.restart()
        deadline = time.monotonic() + 60
        while not vm.info["agent"]:
            assert time.monotonic() < deadline
            time.sleep(0.2)
        assert sh(vm, "test ! -e /tmp/warmed; mkdir -p /mnt && mount /dev/vda /mnt && cat /mnt/file") == "kept"
        with warm.inn.fork("tiny-warm") as other:  # the daemon that came back copies the memory again
            assert sh(other, "cat /tmp/warmed") == "before"


def test_a_guest_in_which_nothing_waits_is_told_by_its_agent(warm):
    spec = vm_spec("warming", "tiny", memory="256M", cpus=1)
    warm.inn.warm("tiny", spec, name="no-perl", until="rm -f /usr/bin/perl /bin/perl").wait()
    assert not warm.inn.image("no-perl")["warm"]["waits"]
    with warm.inn.fork("no-perl", name="one") as one, warm.inn.fork("no-perl", name="two") as two:
        ours, theirs = identity(one), identity(two)
        for what in IDENTITY:
            assert ours[what] != theirs[what], what
        assert theirs["mac"] == two.info["machine"]["macs"][0]
    warm.inn.image_delete("no-perl").wait()


def inn(daemon, *words: str) -> subprocess.CompletedProcess[str]:
    program = [sys.executable, "-c", "import sys; from innkeeper.cli.main import main; sys.exit(main())", *words]
    environment = {"INNKEEPER_HOME": str(daemon.home.data), "PATH": "/usr/bin:/bin", "HOME": str(daemon.home.data)}
    return subprocess.run(program, env=environment, capture_output=True, text=True, timeout=300)


def test_a_command_in_a_fork_that_is_thrown_away(warm):
    done = inn(warm, "fork", "tiny", "--rm", "--", "sh", "-c", "echo $((6*7)); exit 7")
    assert (done.stdout, done.returncode) == ("42\n", 7)
    assert not warm.inn.vms() and not warm.qemus()
    assert not [path.name for path in warm.home.vms.iterdir()]


def test_the_example_of_the_docs_runs(warm):
    page = (Path(__file__).parents[2] / "docs" / "forks.md").read_text()
    (example,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    environment = {"INNKEEPER_HOME": str(warm.home.data), "PATH": "/usr/bin:/bin"}
    done = subprocess.run([sys.executable, "-c", example], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and done.stdout.startswith("fork-"), done
    assert not warm.inn.vms() and not warm.qemus()


def test_a_pool_keeps_some_ahead(warm):
    with warm.inn.pool("tiny-warm", ready=2) as pool, pool.take() as vm:
        assert sh(vm, "cat /tmp/warmed") == "before"
    assert not warm.inn.vms()


def test_a_fork_whose_time_is_over_is_deleted(warm):
    warm.inn.fork("tiny-warm", name="mayfly", ttl=1)
    deadline = time.monotonic() + 30
    while warm.inn.vms():
        assert time.monotonic() < deadline
        time.sleep(0.2)
    assert "vm.expired" in [event["kind"] for event in warm.inn.events()]


def test_what_a_warm_image_is_not_for(warm):
    with pytest.raises(ApiError, match="it is forked, not launched"):
        warm.inn.launch("tiny-warm", name="nobody")
    with pytest.raises(ApiError, match="is the base of tiny-warm"):
        warm.inn.image_delete("tiny").wait()
    with pytest.raises(ApiError, match="is warm itself"):
        warm.inn.warm("tiny-warm", vm_spec("x", "tiny-warm"))
    with pytest.raises(ApiError, match="there is an image named 'tiny-warm' already"):
        warm.inn.warm("tiny", vm_spec("x", "tiny"))
    with pytest.raises(ApiError, match="named twice"):
        warm.inn.forks("tiny", ["a", "a"])


def test_no_fork_of_an_image_that_is_not_warm(warm, tmp_path):
    disk = tmp_path / "disk.raw"
    disk.write_bytes(bytes(1 << 20))
    warm.inn.image_import(disk, name="cold", format="raw").wait()
    with pytest.raises(ApiError, match="cold is not warm") as refused:
        warm.inn.forks("cold", ["nobody"])
    assert "inn template warm cold" in refused.value.hint
    warm.inn.image_delete("cold").wait()


@pytest.mark.parametrize("role", ["ram", "devices", "disk"])
def test_a_warm_image_that_was_edited_by_hand_is_not_forked(warm, role):
    image = warm.inn.image("tiny-warm")
    path = warm.home.image(image["id"]) / image["files"][role]
    before, data = path.stat(), path.read_bytes()
    with path.open("r+b") as file:
        file.seek(len(data) // 2)
        file.write(bytes([data[len(data) // 2] ^ 1]))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))  # whoever did it tries to hide it
    with pytest.raises(ApiError, match=f"{path.name} of image tiny-warm has been changed") as refused:
        warm.inn.fork("tiny-warm")
    assert refused.value.code == "image-changed" and refused.value.facts["files"] == [path.name]
    with pytest.raises(ApiError, match="tiny-warm"):
        warm.inn.image_verify("tiny-warm").wait()
    assert not warm.inn.vms()
    path.write_bytes(data)
    warm.inn.image_verify("tiny-warm").wait()
    with warm.inn.fork("tiny-warm") as vm:
        assert sh(vm, "cat /tmp/warmed") == "before"


def test_nothing_of_the_captured_memory_is_readable_by_others(warm):
    (image,) = [image for image in warm.inn.images() if image["name"] == "tiny-warm"]
    folder: Path = warm.home.image(image["id"])
    assert folder.stat().st_mode & 0o077 == 0
    assert all(path.stat().st_mode & 0o077 == 0 for path in folder.iterdir())
