"""Our two nftables tables: changed by transactions, looked at whether somebody has changed them."""

from __future__ import annotations

import asyncio
import json
import re
import secrets
from collections import deque
from collections.abc import AsyncIterator, Iterable, Sequence
from contextlib import asynccontextmanager

from innkeeper.base.child import start_child
from innkeeper.base.errors import NetworkFailed, ToolMissing
from innkeeper.host.gather import find_tool
from innkeeper.plan import denials, sender
from innkeeper.plan.filter import BOTH, DENIALS
from innkeeper.plan.network import MACVTAP
from innkeeper.plan.nft import NAME, Command
from innkeeper.plan.ruleset import TABLES, counts, objects

CHECK = "innkeeper-check-"
"""What the names of tables begin with that are there for one `inn network check`."""
MOST_LINES = 1000
"""Of a trace: some dozens per packet."""
_OWN: deque[int] = deque(maxlen=1000)
"""Pids of the programs that were run here of late."""
PACKAGES = {"nft": "nftables", "dnsmasq": "dnsmasq-base", "conntrack": "conntrack"}


async def apply(commands: Sequence[Command]) -> None:
    """All of these or none. Raises `NetworkFailed`."""
    status, _, wrong = await _run("nft", "-j", "-f", "-", feed=json.dumps({"nftables": list(commands)}).encode())
    if status:
        raise NetworkFailed(f"nft refused a change of the firewall: {wrong.strip()[-1000:]}")


def is_own(pid: int) -> bool:
    """Whether a change of nftables by this process was one of ours."""
    return pid in _OWN


async def is_whole(commands: Sequence[Command]) -> bool:
    """Whether what these commands make is there, and nothing of ours besides."""
    listed = await _listed()
    # in a thread: with a thousand VMs there are megabytes to compare
    return await asyncio.to_thread(lambda: objects(commands) == objects(listed))


async def has(commands: Sequence[Command], table: tuple[str, str]) -> bool:
    """Whether what these commands make in one table is there."""
    return objects(commands) <= objects(await _listed([table]))


async def tables(family: str, prefix: str) -> set[str]:
    """Names of a family's tables that begin so."""
    _, text, _ = await _run("nft", "-j", "list", "tables", family)
    found = [entry["table"]["name"] for entry in json.loads(text or "{}").get("nftables", ()) if "table" in entry]
    return {name for name in found if name.startswith(prefix)}


async def packets(table: tuple[str, str], name: str) -> int:
    """Packets of one named counter; 0 where it is not there."""
    found = [command["counter"] for command in await _listed([table]) if "counter" in command]
    return next((int(counter["packets"]) for counter in found if counter["name"] == name), 0)


async def dropped() -> dict[str, int]:
    """Packets of each NIC, by its tap, that it had no right to send, within a day."""
    return sender.refused(await _list("set", sender.REFUSED))


async def counted(tap: str) -> dict[str, tuple[int, int]]:
    """(packets, bytes) that each of a card's rules has judged since they were made, by its comment (plan/filter.py)."""
    found: list[Command] = []
    for direction in BOTH:
        found += await _list("chain", f"{tap}-{direction}")
    return denials.counted(found)


async def attempts() -> dict[str, list[denials.Attempt]]:
    """What rules have denied, by tap, the latest first."""
    return denials.attempts([command for name in DENIALS for command in await _list("set", name)])


async def _list(kind: str, name: str) -> list[Command]:
    status, text, _ = await _run("nft", "-j", "list", kind, "bridge", NAME, name)
    found: list[Command] = json.loads(text)["nftables"] if status == 0 else []
    return found


async def connections(protocol: str, source: str, target: str, port: int) -> list[str]:
    """What the kernel keeps of connections from `source` to a port of `target`, as conntrack(8) writes it."""
    family = "ipv6" if ":" in target else "ipv4"
    wanted = ("-s", source, "-d", target, "--orig-port-dst", str(port))
    _, text, _ = await _run("conntrack", "-L", "-f", family, "-p", protocol, *wanted)
    return [line for line in text.splitlines() if line.startswith(protocol)]


async def published() -> dict[tuple[str, str, int], tuple[int, int]]:
    """(tap, protocol, host port) → (packets, bytes) that came for a published port, since its rules were made."""
    return counts(await _listed(TABLES[1:]))


async def end_connections(protocol: str, port: int, address: str) -> None:
    """Forget the connections that came for a published port to `address`: their next packets lead nowhere."""
    # conntrack ends with 1 where there was none
    family = "ipv6" if ":" in address else "ipv4"
    await _run("conntrack", "-D", "-f", family, "-p", protocol, "--orig-port-dst", str(port), "--reply-src", address)


@asynccontextmanager
async def traced(tap: str, protocol: str, target: str, port: int) -> AsyncIterator[list[str]]:
    """Meanwhile the list gets what nftables did with each packet that a tap's guest sends to a port: `nft monitor
    trace`, by a table of its own that marks them before any other looks at them."""
    need("nft")
    name, lines = f"{CHECK}{secrets.token_hex(4)}", list[str]()
    version, field = ("ip6", "daddr") if ":" in target else ("ip", "daddr")
    table = {"family": "bridge", "name": name}
    chain = {"family": "bridge", "table": name, "name": "mark"}
    expressions: list[Command] = [
        {"match": {"op": "==", "left": {"meta": {"key": "iifname"}}, "right": tap}},
        {"match": {"op": "==", "left": {"payload": {"protocol": version, "field": field}}, "right": target}},
        {"match": {"op": "==", "left": {"payload": {"protocol": protocol, "field": "dport"}}, "right": port}},
        {"mangle": {"key": {"meta": {"key": "nftrace"}}, "value": 1}},
    ]
    base = {"type": "filter", "hook": "prerouting", "prio": -400, "policy": "accept"}
    rule = {"rule": {"family": "bridge", "table": name, "chain": "mark", "expr": expressions}}
    monitor = await start_child(str(find_tool("nft")), "monitor", "trace", stdout=asyncio.subprocess.PIPE)
    reader = asyncio.create_task(_read(monitor.stdout, lines))
    try:
        await apply([{"add": {"table": table}}, {"add": {"chain": chain | base}}, {"add": rule}])
        yield lines
    finally:
        if monitor.returncode is None:
            monitor.kill()
        await monitor.wait()
        reader.cancel()
        await apply([{"add": {"table": table}}, {"delete": {"table": table}}])


async def _read(stream: asyncio.StreamReader | None, lines: list[str]) -> None:
    while stream is not None and (line := await stream.readline()):
        if len(lines) < MOST_LINES:
            lines.append(line.decode(errors="replace").strip())


async def sweep() -> None:
    """Remove what a check has left whose daemon was killed."""
    _, text, _ = await _run("nft", "-j", "list", "tables")
    for entry in json.loads(text or '{"nftables": []}')["nftables"]:
        if entry.get("table", {}).get("name", "").startswith(CHECK):
            table = {"family": entry["table"]["family"], "name": entry["table"]["name"]}
            await apply([{"delete": {"table": table}}])


def need(*tools: str) -> None:
    """Raise `ToolMissing` for a program that is not installed."""
    for tool in tools:
        if find_tool(tool) is None:
            package = PACKAGES[tool]
            raise ToolMissing(f"{tool} is not installed", hint=f"apt install {package}", package=package)


async def of_others(*, lines: bool) -> tuple[list[Command], dict[tuple[str, str, int], str]]:
    """Other programs' tables, and with `lines` their rules as nft writes them, by family, table and handle."""
    _, text, _ = await _run("nft", "-j", "list", "tables")
    tables = [entry["table"] for entry in json.loads(text or '{"nftables": []}')["nftables"] if "table" in entry]
    found: list[Command] = []
    words: dict[tuple[str, str, int], str] = {}
    for family, name in ((table["family"], table["name"]) for table in tables):
        if (family, name) in TABLES or name.startswith((CHECK, MACVTAP)):
            continue
        status, text, _ = await _run("nft", "-j", "list", "table", family, name)
        found += json.loads(text)["nftables"] if status == 0 else []
        if lines:
            _, text, _ = await _run("nft", "-a", "list", "table", family, name)
            for line, handle in re.findall(r"^\s*(.+?) # handle (\d+)$", text, re.MULTILINE):
                words[family, name, int(handle)] = line
    return found, words


async def _listed(tables: Iterable[tuple[str, str]] = TABLES) -> list[Command]:
    found: list[Command] = []
    for family, name in tables:
        status, text, _ = await _run("nft", "-j", "list", "table", family, name)
        if status == 0:
            found += (await asyncio.to_thread(json.loads, text))["nftables"]
    return found


async def _run(tool: str, *arguments: str, feed: bytes = b"") -> tuple[int, str, str]:
    need(tool)
    process = await start_child(
        str(find_tool(tool)),
        *arguments,
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        env={"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "LC_ALL": "C"},
    )
    _OWN.append(process.pid)
    try:
        output, wrong = await process.communicate(feed)
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    return process.returncode or 0, output.decode(errors="replace"), wrong.decode(errors="replace")
