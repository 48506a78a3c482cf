"""A QEMU command as data: options that are JSON, key=value constants, or plain words."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

Json = Mapping[str, Any]


@dataclass(frozen=True)
class Constants:
    """`key=value,key=value`, for the options that QEMU has no JSON form of.

    Only Innkeeper's own words and numbers go in: a comma would begin another key, so it is refused here.
    """

    first: str = ""
    keys: Mapping[str, str | int] = field(default_factory=dict)

    def text(self) -> str:
        """As QEMU's QemuOpts parser reads it (docs/devel: `util/qemu-option.c`)."""
        parts = ([self.first] if self.first else []) + [f"{key}={value}" for key, value in self.keys.items()]
        for part in parts:
            if "," in part or "\n" in part or "\0" in part:
                raise AssertionError(f"{part!r} is not a constant")
        return ",".join(parts)


@dataclass(frozen=True)
class Option:
    """One option of the command."""

    flag: str
    value: Json | Constants | str | None = None

    def words(self) -> list[str]:
        """As arguments. JSON values keep every character, so a comma or a quote in a path changes nothing."""
        if self.value is None:
            return [self.flag]
        if isinstance(self.value, str):
            return [self.flag, self.value]
        if isinstance(self.value, Constants):
            return [self.flag, self.value.text()]
        return [self.flag, json.dumps(self.value, separators=(",", ":"), ensure_ascii=False)]


SANDBOX = Option(
    "-sandbox",
    Constants("on", dict.fromkeys(("obsolete", "elevateprivileges", "spawn", "resourcecontrol"), "deny")),
)
"""Of every QEMU that has anything to do with what a guest has written."""


@dataclass(frozen=True)
class RamImage:
    """Captured RAM: the file that holds it, and its size in bytes. QEMU gets a descriptor of a sealed copy, mapped
    privately: no guest, and no QEMU that a guest has taken over, can change what others start from."""

    path: str
    size: int

    def option(self, fd: int) -> Option:
        """The RAM of a QEMU that inherits the copy as `fd`."""
        properties = {"size": self.size, "share": False, "mem-path": f"/proc/self/fd/{fd}"}
        return Option("-object", {"qom-type": "memory-backend-file", "id": "ram", **properties})


@dataclass(frozen=True)
class Tap:
    """A NIC in a network: QEMU gets the descriptor of the tap `name`, which it may not open by itself."""

    index: int
    name: str

    @property
    def netdev(self) -> str:
        return f"net{self.index}"

    def given(self, fd: str) -> Json:
        """The netdev of a QEMU that has the tap as `fd`: inherited, a number; or given to its monitor, by name."""
        return {"type": "tap", "id": self.netdev, "fd": fd}

    def option(self, fd: int) -> Option:
        """The netdev of a QEMU that inherits the tap as `fd`."""
        return Option("-netdev", self.given(str(fd)))


@dataclass(frozen=True)
class Macvtap(Tap):
    """A NIC on an interface of the host, `parent`: the descriptor is that of a macvtap `name` with the guest's MAC."""

    parent: str
    mode: str
    mac: str


@dataclass(frozen=True)
class Passt(Tap):
    """A NIC with passt's NAT: the descriptor is QEMU's end of a socket pair."""

    forwards: tuple[tuple[str, str, int, int], ...]
    """(protocol, the host's address, its port, the guest's)."""
    uid: int | None

    def given(self, fd: str) -> Json:
        return {"type": "stream", "id": self.netdev, "server": False, "addr": {"type": "fd", "str": fd}}

    def words(self) -> list[str]:
        """Arguments of passt(1): the guest has the IPv4 addresses that QEMU's NAT would give it, the host's own
        loopback is not to be reached from it, and IPv6 is as on the host."""
        ports = [
            word
            for protocol, address, host, guest in self.forwards
            for word in ("--tcp-ports" if protocol == "tcp" else "--udp-ports", f"{address}/{host}:{guest}")
        ]
        return [
            "--quiet", "--no-map-gw", "--address", "10.0.2.15", "--netmask", "24", "--gateway", "10.0.2.2",
            "--dns", "10.0.2.3", "--dns-forward", "10.0.2.3", *ports,
        ]  # fmt: skip


@dataclass(frozen=True)
class Plan:
    """What exactly will run. No choice is left after it."""

    binary: str
    options: tuple[Option, ...]
    fdsets: tuple[str, ...] = ()
    """Paths of files that the daemon opens read-only and hands in as /dev/fdset/1, 2, …: files the VM's user may not
    open by itself, such as an ISO in somebody's home."""
    ram: RamImage | None = None
    """The guest's memory when it goes on from a captured one; the option for it is made when QEMU is spawned."""
    taps: tuple[Tap, ...] = ()
    """NICs in networks and on interfaces of the host; the options for them are made when QEMU is spawned."""
    locked: int = 0
    """Bytes of its memory that QEMU has to be able to lock: a PCI device of the host's reaches all of the guest's."""
    uid: int | None = None
    groups: tuple[int, ...] = ()

    def argv(self) -> list[str]:
        """The command, without the `-add-fd` options, whose numbers exist only when it is spawned."""
        return [self.binary, *(word for option in self.options for word in option.words())]
