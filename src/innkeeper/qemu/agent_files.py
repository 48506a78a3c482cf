"""Copies files into and out of the guest through its agent.

Blocks travel as base64 in JSON, one after the other; the next one is always under way while this one is worked on.
"""

from __future__ import annotations

import asyncio
import base64
import posixpath
import secrets
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import aclosing, suppress
from typing import Any

from innkeeper.base.errors import AgentFailed, AgentUnavailable, InvalidInput
from innkeeper.base.units import MIB
from innkeeper.qemu.agent import Agent, open_file, read_ahead, shaped
from innkeeper.qemu.agent_exec import capture

BLOCK = 1 * MIB
"""Bytes per message. More is not faster, and the agent answers nobody else meanwhile."""

AHEAD = 2
"""Blocks on their way into the guest at once."""

# $1 the staged file, $2 the target. New and ours alone (O_EXCL, 0600): the agent by itself would make it 0666.
_STAGE = r"""
if [ -d "$2" ]; then echo "$2 is a folder" >&2; exit 1; fi
umask 077; set -C; : >"$1"
"""
# $3 the mode.
_PUBLISH = r"""chmod "$3" "$1" && mv -f "$1" "$2" """


async def write_file(agent: Agent, path: str, chunks: AsyncIterator[bytes], mode: int = 0o644) -> int:
    """Writes a file in the guest, whole or not at all (a staged name beside it, then a rename), permissions `mode`.

    Returns the bytes written. A symbolic link at `path` is replaced. On a guest without a shell the file is written in
    place and `mode` has no effect. Raises as `Agent`; `InvalidInput` if `path` is not absolute.
    """
    _check(path)
    folder, name = posixpath.split(path)
    staged = posixpath.join(folder, f".{name[:100]}.{secrets.token_hex(8)}.part")
    if not await _shell(agent, _STAGE, staged, path):
        return await _fill(agent, path, chunks)
    try:
        count = await _fill(agent, staged, chunks)
        await _shell(agent, _PUBLISH, staged, path, f"{mode & 0o7777:o}")
        return count
    except BaseException:
        removal = asyncio.create_task(_shell(agent, 'rm -f "$1"', staged))
        with suppress(AgentFailed, AgentUnavailable):
            await asyncio.shield(removal)
        raise


async def read_file(agent: Agent, path: str) -> AsyncGenerator[bytes, None]:
    """The bytes of a file in the guest; for files, not for pipes, whose data the agent may lose.

    Use it under `contextlib.aclosing` if you may stop early. Raises as `Agent`; `InvalidInput` for a relative path.
    """
    _check(path)
    handle = await open_file(agent, path, "r")
    try:
        async with aclosing(read_ahead(agent, handle, BLOCK)) as blocks:
            async for data in blocks:
                yield data
    finally:
        await _close(agent, handle, [])


async def _fill(agent: Agent, path: str, chunks: AsyncIterator[bytes]) -> int:
    handle = await open_file(agent, path, "w")
    count = 0
    try:
        # One at a time: over virtio-serial a second block on its way while the first is answered stalls the channel.
        async for block in _blocks(chunks):
            await _write_block(agent, handle, block)
            count += len(block)
        await agent.call("guest-file-flush", {"handle": handle})  # "no space left" is told here, not by close
    finally:
        await _close(agent, handle, ())
    return count


async def _blocks(chunks: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    """The same bytes in blocks of one size."""
    buffer = bytearray()
    async for chunk in chunks:
        buffer += chunk
        while len(buffer) >= BLOCK:
            yield bytes(buffer[:BLOCK])
            del buffer[:BLOCK]
    if buffer:
        yield bytes(buffer)


async def _write_block(agent: Agent, handle: int, block: bytes) -> None:
    command = "guest-file-write"
    arguments: dict[str, object] = {"handle": handle, "buf-b64": base64.b64encode(block).decode()}
    answer = shaped(await agent.call(command, arguments), dict, command)
    if answer.get("count") != len(block):
        raise AgentFailed(
            f"{command}: the guest wrote {answer.get('count')!r} of {len(block)} bytes: is its disk full?"
        )


async def _close(agent: Agent, handle: int, pending: Sequence[asyncio.Task[Any]]) -> None:
    """Closes a handle, also when the caller was cancelled or the file could not be written."""
    for task in pending:
        task.cancel()
    await asyncio.gather(*pending, return_exceptions=True)
    closing = asyncio.create_task(agent.call("guest-file-close", {"handle": handle}))
    with suppress(AgentFailed, AgentUnavailable):
        await asyncio.shield(closing)


async def _shell(agent: Agent, script: str, *words: str) -> bool:
    """Runs a script with positional words; False if the guest has no shell. `AgentFailed` with its complaint."""
    if agent.launchers == [()]:
        return False
    try:
        end, _, complaint = await capture(agent, ["sh", "-c", script, "sh", *words])
    except AgentFailed as error:
        if "Failed to execute" not in error.detail:
            raise
        return False
    if end.status != 0:
        raise AgentFailed(complaint.decode(errors="replace").strip()[:1000] or f"sh ended with {end.status}")
    return True


def _check(path: str) -> None:
    windows = len(path) > 2 and path[1] == ":" and path[2] in "\\/"
    if not (path.startswith("/") or windows) or "\0" in path or path.endswith("/"):
        raise InvalidInput(f"{path!r} is not the absolute path of a file in the guest", field="path")
