"""Network namespaces, so that no test touches the machine's own network."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress


def run(namespace: str, *command: str) -> str:
    """What a command prints in a namespace."""
    inside = ["nsenter", f"--net=/run/netns/{namespace}", *command]
    return subprocess.run(inside, check=True, capture_output=True, text=True).stdout


@contextmanager
def namespace(role: str) -> Iterator[str]:
    """A namespace with its loopback up; it goes with all that runs in it."""
    name = f"inn-test-{os.getpid()}-{role}"
    subprocess.run(["ip", "netns", "add", name], check=True)
    try:
        run(name, "ip", "link", "set", "lo", "up")
        yield name
    finally:
        pids = subprocess.run(["ip", "netns", "pids", name], capture_output=True, text=True).stdout.split()
        for pid in pids:
            with suppress(ProcessLookupError):
                os.kill(int(pid), signal.SIGKILL)
        subprocess.run(["ip", "netns", "del", name], check=True)
