"""Inside a guest: commands, files, the console and its log, the screen."""

from __future__ import annotations

import asyncio
import base64
import json
from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import Annotated

from fastapi import APIRouter, Query, Request, Response, WebSocket, WebSocketDisconnect
from fastapi.responses import StreamingResponse

from innkeeper.base.errors import InnkeeperError, InvalidInput
from innkeeper.machine import serial_log
from innkeeper.machine.console import Console
from innkeeper.qemu.agent_exec import Chunk, Exit, execute
from innkeeper.qemu.agent_files import read_file, write_file
from innkeeper.server.context import Context, Ctx, VMName
from innkeeper.server.models import ExecRequest

router = APIRouter(prefix="/v1/vms/{vm}", tags=["guest"])
GuestPath = Annotated[str, Query(description="Absolute path in the guest", pattern=r"^/[^\x00]*$", max_length=4096)]
NDJSON = "application/x-ndjson"


@router.post(
    "/exec",
    summary="Run a command through the guest agent; its output as it comes, then its status",
    response_class=StreamingResponse,
    responses={200: {"content": {NDJSON: {"schema": {"type": "string"}}}, "description": "One JSON object per line"}},
)
async def exec_in_guest(ctx: Ctx, vm: VMName, body: ExecRequest) -> Response:
    found, machine = await ctx.machine(vm, "exec")
    try:
        stdin = None if body.stdin is None else base64.b64decode(body.stdin, validate=True)
    except ValueError as error:  # binascii.Error is one; text that is not ASCII is another
        raise InvalidInput(f"stdin is not base64: {error}", field="stdin") from None
    if any("\0" in word for word in (*body.argv, *body.env, *body.env.values(), body.cwd or "")):
        raise InvalidInput("a command, its environment and its folder cannot hold a NUL character")
    secret = await ctx.world.store.get(f"secret/vm/{found['id']}")
    env = (secret.value["first_boot"]["env"] if secret else {}) | body.env
    async with machine.agent() as agent:
        # The first answer is awaited here, so that an absent agent is a status and not a broken stream.
        chunks = execute(
            agent, body.argv, env=env, stdin=stdin, stdin_path=body.stdin_path, cwd=body.cwd, timeout=body.timeout
        )
        first = await anext(chunks)

    async def stream() -> AsyncIterator[bytes]:
        yield _encoded(_line(first))
        try:
            async with machine.agent(), aclosing(chunks):
                async for chunk in chunks:
                    yield _encoded(_line(chunk))
        except InnkeeperError as error:
            yield _encoded({"error": error.document()})

    return StreamingResponse(stream(), media_type=NDJSON)


def _encoded(line: dict[str, object]) -> bytes:
    return json.dumps(line).encode() + b"\n"


def _line(chunk: Chunk | Exit) -> dict[str, object]:
    if isinstance(chunk, Chunk):
        return {chunk.stream: base64.b64encode(chunk.data).decode()}
    return {"signal": chunk.signal} if chunk.signal is not None else {"exit": chunk.status}


@router.get(
    "/files",
    summary="Read a file in the guest",
    response_class=StreamingResponse,
    responses={200: {"content": {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}}}},
)
async def read_guest_file(ctx: Ctx, vm: VMName, path: GuestPath) -> Response:
    _, machine = await ctx.machine(vm, "exec")
    async with machine.agent() as agent:
        blocks = read_file(agent, path)
        first = await anext(blocks, b"")  # so that a missing file is an error and not an empty one

    async def stream() -> AsyncIterator[bytes]:
        yield first
        async for block in blocks:
            yield block

    return StreamingResponse(stream(), media_type="application/octet-stream")


@router.put(
    "/files",
    summary="Write a file in the guest, whole or not at all",
    status_code=204,
    openapi_extra={
        "requestBody": {"content": {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}}}
    },
)
async def write_guest_file(
    ctx: Ctx,
    vm: VMName,
    path: GuestPath,
    request: Request,
    mode: Annotated[str, Query(pattern="^[0-7]{3,4}$", description="Permissions, octal")] = "644",
) -> Response:
    _, machine = await ctx.machine(vm, "exec")
    async with machine.agent() as agent:
        await write_file(agent, path, request.stream(), int(mode, 8))
    return Response(status_code=204)


@router.get(
    "/logs",
    summary="What the serial console printed, kept across restarts",
    response_class=StreamingResponse,
    responses={200: {"content": {"text/plain": {"schema": {"type": "string"}}}}},
)
async def logs(
    ctx: Ctx,
    vm: VMName,
    follow: Annotated[bool, Query(description="Go on with what it prints from now on")] = False,
    tail: Annotated[int | None, Query(ge=0, le=1_000_000, description="Only the last lines")] = None,
) -> Response:
    found = await ctx.world.find("vm", vm)
    path = ctx.world.home.vm(found["id"]) / "serial.log"
    return StreamingResponse(serial_log.read(path, tail=tail, follow=follow), media_type="text/plain; charset=utf-8")


@router.get(
    "/screenshot",
    summary="The screen, as PNG",
    response_class=Response,
    responses={200: {"content": {"image/png": {"schema": {"type": "string", "format": "binary"}}}}},
)
async def screenshot(ctx: Ctx, vm: VMName) -> Response:
    _, machine = await ctx.machine(vm, "screenshot")
    return Response(await machine.screenshot(), media_type="image/png")


@router.websocket("/console")
async def console(socket: WebSocket, ctx: Ctx, vm: VMName) -> None:
    """The serial console, both ways, as binary messages. Closes with 1000 when the guest ends."""
    try:
        found, _ = await ctx.machine(vm, "console")
        shared = _shared(ctx, found["id"])
        async with shared.view() as output:
            await socket.accept()
            typing = asyncio.create_task(_type(socket, shared))
            try:
                while not typing.done():
                    reading = asyncio.create_task(output.get())
                    await asyncio.wait({reading, typing}, return_when=asyncio.FIRST_COMPLETED)
                    if not reading.done():
                        reading.cancel()
                        break
                    if (block := reading.result()) is None:
                        await socket.close(1000, "the guest has ended")
                        break
                    await socket.send_bytes(block)
            finally:
                typing.cancel()
    except (InnkeeperError, OSError) as error:
        await socket.close(4409, str(error)[:120])
    except WebSocketDisconnect:
        return


async def _type(socket: WebSocket, shared: Console) -> None:
    while True:
        message = await socket.receive()
        if message["type"] == "websocket.disconnect":
            return
        await shared.type(message.get("bytes") or (message.get("text") or "").encode())


def _shared(ctx: Context, vm_id: str) -> Console:
    for old in [key for key in ctx.consoles if ctx.world.machines.get(key) is None]:
        del ctx.consoles[old]
    return ctx.consoles.setdefault(vm_id, Console(ctx.world.home.vm(vm_id)))
