"""The host, operations and events."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import AsyncIterator
from typing import Annotated, Literal

from fastapi import APIRouter, Path, Query, Response
from fastapi.responses import JSONResponse, StreamingResponse
from pydantic import JsonValue

from innkeeper import __version__
from innkeeper.machine.states import LIVE
from innkeeper.server.context import Ctx, accepted
from innkeeper.server.models import EventView, OperationView, VersionView

router = APIRouter(prefix="/v1", tags=["host"])
OperationId = Annotated[str, Path(description="An operation's id", min_length=1, max_length=63)]
State = Literal["running", "undoing", "done", "failed", "cancelled"]


@router.get("/version", response_model=VersionView, summary="Which daemon answers")
async def version(ctx: Ctx) -> Response:
    return JSONResponse(
        {"version": __version__, "pid": os.getpid(), "started": ctx.started, "home": str(ctx.world.home.data)}
    )


@router.get("/host", response_model=dict[str, JsonValue], summary="Facts, the accelerator and why, capacity")
async def host(ctx: Ctx) -> Response:
    facts = await ctx.world.host()
    vms = await ctx.world.vms()
    live = [vm for vm in vms if vm["state"] in LIVE]
    pool = shutil.disk_usage(ctx.world.home.pool)
    used = (await ctx.views.used()).values()
    capacity = {
        "memory_total": facts.memory.total,
        "memory_available": facts.memory.available,
        "memory_promised": sum(vm["spec"]["memory"] for vm in live),
        "memory_private": sum(each.private for each in used),
        "memory_shared": sum(each.shared for each in used),
        "vcpus": facts.cpu.threads,
        "vcpus_promised": sum(vm["spec"]["cpus"] for vm in live),
        "pool": str(ctx.world.home.pool),
        "pool_total": pool.total,
        "pool_free": pool.free,
        "pool_promised": sum(disk["size"] or 0 for vm in vms for disk in vm["spec"]["disks"]),
        "vms": len(vms),
        "vms_running": len(live),
    }
    return JSONResponse(facts.model_dump(mode="json") | {"capacity": capacity})


@router.get("/operations", response_model=list[OperationView], summary="Operations, newest first")
async def list_operations(
    ctx: Ctx,
    state: Annotated[State | None, Query(description="Only those in this state")] = None,
    target: Annotated[str | None, Query(description="Only those on the VM or image of this name or id")] = None,
) -> Response:
    operations = await ctx.engine.list()
    return JSONResponse(
        [
            operation
            for operation in operations
            if (state is None or operation["state"] == state)
            and (target is None or target in (operation["target"]["name"], operation["target"]["id"]))
        ]
    )


@router.get("/operations/{operation}", response_model=OperationView, summary="One operation; can wait for news of it")
async def get_operation(
    ctx: Ctx,
    operation: OperationId,
    after: Annotated[int, Query(ge=0, le=2**53, description="Wait for a revision above this")] = 0,
    wait: Annotated[float, Query(ge=0, le=30, description="Seconds to wait at most")] = 0,
    to_its_end: Annotated[bool, Query(description="Only its end is news")] = False,
) -> Response:
    if not wait:
        return JSONResponse(await ctx.engine.get(operation))
    found = await ctx.engine.wait(operation, after, wait, to_its_end=to_its_end)
    return JSONResponse(found)


@router.post("/operations/{operation}/cancel", response_model=OperationView, status_code=202, summary="Stop and undo")
async def cancel_operation(ctx: Ctx, operation: OperationId) -> Response:
    return accepted(await ctx.engine.cancel(operation))


@router.get(
    "/events",
    response_model=list[EventView],
    responses={200: {"content": {"text/event-stream": {"schema": {"type": "string"}}}}},
    summary="What happened; with follow, what happens",
)
async def events(
    ctx: Ctx,
    follow: Annotated[bool, Query(description="A stream of server-sent events instead of a list")] = False,
    after: Annotated[int | None, Query(ge=0, le=2**53, description="Only events after this sequence number")] = None,
    tail: Annotated[int | None, Query(ge=0, le=10000, description="Only the last so many")] = None,
) -> Response:
    if not follow:
        return JSONResponse(await ctx.world.events.list(after or 0, tail))

    async def stream() -> AsyncIterator[str]:
        yield ": events\n\n"  # headers go out at once, so that a client knows it is connected
        async for event in ctx.world.events.follow(after, tail or 0):
            yield f"id: {event['seq']}\ndata: {json.dumps(event)}\n\n"

    return StreamingResponse(stream(), media_type="text/event-stream")
