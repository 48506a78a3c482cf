"""Our two nftables tables: changed by transactions, looked at whether somebody has changed them."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Sequence

from innkeeper.base.child import start_child
from innkeeper.base.errors import NetworkFailed, ToolMissing
from innkeeper.host.gather import find_tool
from innkeeper.plan.ruleset import TABLES, Command, objects

PACKAGES = {"nft": "nftables", "dnsmasq": "dnsmasq-base", "conntrack": "conntrack"}


async def apply(commands: Sequence[Command]) -> None:
    """All of these or none. Raises `NetworkFailed`."""
    status, _, wrong = await _run("nft", "-j", "-f", "-", feed=json.dumps({"nftables": list(commands)}).encode())
    if status:
        raise NetworkFailed(f"nft refused a change of the firewall: {wrong.strip()[-1000:]}")


async def is_whole(commands: Sequence[Command]) -> bool:
    """Whether what these commands make is there, and nothing of ours besides."""
    return objects(commands) == objects(await _listed())


async def dropped() -> dict[str, int]:
    """Packets of each NIC, by its tap, that it had no right to send."""
    found = [command["counter"] for command in await _listed() if "counter" in command]
    return {counter["name"]: int(counter["packets"]) for counter in found}


async def end_connections(protocol: str, port: int, address: str) -> None:
    """Forget the connections that came for a published port to `address`: their next packets lead nowhere."""
    # conntrack ends with 1 where there was none
    await _run("conntrack", "-D", "-p", protocol, "--orig-port-dst", str(port), "--reply-src", address)


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
        if (family, name) in TABLES:
            continue
        status, text, _ = await _run("nft", "-j", "list", "table", family, name)
        found += json.loads(text)["nftables"] if status == 0 else []
        if lines:
            _, text, _ = await _run("nft", "-a", "list", "table", family, name)
            for line, handle in re.findall(r"^\s*(.+?) # handle (\d+)$", text, re.MULTILINE):
                words[family, name, int(handle)] = line
    return found, words


async def _listed() -> list[Command]:
    found: list[Command] = []
    for family, name in TABLES:
        status, text, _ = await _run("nft", "-j", "list", "table", family, name)
        if status == 0:
            found += json.loads(text)["nftables"]
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
    try:
        output, wrong = await process.communicate(feed)
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    return process.returncode or 0, output.decode(errors="replace"), wrong.decode(errors="replace")
