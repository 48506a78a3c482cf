"""What the benchmarks share: a daemon of their own, medians, one line per result. Run with the project's Python."""

from __future__ import annotations

import ctypes
import json
import os
import socket
import statistics
import struct
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from conftest import Daemon, running_daemon

CLONE_NEWNET = 0x40000000
__all__ = ["Daemon", "Talk", "inside", "median", "records", "running_daemon", "say", "timed"]


def timed(action: Callable[[], object]) -> float:
    """Seconds that `action` takes."""
    begun = time.perf_counter()
    action()
    return time.perf_counter() - begun


def median(seconds: list[float]) -> float:
    return statistics.median(seconds)


def say(what: str, ours: str, peer: str, ratio: float, limit: str) -> None:
    """One result."""
    print(f"{what}: ours {ours}, peer {peer}, ratio {ratio:.2f} (wanted: {limit})", flush=True)


class Talk:
    """JSON lines over a UNIX socket."""

    def __init__(self, path: Path) -> None:
        self._socket = socket.socket(socket.AF_UNIX)
        while True:
            try:
                self._socket.connect(str(path))
                break
            except OSError:
                time.sleep(0.001)
        self._lines = self._socket.makefile("rb")

    def send(self, command: str, arguments: dict | None = None, fd: int | None = None) -> None:
        text = json.dumps({"execute": command} | ({"arguments": arguments} if arguments else {})).encode() + b"\n"
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, struct.pack("i", fd))] if fd is not None else []
        self._socket.sendmsg([text], rights)

    def answer(self) -> object:
        while True:
            line = json.loads(self._lines.readline().rpartition(b"\xff")[2])
            if "error" in line and "stray" not in line["error"]["desc"]:  # the agent's answer to 0xff
                raise SystemExit(f"QEMU refused: {line}")
            if "return" in line:
                return line["return"]

    def close(self) -> None:
        self._lines.close()
        self._socket.close()

    def call(self, command: str, arguments: dict | None = None, fd: int | None = None) -> object:
        self.send(command, arguments, fd)
        return self.answer()


@contextmanager
def inside(name: str) -> Iterator[None]:
    """This thread makes its sockets in a namespace."""
    libc = ctypes.CDLL(None, use_errno=True)
    home, there = (os.open(path, os.O_RDONLY) for path in ("/proc/self/ns/net", f"/run/netns/{name}"))
    try:
        if libc.setns(there, CLONE_NEWNET):
            raise OSError(ctypes.get_errno(), f"setns {name}")
        yield
    finally:
        libc.setns(home, CLONE_NEWNET)
        os.close(home)
        os.close(there)


def records(count: int) -> dict[str, dict]:
    """Documents of stopped VMs, as the daemon itself writes them."""
    from innkeeper.host.accelerator import Verdict
    from innkeeper.host.facts import Cgroup, Cpu, Firmware, HostFacts, Kernel, Memory, QemuFacts
    from innkeeper.plan.identity import assign
    from innkeeper.plan.record import vm_record
    from innkeeper.spec.vm import VMSpec

    host = HostFacts.model_construct(
        root=True, uid_range=(1_900_000_000, 65536), cpu=Cpu.model_construct(), memory=Memory.model_construct(),
        cgroup=Cgroup.model_construct(), kernel_features=Kernel.model_construct(), firmware=Firmware(),
        qemu=QemuFacts.model_construct(machine="pc-q35-7.2"),
        accelerator=Verdict.model_construct(name="tcg", cpu_model="Westmere-v1"),
    )  # fmt: skip
    key = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIJ8m5wMyCZ0rVZ5e6J1q0y0m7h3P1b0Zt0Jm0l1bench bench@host"
    made: dict[str, dict] = {}
    for number in range(1, count + 1):
        vm_id, name = f"{number:012x}", f"vm-{number:05d}"
        spec = VMSpec.model_validate(
            {
                "name": name,
                "disks": [{"size": "20G"}],
                "first_boot": {"ssh_keys": [key]},
                "note": "made for a benchmark",
            }
        )
        record = vm_record(
            spec, assign(vm_id, number, spec, host, 22000 + number), None, [], "2026-01-01T00:00:00.000Z"
        )
        made[f"vm/{vm_id}"] = record | {"state": "stopped"}
        made[f"name/vm/{name}"] = {"id": vm_id, "name": name}
        made[f"slot/{number}"] = {"id": vm_id, "name": name}
    return made
