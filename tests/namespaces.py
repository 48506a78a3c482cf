"""Network namespaces, so that no test touches the machine's own network."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


def run(namespace: str, *command: str) -> str:
    """What a command prints in a namespace."""
    inside = ["nsenter", f"--net=/run/netns/{namespace}", *command]
    return subprocess.run(inside, check=True, capture_output=True, text=True).stdout


def programs(namespace: str) -> dict[int, str]:
    """What runs in a namespace, by pid."""
    command = ["ip", "netns", "pids", namespace]
    pids = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    found = {}
    for pid in pids:
        with suppress(OSError):
            found[int(pid)] = Path(f"/proc/{pid}/comm").read_text().strip()
    return found


@contextmanager
def namespace(role: str) -> Iterator[str]:
    """A namespace with its loopback up; it goes with all that runs in it."""
    name = f"inn-test-{os.getpid()}-{role}"
    subprocess.run(["ip", "netns", "add", name], check=True)
    try:
        run(name, "ip", "link", "set", "lo", "up")
        yield name
    finally:
        for pid in programs(name):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        subprocess.run(["ip", "netns", "del", name], check=True)
