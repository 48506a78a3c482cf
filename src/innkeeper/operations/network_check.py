"""Follows one connection from a guest to a target: sends it, looks at each part of the way, and says where it ends."""

from __future__ import annotations

import asyncio
import ipaddress
import re
from contextlib import suppress
from dataclasses import replace

from innkeeper.base.errors import AgentFailed, AgentUnavailable, InnkeeperError, InvalidInput
from innkeeper.machine.machine import Machine
from innkeeper.network import firewall, links
from innkeeper.operations.networks import networks, nics
from innkeeper.operations.world import World
from innkeeper.plan.path import Hop, Outcome, Seen, hops
from innkeeper.qemu.agent import Agent
from innkeeper.qemu.agent_exec import capture
from innkeeper.store.contract import Value

PATIENCE = 5
"""Seconds that a target may take to answer."""
CONNECT = """
host=$1 port=$2 proto=$3 seconds=$4
if command -v python3 >/dev/null; then
    exec python3 -c 'import socket, sys
host, port, proto, seconds = sys.argv[1:]
kind = socket.SOCK_STREAM if proto == "tcp" else socket.SOCK_DGRAM
s = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, kind)
s.settimeout(float(seconds))
s.connect((host, int(port)))
proto == "tcp" or s.send(b"\\n")' "$@" 2>&1
elif command -v bash >/dev/null && command -v timeout >/dev/null; then
    timeout "$seconds" bash -c 'exec 3<>/dev/$2/$0/$1; [ $2 = tcp ] || echo >&3' "$host" "$port" "$proto" 2>&1
elif [ "$proto" = tcp ] && command -v nc >/dev/null; then nc -w "$seconds" "$host" "$port" </dev/null 2>&1
else exit 127
fi
"""
NO_PROGRAM = 127
RESOLVE = 'getent ahosts "$1" 2>/dev/null || nslookup "$1" 2>&1'
ROUTE = 'ip route get "$1" 2>&1'


async def check(world: World, vm: Value, machine: Machine, wanted: str, port: int, protocol: str) -> tuple[Hop, ...]:
    """The hops from the first card of a VM that is in a network, no bridged one. Leaves nothing behind. Raises
    `InvalidInput` for a VM without such a card, `NetworkFailed`."""
    known = await networks(world)
    nic = next((nic for nic in await nics(world, vm, known) if nic.address), None)
    if nic is None:
        raise InvalidInput(
            f"{vm['name']} has no card in a network with addresses of ours", hint="inn network ls; inn launch --network"
        )
    network = next(each for each in known.values() if each.id == nic.network)
    seen = Seen(nic, network, wanted, port, protocol, target=_address(wanted))
    try:
        async with machine.agent() as agent:
            seen = await _ask(agent, seen)
            seen = await _probe(seen, agent) if seen.target else await _look(seen)
    except (AgentUnavailable, AgentFailed) as error:
        seen = await _look(replace(seen, agent=error.detail))
    if seen.target and protocol == "tcp":
        seen = replace(seen, from_host=await _from_here(seen.target, port))
    return hops(seen)


def _address(text: str) -> str | None:
    try:
        return str(ipaddress.ip_address(text))
    except ValueError:
        return None


async def _ask(agent: Agent, seen: Seen) -> Seen:
    """What the guest knows: its addresses, the target's, its route."""
    cards = tuple((card["name"], card["mac"], tuple(card["addresses"])) for card in await agent.interfaces())
    target, said = seen.target, ""
    if target is None:
        said = await _shell(agent, RESOLVE, seen.wanted)
        target = _resolved(said)
    route = await _shell(agent, ROUTE, target) if target else ""
    first = route.splitlines()[0].strip() if route else ""
    return replace(seen, cards=cards, target=target, resolving=_last(said), route=first)


def _resolved(said: str) -> str | None:
    """The first address that getent(1) or nslookup(1) names; nslookup begins with the server that it asked."""
    answer = said.partition("Name:")[2] if "Server:" in said else said
    words = re.findall(r"([0-9a-fA-F:.]+)", answer)
    return next((found for found in map(_address, words) if found), None)


async def _probe(seen: Seen, agent: Agent) -> Seen:
    """Send it, and look at the way meanwhile."""
    assert seen.target is not None
    flow = (seen.protocol, _source(seen), seen.target, seen.port)
    before, old = await links.sent(seen.nic.tap), set(map(_ports, await firewall.connections(*flow)))
    async with firewall.traced(seen.nic.tap, seen.protocol, seen.target, seen.port) as trace:
        words = (seen.target, str(seen.port), seen.protocol, str(PATIENCE))
        status, said = await _run(agent, CONNECT, *words)
        if status == NO_PROGRAM:
            lacking = "python3 or bash" if seen.protocol == "udp" else "python3, bash or nc"
            return await _look(replace(seen, agent=f"the guest has no {lacking} to send {seen.protocol.upper()} with"))
        kept = [line for line in await firewall.connections(*flow) if _ports(line) not in old]
        seen = await _look(seen)
    after = await links.sent(seen.nic.tap)
    frames = None if after is None else after - (before or 0)
    connection = " ".join(kept[-1].split()) if kept else ""
    outcome = _outcome(status, said) if seen.protocol == "tcp" else "unknown"
    if outcome != "refused" and "ESTABLISHED" in connection:
        outcome = "open"  # of one that says nothing by itself
    return replace(seen, outcome=outcome, said=_last(said), frames=frames, trace=tuple(trace), connection=connection)


def _last(said: str) -> str:
    return (said.strip().splitlines() or [""])[-1].strip()[:300]


def _source(seen: Seen) -> str:
    return seen.nic.address6 or "" if ":" in str(seen.target) else seen.nic.address or ""


def _ports(line: str) -> str:
    return " ".join(re.findall(r"sport=\d+", line))


async def _look(seen: Seen) -> Seen:
    devices, _, _ = await links.everything()
    tap, bridge = devices.get(seen.nic.tap), devices.get(seen.network.bridge)
    way = await links.way_to(seen.target) if seen.target else None
    return replace(
        seen,
        frames=0 if tap else None,
        master=tap.master if tap else None,
        bridge_up=bool(bridge and bridge.up),
        way=way,
    )


async def _from_here(target: str, port: int) -> Outcome:
    """The same asked by the host itself."""
    try:
        async with asyncio.timeout(PATIENCE):
            _, writer = await asyncio.open_connection(target, port)
    except TimeoutError:
        return "silence"
    except ConnectionRefusedError:
        return "refused"
    except OSError:
        return "unreachable"
    writer.close()
    with suppress(OSError):
        await writer.wait_closed()
    return "open"


def _outcome(status: int, said: str) -> Outcome:
    words = said.lower()
    if status == 0:
        return "open"
    if "refused" in words:
        return "refused"
    return "unreachable" if "unreachable" in words or "no route" in words else "silence"


async def _run(agent: Agent, script: str, *words: str) -> tuple[int, str]:
    ended, output, _ = await capture(agent, ["sh", "-c", script, "sh", *words], timeout=4 * PATIENCE)
    return ended.status, output.decode(errors="replace")


async def _shell(agent: Agent, script: str, *words: str) -> str:
    try:
        return (await _run(agent, script, *words))[1]
    except InnkeeperError:
        return ""
