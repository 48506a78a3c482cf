"""A snapshot with memory of a guest of 1 GiB that is busy writing memory: for how long it stands still, and libvirt's
`virsh snapshot-create-as --live --memspec` of the same guest. In turn, in one run, as root.

    .venv/bin/python bench/snapshot_memory.py [RUNS]

A guest's own clock stands still with it, so the host watches: the guest prints without a pause to its serial console,
and what counts is the longest time in which its log does not grow, from just before the snapshot until just after it.
Of ours that is the time without output around the moment at which QEMU says that the guest stood still. The rest of the
snapshot is made beside a guest that runs: the longest gap in all of it is told on a line of its own, with that of the
same guest for as long, left alone, and beside a program of the lowest priority that only computes. Beside it, what no
snapshot can go below: QMP's `stop` and `cont` with nothing in between; and QEMU's own background-snapshot, which
Innkeeper does not use (qemu/guest_memory.py).
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from common import Talk, median, running_daemon, say

RUNS = next((int(word) for word in sys.argv[1:] if word.isdigit()), 10)
BUSY = "while :; do dd if=/dev/zero of=/run/busy bs=1M count=400 conv=notrunc 2>/dev/null; done"
TICK = "exec >/dev/ttyS0; while :; do echo .; done"
COMPUTE = """
import os, time
os.setsid()
open("/proc/self/autogroup", "w").write("19")
os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
end = time.monotonic() + {seconds}
while time.monotonic() < end:
    pass
"""
"""What any program does to a guest that wants all of the CPUs, however modest."""
NAME = "innkeeper-bench"
USERFAULTFD = Path("/proc/sys/vm/unprivileged_userfaultfd")
DOMAIN = """<domain type='{kind}'><name>{name}</name><memory unit='MiB'>1024</memory><vcpu>2</vcpu>
<os><type arch='x86_64' machine='{machine}'>hvm</type><kernel>{kernel}</kernel><initrd>{initrd}</initrd>
<cmdline>{cmdline}</cmdline></os><features><acpi/><apic/></features>{cpu}
<devices><emulator>/usr/bin/qemu-system-x86_64</emulator>
<disk type='file' device='disk'><driver name='qemu' type='qcow2'/><source file='{disk}'/>
<target dev='vda' bus='virtio'/></disk><serial type='file'><source path='{log}'/></serial><memballoon model='virtio'/>
<channel type='unix'><target type='virtio' name='org.qemu.guest_agent.0'/></channel></devices></domain>"""


class Watch:
    """The times in which a file does not change, as (Unix time of the beginning, seconds)."""

    def __init__(self, log: Path) -> None:
        self._log, self._over = log, threading.Event()
        self._gaps: list[tuple[float, float]] = []
        self._thread = threading.Thread(target=self._look)

    @property
    def longest(self) -> float:
        return max(seconds for _, seconds in self._gaps)

    def around(self, begin: float, end: float) -> float:
        """The longest that has a moment with this time in common."""
        return max(seconds for since, seconds in self._gaps if since <= end and since + seconds >= begin)

    def __enter__(self) -> Watch:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        time.sleep(0.5)
        self._over.set()
        self._thread.join()

    def _look(self) -> None:
        size, since = self._log.stat().st_size, time.time()
        while not self._over.is_set():
            now, at = self._log.stat().st_size, time.time()
            if now != size or at - since > 0.1:
                self._gaps.append((since, at - since))
            if now != size:
                size, since = now, at
            time.sleep(0.001)


@contextlib.contextmanager
def libvirt() -> Iterator[None]:
    """Its daemons, where none run."""
    started = []
    if subprocess.run(["virsh", "-q", "uri"], capture_output=True).returncode:
        for name in ("virtlogd", "libvirtd"):
            log = subprocess.DEVNULL
            started.append(subprocess.Popen([shutil.which(name) or f"/usr/sbin/{name}"], stdout=log, stderr=log))
    while subprocess.run(["virsh", "-q", "uri"], capture_output=True).returncode:
        time.sleep(0.2)
    try:
        yield
    finally:
        for process in reversed(started):
            process.terminate()
            process.wait()


class VirshFailed(Exception):
    pass


def virsh(*words: str) -> str:
    done = subprocess.run(["virsh", "-q", *words], capture_output=True, text=True)
    if done.returncode:
        raise VirshFailed(f"virsh {words[0]}: {done.stderr.strip()}")
    return done.stdout


class Theirs:
    """The same guest under libvirt."""

    def __init__(self, folder: Path, image: Path, cmdline: str, like: dict) -> None:
        self.folder, self.log, self.number = folder, folder / "serial.log", 0
        for name in ("kernel", "initrd"):
            shutil.copyfile(image / name, folder / name)
            (folder / name).chmod(0o644)
        self.log.touch(0o666)
        self.log.chmod(0o666)
        disk = folder / "disk.qcow2"
        subprocess.run(["qemu-img", "create", "-qf", "qcow2", disk, "1G"], check=True)
        model = like["cpu"].partition(",")[0]
        cpu = (
            "<cpu mode='host-passthrough'/>" if model == "host" else f"<cpu><model>{model.split('-v')[0]}</model></cpu>"
        )
        (folder / "domain.xml").write_text(
            DOMAIN.format(
                name=NAME, kind="kvm" if like["accelerator"] == "kvm" else "qemu", machine=like["type"], disk=disk,
                kernel=folder / "kernel", initrd=folder / "initrd", cmdline=cmdline, log=self.log, cpu=cpu,
            )
        )  # fmt: skip
        virsh("create", str(folder / "domain.xml"))
        deadline = time.monotonic() + 300
        while True:
            try:
                self.run("true")
                break
            except VirshFailed as error:
                if time.monotonic() > deadline:
                    raise SystemExit(f"the guest under libvirt does not answer: {error}") from None
                time.sleep(1)

    def run(self, script: str) -> None:
        arguments = {"path": "/bin/sh", "arg": ["-c", f"({script}) >/dev/null 2>&1 </dev/null &"]}
        virsh("qemu-agent-command", NAME, json.dumps({"execute": "guest-exec", "arguments": arguments}))

    def snapshot(self) -> None:
        self.number += 1
        kind = ",snapshot=external"
        virsh(
            "snapshot-create-as", NAME, f"s{self.number}", "--live", "--memspec",
            f"file={self.folder}/memory-{self.number}{kind}", "--diskspec",
            f"vda,file={self.folder}/disk-{self.number}.qcow2{kind}",
        )  # fmt: skip
        (self.folder / f"memory-{self.number}").unlink()
        virsh("snapshot-delete", NAME, f"s{self.number}", "--metadata")


def main() -> None:
    with running_daemon("tiny") as daemon, contextlib.ExitStack() as stack:
        host = daemon.inn.host()
        print(
            f"accelerator: {host['accelerator']['name']}, {host['cpu']['threads']} CPUs, QEMU {host['qemu']['version']}"
        )
        ours = daemon.inn.launch("tiny", name="busy", memory="1G", disk="1G")
        log = daemon.home.vm(ours.info["id"]) / "serial.log"
        image = daemon.inn.image("tiny")
        stack.enter_context(libvirt())
        folder = Path(tempfile.mkdtemp(prefix="inn-bench-", dir="/var/tmp"))
        stack.callback(shutil.rmtree, folder)
        folder.chmod(0o755)
        stack.callback(lambda: subprocess.run(["virsh", "-q", "destroy", NAME], capture_output=True))
        theirs = Theirs(folder, daemon.home.image(image["id"]), image["cmdline"], ours.info["machine"])
        for script in (BUSY, TICK):
            ours.exec(["sh", "-c", f"({script}) >/dev/null 2>&1 </dev/null &"])
            theirs.run(script)
        virsh("suspend", NAME)
        bare = stopped(daemon, ours, log)
        virsh("resume", NAME)
        measure(ours, log, theirs, bare)
        virsh("suspend", NAME)
        saved = background(daemon, ours, log)  # last: all of its RAM counts as in use after that
        first, *later = (round(pause * 1000) for pause in saved)
        print(f"saved by QEMU in the background: {first} ms, then {median(later):.0f} ms: {later}")


@contextlib.contextmanager
def by_hand(daemon, vm) -> Iterator[Talk]:
    """The guest goes on without its daemon meanwhile."""
    path = daemon.home.vm(vm.info["id"]) / "qmp.sock"
    daemon.stop()
    with contextlib.closing(Talk(path)) as qmp:
        qmp.call("qmp_capabilities")
        yield qmp
    daemon.start()


def stopped(daemon, vm, log: Path) -> list[float]:
    """Pauses of a bare `stop` and `cont`."""
    pauses = []
    with by_hand(daemon, vm) as qmp:
        for _ in range(RUNS):
            with Watch(log) as watch:
                qmp.call("stop")
                qmp.call("cont")
            pauses.append(watch.longest)
    return pauses


def background(daemon, vm, log: Path) -> list[float]:
    """Pauses of QEMU's own background-snapshot of a guest that has been stopped, as its disks want: QEMU 7.2 lets it go
    on by itself. QEMU needs userfaultfd for it, which is allowed meanwhile."""
    pauses: list[float] = []
    allowed = USERFAULTFD.read_text()
    USERFAULTFD.write_text("1")
    try:
        with by_hand(daemon, vm) as qmp:
            capability = {"capability": "background-snapshot", "state": True}
            qmp.call("migrate-set-capabilities", {"capabilities": [capability]})
            for _ in range(RUNS):
                fd = os.memfd_create("stream")
                qmp.call("getfd", {"fdname": "stream"}, fd)
                with Watch(log) as watch:
                    qmp.call("stop")
                    qmp.call("migrate", {"uri": "fd:stream"})
                    while qmp.call("query-migrate")["status"] != "completed":
                        time.sleep(0.05)
                pauses.append(watch.longest)
                os.close(fd)
            qmp.call("migrate-set-capabilities", {"capabilities": [capability | {"state": False}]})
    finally:
        USERFAULTFD.write_text(allowed)
    return pauses


def measure(ours, log: Path, theirs: Theirs, bare: list[float]) -> None:
    pauses: dict[str, list[float]] = {name: [] for name in ("nothing", "beside", "ours", "said", "theirs")}
    pauses["stop and cont"] = bare
    longest, took = [], 5.0
    for _ in range(RUNS):
        virsh("suspend", NAME)
        time.sleep(1)
        with Watch(log) as watch:
            time.sleep(took)
        pauses["nothing"].append(watch.longest)
        with Watch(log) as watch:
            subprocess.run([sys.executable, "-c", COMPUTE.format(seconds=took)], check=True)
        pauses["beside"].append(watch.longest)
        with Watch(log) as watch:
            begun = time.perf_counter()
            found = ours.snapshots.create(memory=True).wait().result
            took = time.perf_counter() - begun
        at, pause = found["memory"]["at"], found["memory"]["pause"]
        pauses["ours"].append(watch.around(at, at + pause))
        pauses["said"].append(pause)
        longest.append(watch.longest)
        ours.snapshots.delete(found["snapshot"]).wait()
        ours.pause()
        virsh("resume", NAME)
        time.sleep(1)
        with Watch(theirs.log) as watch:
            theirs.snapshot()
        pauses["theirs"].append(watch.longest)
        ours.resume()
    shown = {name: f"{median(found) * 1000:.0f} ms" for name, found in pauses.items()}
    print(f"QEMU itself says {shown['said']}")
    print(
        f"the longest gap from beginning to end, {took:.0f} s: {median(longest) * 1000:.0f} ms; "
        f"without any snapshot in as much time: {shown['nothing']}, "
        f"beside a program of the lowest priority: {shown['beside']}"
    )
    print(f"with a bare stop and cont: {shown['stop and cont']}")
    print({name: [round(value * 1000) for value in found] for name, found in pauses.items()})
    say(
        "a guest of 1 GiB stands still for",
        shown["ours"],
        shown["theirs"],
        median(pauses["ours"]) / median(pauses["theirs"]),
        "0.1",
    )


main()
