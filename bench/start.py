"""Starting a VM: what Innkeeper adds to a bare QEMU of the same command, and what libvirt adds.

    .venv/bin/python bench/start.py [RUNS]

Ours: from the API call to «running». Bare: the same argv spawned by hand, QMP negotiated, `cont`, RESUME seen. Each
round measures both (and `virsh start` of a comparable domain, where libvirt runs), in turn.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from common import median, running_daemon, timed

RUNS = int(sys.argv[1]) if len(sys.argv) > 1 else 15

DOMAIN = """<domain type='{type}'><name>innkeeper-bench</name><memory unit='MiB'>256</memory><vcpu>2</vcpu>
<os><type arch='x86_64' machine='pc-q35-7.2'>hvm</type></os>
<cpu mode='custom' match='exact'><model>Westmere</model></cpu>
<devices><emulator>/usr/bin/qemu-system-x86_64</emulator>
<disk type='file' device='disk'><driver name='qemu' type='qcow2' discard='unmap'/><source file='{disk}'/>
<target dev='vda' bus='virtio'/></disk>
<interface type='user'><model type='virtio'/></interface><serial type='pty'/><memballoon model='virtio'/>
<channel type='unix'><target type='virtio' name='org.qemu.guest_agent.0'/></channel>
<rng model='virtio'><backend model='random'>/dev/urandom</backend></rng><video><model type='vga'/></video>
</devices></domain>"""


def bare(argv: list[str], folder: Path) -> float:
    """Seconds from spawn to RESUME of the same command, run by hand."""
    sock = folder / "qmp.sock"
    sock.unlink(missing_ok=True)
    begun = time.perf_counter()
    process = subprocess.Popen(
        argv, cwd=folder, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        connection = socket.socket(socket.AF_UNIX)
        while True:
            try:
                connection.connect(str(sock))
                break
            except OSError:
                time.sleep(0.001)
        lines = connection.makefile("rw")
        lines.readline()
        for command in ("qmp_capabilities", "cont"):
            lines.write(json.dumps({"execute": command}) + "\n")
            lines.flush()
        while '"RESUME"' not in lines.readline():
            pass
        return time.perf_counter() - begun
    finally:
        process.kill()
        process.wait()


def main() -> None:
    with running_daemon() as daemon, tempfile.TemporaryDirectory(dir=daemon.home.data) as scratch:
        inn = daemon.inn
        host = inn.host()
        name = inn.launch(None, name="bench", memory="256M", disk="1G", iso=None).name
        vm = inn.vm(name)
        folder = daemon.home.vm(vm.info["id"])
        argv = Path(f"/proc/{vm.info['pid']}/cmdline").read_bytes().decode().split("\0")[:-1]
        virsh = shutil.which("virsh") and _virsh_ready(Path(scratch), host["accelerator"]["name"])
        ours, peers, libvirt = [], [], []
        for _ in range(RUNS):
            vm.stop(force=True)
            peers.append(bare(argv, folder))
            for stale in ("qmp.sock", "agent.sock", "serial.sock"):
                (folder / stale).unlink(missing_ok=True)
            for file in folder.iterdir():  # the bare one ran as root
                os.chown(file, folder.stat().st_uid, folder.stat().st_gid)
            ours.append(timed(vm.start))
            if virsh:
                libvirt.append(timed(lambda: _virsh("start", "innkeeper-bench")))
                _virsh("destroy", "innkeeper-bench")
        if virsh:
            _virsh("undefine", "innkeeper-bench")
        added = median(ours) - median(peers)
        print(f"accelerator: {host['accelerator']['name']}, QEMU {host['qemu']['version']}, {RUNS} runs, medians")
        print(f"bare QEMU:  {median(peers) * 1000:6.0f} ms")
        print(f"innkeeper:  {median(ours) * 1000:6.0f} ms, adds {added * 1000:.0f} ms (wanted: at most 100)")
        if virsh:
            theirs = median(libvirt) - median(peers)
            print(
                f"virsh start:{median(libvirt) * 1000:6.0f} ms, adds {theirs * 1000:.0f} ms;"
                f" ours/theirs {added / theirs:.2f} (wanted: at most 0.5)"
            )
        else:
            print("virsh start: not measured, no libvirt runs here")


def _virsh(*words: str) -> None:
    subprocess.run(["virsh", "-q", "-c", "qemu:///system", *words], check=True, stdout=subprocess.DEVNULL)


def _virsh_ready(scratch: Path, accelerator: str) -> bool:
    disk = scratch / "disk.qcow2"
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", disk, "1G"], check=True)
    disk.chmod(0o666)
    scratch.chmod(0o755)
    xml = scratch / "domain.xml"
    xml.write_text(DOMAIN.format(type="kvm" if accelerator == "kvm" else "qemu", disk=disk))
    try:
        _virsh("define", str(xml))
    except subprocess.CalledProcessError:
        return False
    return True


if __name__ == "__main__":
    main()
