"""Listing: `inn ls` with 100 VMs against a bare Python, `GET /v1/vms` with 10,000 against encoding the same documents.

.venv/bin/python bench/listing.py [RUNS]
"""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from pathlib import Path

from common import Daemon, median, records, running_daemon, say, timed

from innkeeper.store.sqlite import SQLiteStore

RUNS = int(sys.argv[1]) if len(sys.argv) > 1 else 15


def fill(daemon: Daemon, count: int) -> None:
    """Stopped VMs, written while no daemon runs."""
    daemon.stop()

    async def write() -> None:
        store = SQLiteStore(daemon.home.store)
        await store.transact(dict(records(count)))
        await store.close()

    asyncio.run(write())
    for number in range(1, count + 1):
        daemon.home.vm(f"{number:012x}").mkdir(mode=0o700, parents=True)
    daemon.start()


def rss(daemon: Daemon) -> int:
    """Bytes resident."""
    assert daemon.process is not None
    return int(Path(f"/proc/{daemon.process.pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE")


def main() -> None:
    inn = str(Path(sys.executable).with_name("inn"))
    with running_daemon() as daemon:
        empty = rss(daemon)
        fill(daemon, 100)
        environment = os.environ | {"INNKEEPER_HOME": str(daemon.home.data)}
        quiet = {"env": environment, "stdout": subprocess.DEVNULL, "check": True}
        ours, peer = [], []
        for _ in range(RUNS):
            peer.append(timed(lambda: subprocess.run([sys.executable, "-c", "pass"], **quiet)))
            ours.append(timed(lambda: subprocess.run([inn, "ls"], **quiet)))
        ratio = median(ours) / median(peer)
        say("inn ls, 100 VMs", f"{median(ours) * 1000:.0f} ms", f"{median(peer) * 1000:.0f} ms", ratio, "at most 8")

    with running_daemon() as daemon:
        fill(daemon, 10_000)
        before = rss(daemon)
        vms = daemon.inn.vms()
        assert len(vms) == 10_000
        ours, peer = [], []
        for _ in range(RUNS):
            peer.append(timed(lambda: json.dumps(vms)))
            ours.append(timed(lambda: _get(daemon)))
        ratio = median(ours) / median(peer)
        what = "GET /v1/vms, 10,000 VMs"
        say(what, f"{median(ours) * 1000:.0f} ms", f"{median(peer) * 1000:.0f} ms", ratio, "at most 5")
        after = rss(daemon)
        print(f"daemon resident: {empty / 1e6:.0f} MB with no VM (wanted: at most 100)")
        for label, value in (("loaded", before), ("listed", after)):
            each = (value - empty) / 10_000 / 1000
            print(f"daemon resident, {label}: {each:.1f} KB per stopped VM (wanted: at most 200)")


def _get(daemon: Daemon) -> None:
    import socket

    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(str(daemon.home.socket))
        connection.sendall(b"GET /v1/vms HTTP/1.0\r\nHost: x\r\n\r\n")
        while connection.recv(1 << 20):
            pass


if __name__ == "__main__":
    main()
