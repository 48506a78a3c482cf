"""Golden images, built from their recipes and booted by a bare QEMU: what is in them, and that they start, answer,
power off and restart. `debian-12` here stands for debian-13 too: they differ in the suite only (see test_recipe)."""

from __future__ import annotations

import asyncio
import base64
import io
import itertools
import json
import select
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pycdlib
import pytest
from conftest import built_image

from innkeeper.base.errors import ToolFailed
from innkeeper.spec.recipe import load_recipe
from innkeeper.storage.build import build

pytestmark = [pytest.mark.guest, pytest.mark.timeout(900)]
OVMF = Path("/usr/share/OVMF")


class Guest:
    """A running QEMU, its guest agent and its monitor."""

    def __init__(self, process: subprocess.Popen[bytes], folder: Path) -> None:
        self.process, self.folder = process, folder
        self._sockets: dict[str, Any] = {}

    def ask(self, name: str, execute: str, **arguments: Any) -> Any:
        """One request on the socket `agent` or `qmp`; its answer, events skipped."""
        stream = self._stream(name)
        stream.write(json.dumps({"execute": execute, "arguments": arguments}).encode() + b"\n")
        stream.flush()
        while True:
            answer = json.loads(stream.readline())
            if "event" not in answer:
                assert "return" in answer, answer
                return answer["return"]

    def send(self, execute: str, **arguments: Any) -> None:
        """A request to the agent that has no answer."""
        self._stream("agent").write(json.dumps({"execute": execute, "arguments": arguments}).encode() + b"\n")
        self._stream("agent").flush()

    def wait_for(self, event: str, **data: Any) -> None:
        """Until QEMU tells of it."""
        while True:
            said = json.loads(self._stream("qmp").readline())
            if said.get("event") == event and said["data"] == data:
                return

    def run(self, script: str) -> str:
        """The output of a shell script in the guest, which must succeed."""
        started = self.ask("agent", "guest-exec", path="/bin/sh", arg=["-ec", script], **{"capture-output": True})
        while not (status := self.ask("agent", "guest-exec-status", pid=started["pid"]))["exited"]:
            time.sleep(0.2)
        out, err = (base64.b64decode(status.get(key, "")).decode() for key in ("out-data", "err-data"))
        assert status.get("exitcode") == 0, f"{script}: {status}\n{out}{err}"
        return out

    def until(self, script: str) -> None:
        self.run(f"for i in $(seq 600); do if {script}; then exit 0; fi; sleep 1; done; exit 1")

    @property
    def console(self) -> str:
        return (self.folder / "serial.log").read_text(errors="replace")

    def _stream(self, name: str) -> Any:
        if name not in self._sockets:
            end = socket.socket(socket.AF_UNIX)
            end.settimeout(600)
            deadline = time.monotonic() + 10
            while end.connect_ex(str(self.folder / f"{name}.sock")):  # it has its name a moment before it listens
                assert time.monotonic() < deadline, f"{name}.sock does not answer"
                time.sleep(0.01)
            self._sockets[name] = end.makefile("rwb")
            if name == "qmp":
                self._sockets[name].readline()
                self.ask("qmp", "qmp_capabilities")
            else:
                self._sync(end)
        return self._sockets[name]

    def _sync(self, end: socket.socket) -> None:
        """Past whatever was said before. Asked again every few seconds: an agent that is just dying takes the question
        with it."""
        stream, ids = self._sockets["agent"], itertools.count(time.monotonic_ns() % 1_000_000_000)
        answered = False
        while not answered:
            self.send("guest-sync", id=next(ids))
            answered = bool(select.select([end], [], [], 3)[0])
        last = next(ids)
        self.send("guest-sync", id=last)
        while json.loads(stream.readline()).get("return") != last:
            pass

    def hang_up(self) -> None:
        """Forget the agent's connection, as its end in the guest is gone."""
        self._sockets.pop("agent").close()

    def close(self) -> None:
        while self._sockets:
            self._sockets.popitem()[1].close()


@contextmanager
def booted(folder: Path, *options: str, memory: int = 512) -> Iterator[Guest]:
    command = [
        *("qemu-system-x86_64", "-machine", "q35", "-accel", "tcg", "-cpu", "max", "-m", str(memory)),
        *("-nodefaults", "-no-user-config", "-display", "none", "-serial", f"file:{folder}/serial.log"),
        *("-qmp", f"unix:{folder}/qmp.sock,server=on,wait=off", "-device", "virtio-rng-pci"),
        *("-chardev", f"socket,id=agent,path={folder}/agent.sock,server=on,wait=off"),
        *("-device", "virtio-serial-pci"),
        *("-device", "virtserialport,id=agent0,chardev=agent,name=org.qemu.guest_agent.0"),
        *("-netdev", "user,id=net", "-device", "virtio-net-pci,netdev=net,mac=52:54:00:00:00:01"),
        *options,
    ]
    (folder / "qmp.sock").unlink(missing_ok=True)
    process = subprocess.Popen(command)
    guest = Guest(process, folder)
    try:
        while not (folder / "qmp.sock").exists():
            assert process.poll() is None, "QEMU ended at once"
            time.sleep(0.05)
        yield guest
    finally:
        guest.close()
        process.kill()
        process.wait()


def seed_disc(path: Path, files: Mapping[str, str]) -> str:
    iso = pycdlib.PyCdlib()
    iso.new(vol_ident="cidata", joliet=3, rock_ridge="1.09")
    for number, (name, text) in enumerate(files.items()):
        data = text.encode()
        iso.add_fp(io.BytesIO(data), len(data), f"/FILE{number}.;1", rr_name=name, joliet_path=f"/{name}")
    iso.write(str(path))
    iso.close()
    return f"file={path},format=raw,if=virtio,readonly=on"


def tiny_options() -> list[str]:
    folder, image = built_image("tiny")
    return [
        *("-kernel", str(folder / image["files"]["kernel"])),
        *("-initrd", str(folder / image["files"]["initrd"])),
        *("-append", image["cmdline"]),
    ]


def test_building_reports_progress_and_leaves_only_the_image(tmp_path: Path) -> None:
    reports: list[tuple[float | None, str]] = []
    (tmp_path / "half-made").mkdir()
    (tmp_path / "half-made/rest").touch()
    built = asyncio.run(build(load_recipe("tiny"), tmp_path, job="t", report=lambda *report: reports.append(report)))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["initrd", "kernel"]
    assert built.boot == "kernel" and built.files == {"kernel": "kernel", "initrd": "initrd"}
    assert built.cmdline and "console=ttyS0" in built.cmdline and built.virtual_size == 0
    assert {"busybox-static", "qemu-guest-agent"} <= set(built.inputs["packages"])
    known = [fraction for fraction, _ in reports if fraction is not None]
    assert known == sorted(known) and known[-1] == 1.0 and len(set(known)) > 20


def test_a_cancelled_build_leaves_nothing(tmp_path: Path) -> None:
    async def scenario() -> None:
        begun = asyncio.Event()
        task = asyncio.create_task(build(load_recipe("tiny"), tmp_path, job="cancel-me", report=lambda *_: begun.set()))
        await begun.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(scenario())
    assert list(tmp_path.iterdir()) == []
    assert str(tmp_path) not in Path("/proc/mounts").read_text()
    for environ in Path("/proc").glob("[0-9]*/environ"):
        try:
            assert b"INNKEEPER_JOB=cancel-me\0" not in environ.read_bytes()
        except OSError:
            continue


def test_a_package_that_does_not_exist_fails_the_build_and_leaves_nothing(tmp_path: Path) -> None:
    recipe = load_recipe("tiny").model_copy(update={"packages": ["no-such-package-anywhere"]})
    with pytest.raises(ToolFailed, match="no-such-package-anywhere"):
        asyncio.run(build(recipe, tmp_path, job="t", report=lambda *_: None))
    assert list(tmp_path.iterdir()) == []


def test_tiny_answers_takes_its_name_from_the_seed_and_powers_off_by_its_button(tmp_path: Path) -> None:
    disk = tmp_path / "blank.img"
    with disk.open("wb") as file:
        file.truncate(64 << 20)
    seed = seed_disc(
        tmp_path / "seed.iso",
        {
            "meta-data": "instance-id: i\nlocal-hostname: tiny7\n",
            "user-data": "#!/bin/sh\necho from user-data\n",
        },
    )
    drives = ["-drive", f"file={disk},format=raw,if=virtio", "-drive", seed]
    with booted(tmp_path, *tiny_options(), *drives, memory=256) as guest:
        assert guest.run("hostname; uname -s").split() == ["tiny7", "Linux"]
        assert guest.ask("agent", "guest-get-host-name")["host-name"] == "tiny7"
        guest.until("ip addr show dev eth0 | grep -q 'inet 10.0.2.15/24'")
        guest.until("grep -q 'from user-data' /run/user-data.log")
        assert not any(disk.read_bytes()), "the disk is the user's"
        guest.run("mkfs.ext4 -q /dev/vda; mount /dev/vda /mnt; echo kept > /mnt/file; sync; umount /mnt")
        guest.run("e2fsck -fn /dev/vda; mount /dev/vda /mnt; grep kept /mnt/file")
        guest.run("for tool in dd nc wget httpd sha256sum tar base64 vi; do which $tool; done")
        agent = guest.run("pidof qemu-ga").strip()
        guest.ask("qmp", "query-status")  # from here on it tells of what happens
        guest.send("guest-exec", path="/bin/kill", arg=["-9", agent])
        guest.wait_for("VSERPORT_CHANGE", id="agent0", open=False)  # what is asked of a dying agent has no answer
        guest.hang_up()
        assert guest.run("pidof qemu-ga").strip() != agent
        guest.ask("qmp", "system_powerdown")
        assert guest.process.wait(timeout=120) == 0
    assert "tiny7:~#" in guest.console or "tiny:~#" in guest.console


def test_tiny_restarts_and_powers_off_through_its_agent(tmp_path: Path) -> None:
    with booted(tmp_path, *tiny_options(), "-device", "virtio-scsi-pci", memory=256) as guest:
        guest.run("touch /run/before")
        guest.send("guest-shutdown", mode="reboot")
        guest.hang_up()
        deadline = time.monotonic() + 300
        while guest.console.count("built-in shell") < 2:
            assert time.monotonic() < deadline, guest.console
            time.sleep(0.5)
        guest.run("test ! -e /run/before")
        guest.send("guest-shutdown")
        assert guest.process.wait(timeout=120) == 0


def debian_seed(path: Path) -> str:
    network = {
        "version": 2,
        "ethernets": {"nic0": {"match": {"macaddress": "52:54:00:00:00:01"}, "dhcp4": True}},
    }
    return seed_disc(
        path,
        {
            "meta-data": "instance-id: first\nlocal-hostname: d1\n",
            "user-data": "#cloud-config\nruncmd: [[touch, /root/run-by-cloud-init]]\n",
            "network-config": json.dumps(network),
        },
    )


def overlay(path: Path, base: Path, size: str) -> str:
    subprocess.run(
        ["qemu-img", "create", "-q", "-f", "qcow2", "-F", "qcow2", "-b", str(base), str(path), size], check=True
    )
    return f"file={path},format=qcow2,if=virtio"


def firmware_options(firmware: str, folder: Path) -> list[str]:
    if firmware == "bios":
        return []
    if not (OVMF / "OVMF_CODE_4M.fd").exists():
        pytest.skip("OVMF is not installed")
    if not (folder / "vars.fd").exists():
        shutil.copy(OVMF / "OVMF_VARS_4M.fd", folder / "vars.fd")
    return [
        *("-drive", f"if=pflash,format=raw,readonly=on,file={OVMF}/OVMF_CODE_4M.fd"),
        *("-drive", f"if=pflash,format=raw,file={folder}/vars.fd"),
    ]


@pytest.mark.slow
@pytest.mark.timeout(2400)
@pytest.mark.parametrize("firmware", ["bios", "uefi"])
def test_debian_boots_grows_and_runs_a_new_kernels_grub_cfg(tmp_path: Path, firmware: str) -> None:
    folder, image = built_image("debian-12")
    base = folder / image["files"]["disk"]
    drive = overlay(tmp_path / "disk.qcow2", base, "8G")
    options = ["-drive", drive, "-drive", debian_seed(tmp_path / "seed.iso")]
    with booted(tmp_path, *options, *firmware_options(firmware, tmp_path), memory=1024) as guest:
        # What no two guests may share is not in the image: it came into being, or did not, by this boot.
        made = guest.run("stat -c %W /etc/ssh/moduli; cat /etc/machine-id; passwd -S root; ls /boot/grub").split()
        assert len(made[1]) == 32 and "L" in made
        guest.until("test -e /run/cloud-init/result.json")
        assert json.loads(guest.run("cat /run/cloud-init/result.json"))["v1"]["errors"] == []
        assert guest.run("hostname").strip() == "d1"
        guest.run("test -e /root/run-by-cloud-init")
        assert int(guest.run("df --output=size -B1 / | tail -n 1")) > 7 << 30
        assert ("efi" in guest.run("ls /sys/firmware")) == (firmware == "uefi")
        guest.run("sudo -u debian sudo -n true; test ! -e /var/lib/dbus/machine-id -o -L /var/lib/dbus/machine-id")
        guest.run("resolvectl status | grep -q 10.0.2.3; systemctl is-active ssh qemu-guest-agent")
        # A kernel upgrade ends with update-grub: what it writes must be what the next start uses.
        guest.run("sed -i 's/quiet/quiet innkeeper.test=1/' /etc/default/grub.d/50-innkeeper.cfg")
        guest.run("run-parts --arg=$(uname -r) /etc/kernel/postinst.d; sync")
        guest.send("guest-shutdown")
        assert guest.process.wait(timeout=600) == 0
    # Not a reset: QEMU 7.2 without KVM takes minutes for OVMF to unpack itself over code it has translated.
    with booted(tmp_path, *options, *firmware_options(firmware, tmp_path), memory=1024) as guest:
        assert "innkeeper.test=1" in guest.run("cat /proc/cmdline")
        assert guest.run("hostname").strip() == "d1"


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_debian_image_holds_nothing_that_guests_may_not_share(tmp_path: Path) -> None:
    folder, image = built_image("debian-12")
    raw = tmp_path / "disk.raw"
    subprocess.run(["qemu-img", "convert", "-O", "raw", str(folder / image["files"]["disk"]), str(raw)], check=True)
    table = json.loads(subprocess.run(["sfdisk", "-J", str(raw)], capture_output=True, check=True).stdout)
    partitions = {part["name"]: part for part in table["partitiontable"]["partitions"]}
    assert set(partitions) == {"root", "bios", "esp"}
    assert partitions["root"]["start"] == max(part["start"] for part in partitions.values())
    target = f"{raw}?offset={partitions['root']['start'] * 512}"

    def debugfs(request: str) -> str:
        done = subprocess.run(["debugfs", "-R", request, target], capture_output=True, text=True, check=True)
        return done.stdout

    assert subprocess.run(["e2fsck", "-fn", target], capture_output=True).returncode == 0
    assert "ssh_host" not in debugfs("ls /etc/ssh") and "moduli" in debugfs("ls /etc/ssh")
    assert "Size: 0" in debugfs("stat /etc/machine-id")
    assert "random-seed" not in debugfs("ls /var/lib/systemd")
    assert "instances" not in debugfs("ls /var/lib/cloud")
    assert "InRelease" not in debugfs("ls /var/lib/apt/lists")
    assert "dpkg.log" not in debugfs("ls /var/log")
    assert debugfs("cat /proc/mounts") == ""
    root = next(line for line in debugfs("cat /etc/shadow").splitlines() if line.startswith("root:"))
    assert root.split(":")[1] in ("*", "!", "!*")
    assert "User:     0" in debugfs("stat /usr/bin/sudo") and "04755" in debugfs("stat /usr/bin/sudo")
    host = socket.gethostname()
    assert host not in debugfs("cat /etc/hostname") and host not in debugfs("cat /etc/hosts")
