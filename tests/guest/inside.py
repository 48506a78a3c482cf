"""What the tests of snapshots and clones do in a guest, and with its disk."""

import asyncio
import subprocess
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

from innkeeper.operations.chains import chain
from innkeeper.storage.measure import _node


def sh(vm, script: str, **more) -> str:
    """A shell script in the guest, which must end well."""
    result = vm.exec(["sh", "-ec", script], **more)
    assert result.status == 0, result
    return result.stdout.decode()


def begin(vm, program: str) -> None:
    """In the background of the guest."""
    vm.exec(["sh", "-c", f"({program}) >/dev/null 2>&1 </dev/null &"])


def ready(vm) -> None:
    """Wait until its agent answers."""
    deadline = time.monotonic() + 300
    while not vm.info["ready"]:
        assert time.monotonic() < deadline
        time.sleep(0.2)


def mounted(vm) -> None:
    """After a start: check the file system as it was left, and mount it."""
    ready(vm)
    sh(vm, "fsck.ext4 -p /dev/vda >&2 || [ $? = 1 ]; e2fsck -fn /dev/vda >&2; mkdir -p /data; mount /dev/vda /data")


def on_disk(daemon, vm, *requests: str) -> list[str]:
    """What debugfs says of the file system on the first disk of a VM that does not run, once its journal is played
    back in a copy: a guest need not boot to see it."""
    documents = daemon.documents()

    async def find(kind: str, name: str) -> dict:
        return documents[f"{kind}/{name}"]

    world, vm_id = SimpleNamespace(home=daemon.home, find=find), vm.info["id"]
    layers = asyncio.run(chain(world, vm_id, documents[f"vm/{vm_id}"]["disks"][0], absolute=True))
    with tempfile.TemporaryDirectory() as folder:
        raw = Path(folder) / "raw"
        subprocess.run(["qemu-img", "convert", "-O", "raw", _node(layers), raw], check=True)
        assert subprocess.run(["fsck.ext4", "-p", raw], stdout=subprocess.DEVNULL).returncode <= 1
        subprocess.run(["e2fsck", "-fn", raw], check=True, capture_output=True)
        answers = (
            subprocess.run(["debugfs", "-R", request, raw], check=True, capture_output=True) for request in requests
        )
        return [answer.stdout.decode() for answer in answers]


def crashed(vm) -> None:
    """Wait until the daemon has seen that its QEMU is gone."""
    deadline = time.monotonic() + 60
    while vm.state != "crashed":
        assert time.monotonic() < deadline
        time.sleep(0.05)


def over(daemon) -> None:
    """No operation is open any more."""
    for operation in daemon.inn.operations():
        operation.wait_quietly()


def layers(daemon, vm) -> int:
    """Of its first disk, in its own folder."""
    return len(list(daemon.home.vm(vm.info["id"]).glob("disk0-*.qcow2")))
