"""Forking a warm guest: Innkeeper, from the API call to a guest whose agent has answered, and the floor: a script that
does only what QEMU needs (spawn, load the devices, cont) and pings the agent. In turn, in one run; then many at once,
and what each of them takes of the host's memory while it idles.

    .venv/bin/python bench/fork.py [RUNS [MANY]] [IMAGE[:MEMORY]…]      by default 10 20 tiny:256M

Ours includes what the floor leaves out: name, ports and journal, an overlay, confinement, and a guest that has become a
machine of its own (hostname, machine-id, keys, MAC, random pool, clock) before anyone can talk to it.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

from common import Talk, median, running_daemon, say

NUMBERS = [int(word) for word in sys.argv[1:] if word.isdigit()]
RUNS, MANY = (*NUMBERS, *(10, 20)[len(NUMBERS) :])
IMAGES = [word for word in sys.argv[1:] if not word.isdigit()] or ["tiny:256M"]
IDLE = 20
"""Seconds that forks idle before their memory is looked at."""


class Crowd:
    def __init__(self, size: int) -> None:
        self.pids: list[int] = []
        self.answered, self.looked_at = threading.Barrier(size + 1), threading.Barrier(size + 1)


def floor(argv: list[str], image: Path, disk: Path | None, crowd: Crowd | None = None) -> float:
    """Seconds from spawn to the agent's answer, of the same machine by hand. In a crowd it stays until all have
    answered and have been looked at."""
    folder = Path(tempfile.mkdtemp(prefix="inn-bench-"))
    words: list[str] = []
    skip = False
    for word in argv:
        if skip:
            skip = False
            continue
        if word == "-add-fd":
            skip = True
            continue
        words.append(re.sub(r"/proc/self/fd/\d+", str(image / "ram"), word))
    text = "\0".join(words)
    if disk is not None:
        text = text.replace("/dev/fdset/1", str(image / "disk.qcow2")).replace("/dev/fdset/2", str(image / "seed.iso"))
        (name,) = set(re.findall(r"disk0-[0-9a-f]{12}\.qcow2", text))
        shutil.copyfile(disk, folder / name)
    text = re.sub(r"tcp:127\.0\.0\.1:\d+-:22", "tcp:127.0.0.1:0-:22", text)
    begun = time.perf_counter()
    process = subprocess.Popen(text.split("\0"), cwd=folder, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE)
    try:
        qmp = Talk(folder / "qmp.sock")
        qmp.call("qmp_capabilities")
        agent = Talk(folder / "agent.sock")
        agent._socket.sendall(b"\xff")
        Talk(folder / "rebirth.sock")
        number = 4711
        agent.send("guest-sync", {"id": number})
        wanted = [{"capability": "x-ignore-shared", "state": True}]
        qmp.call("migrate-set-capabilities", {"capabilities": wanted})
        state = os.open(image / "devices", os.O_RDONLY)
        qmp.call("getfd", {"fdname": "state"}, state)
        os.close(state)
        qmp.call("migrate-incoming", {"uri": "fd:state"})
        while qmp.call("query-migrate").get("status") != "completed":  # type: ignore[attr-defined]
            time.sleep(0.002)
        qmp.call("cont")
        while agent.answer() != number:
            pass
        agent.call("guest-ping")
        taken = time.perf_counter() - begun
        if crowd is not None:
            crowd.pids.append(process.pid)
            crowd.answered.wait()
            crowd.looked_at.wait()
        return taken
    finally:
        process.kill()
        process.wait()
        shutil.rmtree(folder)


def main() -> None:
    names = [each.partition(":")[0] for each in IMAGES]
    with running_daemon(*dict.fromkeys(names)) as daemon:
        print(f"accelerator: {daemon.inn.host()['accelerator']['name']}")
        for name, memory in (each.partition(":")[::2] for each in IMAGES):
            compare(daemon, name, memory or "256M")


def compare(daemon, name: str, memory: str) -> None:
    from innkeeper.client.wishes import vm_spec

    warm = f"{name}-{memory.lower()}"
    spec = vm_spec("warming", name, memory=memory, disk="20G", cpus=2)
    begun = time.perf_counter()
    daemon.inn.warm(name, spec, name=warm).wait()
    print(f"{warm}: booted and captured in {time.perf_counter() - begun:.1f} s")
    folder = daemon.home.image(daemon.inn.image(warm)["id"])
    with daemon.inn.fork(warm) as pattern:
        argv = Path(f"/proc/{pattern.info['pid']}/cmdline").read_text().rstrip("\0").split("\0")
        kept = Path(tempfile.mkdtemp(prefix="inn-bench-")) / "overlay"
        with daemon.inn.fork(warm) as fresh:
            (fresh_disk,) = daemon.home.vm(fresh.info["id"]).glob("disk0-*")
            shutil.copyfile(fresh_disk, kept)
    ours, bare = [], []
    for _ in range(RUNS):
        begun = time.perf_counter()
        vm = daemon.inn.fork(warm)  # its agent has answered then
        ours.append(time.perf_counter() - begun)
        vm.delete(force=True)
        bare.append(floor(argv, folder, kept))
    milliseconds = [f"{median(values) * 1000:.0f} ms" for values in (ours, bare)]
    say(f"fork of {warm}", *milliseconds, median(ours) / median(bare), "1.3")
    many(daemon, warm, lambda crowd: floor(argv, folder, kept, crowd))
    shutil.rmtree(kept.parent)


def many(daemon, warm: str, bare) -> None:
    """The same at once."""
    from innkeeper.host.usage import used_by

    names = [f"many-{number}" for number in range(MANY)]
    begun = time.perf_counter()
    for operation in daemon.inn.forks(warm, names, force=True):
        operation.wait()
    ours = time.perf_counter() - begun
    time.sleep(IDLE)
    taken = [sum(daemon.inn.vm(name).info["memory_used"].values()) for name in names]
    for operation in [daemon.inn.vm(name).delete(force=True, wait=False) for name in names]:
        operation.wait()
    crowd = Crowd(MANY)
    threads = [threading.Thread(target=bare, args=(crowd,)) for _ in names]
    begun = time.perf_counter()
    for thread in threads:
        thread.start()
    crowd.answered.wait()
    peer = time.perf_counter() - begun
    time.sleep(IDLE)
    bare_taken = [sum(used_by(pid) or ()) for pid in crowd.pids]
    crowd.looked_at.wait()
    for thread in threads:
        thread.join()
    say(f"{MANY} forks of {warm} at once", f"{ours:.1f} s", f"{peer:.1f} s", ours / peer, "1.3")
    each = [median(values) / 2**20 for values in (taken, bare_taken)]
    ours_each, peer_each = (f"{size:.0f} MiB" for size in each)
    say("an idle one takes, shared pages by their part", ours_each, peer_each, each[0] / each[1], "57 MiB")


main()
