"""Host ports: who holds one, and which is free. Sees this process's own network namespace."""

from __future__ import annotations

import errno
import ipaddress
import socket
from collections.abc import Collection
from pathlib import Path
from typing import Literal

import psutil

from innkeeper.base.errors import InvalidInput, PortTaken

Protocol = Literal["tcp", "udp"]
HAS_IPV6 = Path("/proc/net/if_inet6")


def who_listens(port: int, proto: Protocol = "tcp", address: str = "0.0.0.0") -> str | None:
    """The process that keeps `address:port` from being bound: `nginx (pid 812)`; None where nobody does.

    Without privileges the kernel does not tell the processes of other users: `a process of another user`. Reads
    the descriptors of every process (some 10 ms), so ask only once binding has failed.
    """
    wanted = _address(address)
    for entry in psutil.net_connections(kind=proto):
        if not entry.laddr or entry.laddr.port != port or not _clash(_address(entry.laddr.ip), wanted):
            continue
        if (proto == "tcp" and entry.status != psutil.CONN_LISTEN) or (proto == "udp" and entry.raddr):
            continue
        if entry.pid is None:
            return "a process of another user"
        try:
            return f"{psutil.Process(entry.pid).name()} (pid {entry.pid})"
        except psutil.Error:
            return f"pid {entry.pid}"
    return None


def is_free(port: int, proto: Protocol = "tcp", address: str = "0.0.0.0") -> bool:
    """Whether `address:port` can be bound (and listened on) now. `::` is IPv4, too. Raises `InvalidInput` where it is
    no address of this host."""
    family = socket.AF_INET6 if _address(address).version == 6 else socket.AF_INET
    if address == "::" and not HAS_IPV6.exists():
        family, address = socket.AF_INET, "0.0.0.0"
    kind = socket.SOCK_STREAM if proto == "tcp" else socket.SOCK_DGRAM
    with socket.socket(family, kind) as trial:
        if proto == "tcp":
            # as servers do: connections that linger in TIME_WAIT are no obstacle
            trial.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if address == "::":
            trial.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        try:
            trial.bind((address, port))
            if proto == "tcp":
                trial.listen(1)
        except OSError as error:
            if error.errno in (errno.EADDRINUSE, errno.EACCES):
                return False
            if error.errno == errno.EADDRNOTAVAIL:
                raise InvalidInput(
                    f"{address} is no address of this host",
                    hint="`ip addr` shows those that it has; :: is all of them", field="address",
                ) from None  # fmt: skip
            raise
    return True


def free_port(start: int, avoid: Collection[int] = (), *, proto: Protocol = "tcp", address: str = "127.0.0.1") -> int:
    """The first port from `start` up that is free and not in `avoid`. Raises `PortTaken` where there is none."""
    for port in range(start, 65536):
        if port not in avoid and is_free(port, proto, address):
            return port
    raise PortTaken(
        f"no free {proto} port from {start} to 65535 on {address}", hint="stop what holds them", start=start
    )


def _address(text: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address:
    try:
        found = ipaddress.ip_address(text.partition("%")[0])
    except ValueError:
        raise InvalidInput(f"{text!r} is not an IP address", field="address") from None
    mapped = found.ipv4_mapped if isinstance(found, ipaddress.IPv6Address) else None
    return mapped or found


def _clash(
    one: ipaddress.IPv4Address | ipaddress.IPv6Address, other: ipaddress.IPv4Address | ipaddress.IPv6Address
) -> bool:
    """Whether both cannot be bound at once: the same, or one is a wildcard (`::` takes IPv4 too by default)."""
    if one.version != other.version:
        return any(each.version == 6 and each.is_unspecified for each in (one, other))
    return one == other or one.is_unspecified or other.is_unspecified
