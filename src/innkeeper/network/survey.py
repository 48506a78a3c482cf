"""Reads the host's network for the doctor (plan/doctor.py). Changes nothing."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from innkeeper.base.errors import InvalidInput
from innkeeper.network import firewall, links
from innkeeper.network.forwarding import SYSCTLS
from innkeeper.network.ports import is_free, who_listens
from innkeeper.plan.network import Nic
from innkeeper.plan.survey import Survey

RESOLV = Path("/etc/resolv.conf")
WANTED = (
    "ipv4/ip_forward", "ipv6/conf/all/forwarding", "ipv4/conf/*/rp_filter", "ipv6/conf/*/accept_ra",
    "bridge/bridge-nf-call-iptables",
)  # fmt: skip


async def survey(nics: Iterable[Nic] = (), *, quick: bool = False) -> Survey:
    """This host as it is now. `quick` leaves out what takes long: who listens on the ports that these cards publish,
    and the words of others' rules. Raises `NetworkFailed`, `ToolMissing`."""
    devices, routes, learned = await links.everything()
    rules, lines = await firewall.of_others(lines=not quick)
    nameservers = _nameservers()
    loopback = [server for server in nameservers if server.startswith("127.") or server == "::1"]
    return Survey(
        links=devices,
        routes=routes,
        sysctls=_sysctls(),
        rules=tuple(rules),
        lines=lines,
        nameservers=nameservers,
        silent=frozenset(server for server in loopback if is_free(53, "udp", server)),
        learned=learned,
        holders={} if quick else await asyncio.to_thread(_holders, list(nics)),
        connections=(_number("nf_conntrack_count"), _number("nf_conntrack_max")),
    )


def _nameservers() -> tuple[str, ...]:
    try:
        words = [line.split() for line in RESOLV.read_text().splitlines()]
    except OSError:
        return ()
    return tuple(line[1] for line in words if len(line) > 1 and line[0] == "nameserver")


def _sysctls() -> dict[str, str]:
    paths = [path for pattern in WANTED for path in SYSCTLS.glob(pattern)]
    return {str(path.relative_to(SYSCTLS)): path.read_text().strip() for path in paths if path.exists()}


def _holders(nics: Iterable[Nic]) -> dict[tuple[str, int], str]:
    found: dict[tuple[str, int], str] = {}
    for forward in (forward for nic in nics for forward in nic.publish):
        with suppress(InvalidInput):  # an address that the host has no more
            if not is_free(forward.host, forward.protocol, forward.address):
                holder = who_listens(forward.host, forward.protocol, forward.address)
                found[forward.protocol, forward.host] = holder or "another program"
    return found


def _number(name: str) -> int:
    try:
        return int((SYSCTLS / "netfilter" / name).read_text())
    except (OSError, ValueError):
        return 0
