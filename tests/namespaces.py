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
    """A namespace with its loopback up, which forwards nothing (a new one may have that from the machine's own); it
    goes with all that runs in it."""
    name = f"inn-test-{os.getpid()}-{role}"
    subprocess.run(["ip", "netns", "add", name], check=True)
    try:
        run(name, "ip", "link", "set", "lo", "up")
        run(name, "sysctl", "-qw", "net.ipv4.ip_forward=0", "net.ipv6.conf.all.forwarding=0")
        yield name
    finally:
        for pid in programs(name):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        subprocess.run(["ip", "netns", "del", name], check=True)


@contextmanager
def host_beside(outside: str) -> Iterator[str]:
    """A namespace that plays a host: its `wan` is joined to `eth0` of another one, which plays what is outside. It is
    192.0.2.1 and 2001:db8:2::1 there, and the other one has 2 for 1."""
    with namespace("host") as name:
        run(name, "ip", "link", "add", "wan", "type", "veth", "peer", "name", "eth0", "netns", outside)
        for where, link, number in ((name, "wan", 1), (outside, "eth0", 2)):
            run(where, "ip", "addr", "add", f"192.0.2.{number}/24", "dev", link)
            run(where, "ip", "addr", "add", f"2001:db8:2::{number}/64", "dev", link, "nodad")
            run(where, "ip", "link", "set", link, "up")
        yield name
