"""Clones: what Innkeeper takes, and what the tools take that only write the files.

    .venv/bin/python bench/clone.py [RUNS]

Linked: from the API call to the operation's end, for a stopped VM with one disk of 20 GiB; the peer is
`qemu-img create -b`. Full: 1 GiB of data in a disk of 20 GiB; the peers are `cp --sparse=always` and `qemu-img convert`
of the same file. With reflinks: the same on an xfs of its own, against `cp --reflink=always`, where this may mount one.
Each round measures all of them, in turn. Every copy is on the host's disk at the end: the peers are followed by a sync
of the file, as ours has one.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from common import Daemon, median, running_daemon, say, timed
from conftest import _folder

RUNS = int(sys.argv[1]) if len(sys.argv) > 1 else 15
FULL_RUNS = max(3, RUNS // 3)
DATA = 1 << 30


def run(*words: str | Path) -> None:
    subprocess.run(words, check=True, stdout=subprocess.DEVNULL)


def sync(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    os.fsync(fd)
    os.close(fd)


def make(daemon: Daemon, fill: bool) -> Path:
    """A stopped VM with a disk of 20 GiB; with `fill`, `DATA` bytes of it are written. The file of its disk."""
    nic = {"mode": "none"}
    spec = {"name": "source", "image": None, "cpus": 1, "memory": "64M", "disks": [{"size": "20G"}], "nics": [nic]}
    daemon.inn.create(spec, start=False).wait()
    (disk,) = daemon.home.vm(daemon.inn.vm("source").info["id"]).glob("disk0-*.qcow2")
    if fill:
        run("qemu-io", "-f", "qcow2", "-c", f"write -P 7 0 {DATA}", disk)
        sync(disk)
    return disk


def ours(daemon: Daemon, *, linked: bool) -> float:
    """Seconds of one clone, which is gone afterwards."""
    vm = daemon.inn.vm("source")
    seconds = timed(lambda: vm.clone("copy", linked=linked).wait())
    daemon.inn.vm("copy").delete()
    if linked:  # the source has a layer more each time
        vm.snapshots.prune().wait()
    return seconds


def peer(target: Path, *words: str | Path) -> float:
    """Seconds of a tool that writes `target`, which is gone afterwards."""

    def do() -> None:
        run(*words, target)
        sync(target)

    try:
        return timed(do)
    finally:
        target.unlink(missing_ok=True)


def measure(rounds: int, **ways: Callable[[], float]) -> dict[str, float]:
    """Medians, in seconds."""
    taken: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, way in ways.items():
            taken[name].append(way())
    return {name: median(seconds) for name, seconds in taken.items()}


def show(what: str, found: dict[str, float], limit: str) -> None:
    for name in found:
        if name != "ours":
            mine, theirs = found["ours"], found[name]
            say(f"{what}, {name}", f"{mine * 1000:.0f} ms", f"{theirs * 1000:.0f} ms", mine / theirs, limit)


def linked() -> None:
    with running_daemon() as daemon, tempfile.TemporaryDirectory(dir=daemon.home.data) as scratch:
        accelerator = daemon.inn.host()["accelerator"]["name"]
        print(f"accelerator: {accelerator}; {RUNS} runs of linked, {FULL_RUNS} of full clones; medians")
        disk, target = make(daemon, fill=False), Path(scratch) / "overlay.qcow2"
        size = str(20 << 30)

        def create() -> float:
            try:
                return timed(
                    lambda: run("qemu-img", "create", "-q", "-f", "qcow2", "-F", "qcow2", "-b", disk, target, size)
                )
            finally:
                target.unlink(missing_ok=True)

        found = measure(RUNS, ours=lambda: ours(daemon, linked=True), create=create)
        show("linked clone, 20 GiB", found, "at most 1.5")


def full(pool: Path | None = None) -> None:
    daemon = Daemon(_folder(), pool)
    try:
        disk = make(daemon.start(), fill=True)
        target = (pool or daemon.home.data) / "copy.qcow2"
        ways = {"ours": lambda: ours(daemon, linked=False)}
        if pool is not None:
            ways["cp"] = lambda: peer(target, "cp", "--reflink=always", disk)
            show("full clone, reflinks", measure(RUNS, **ways), "-")
            return
        ways["cp"] = lambda: peer(target, "cp", "--reflink=never", "--sparse=always", disk)
        ways["convert"] = lambda: peer(target, "qemu-img", "convert", "-O", "qcow2", disk)
        show("full clone, 1 GiB of data", measure(FULL_RUNS, **ways), "-")
    finally:
        daemon.clean()


@contextmanager
def xfs() -> Iterator[Path | None]:
    """A folder on an xfs of its own; None where that cannot be had."""
    folder = _folder()
    image = folder.with_suffix(".img")
    try:
        with suppress(OSError, subprocess.CalledProcessError):
            run("truncate", "-s", "4G", image)
            run("mkfs.xfs", "-q", image)
            run("mount", "-o", "loop", image, folder)
            folder.chmod(0o711)
        yield folder if folder.is_mount() else None
    finally:
        subprocess.run(["umount", "-l", folder], capture_output=True)
        image.unlink(missing_ok=True)
        folder.rmdir()


def main() -> None:
    linked()
    full()
    with xfs() as pool:
        if pool is None:
            print("full clone, reflinks: not measured, this cannot mount an xfs (root, xfsprogs, loop devices)")
        else:
            full(pool)


if __name__ == "__main__":
    main()
