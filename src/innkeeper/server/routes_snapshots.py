"""Snapshots of a VM: short-lived ways back. They lie beside the disks that they protect, so none is a backup."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Annotated

from fastapi import APIRouter, Path, Response
from fastapi.responses import JSONResponse

from innkeeper.base.clock import now, stamp
from innkeeper.base.errors import ActionRefused, InvalidInput
from innkeeper.operations.chains import layer_path
from innkeeper.operations.snapshot_create import arguments
from innkeeper.operations.snapshot_memory import check_fits, check_memory
from innkeeper.operations.snapshots import all_layers, check_new, find_snapshot, snapshots_of
from innkeeper.plan.snapshot import MOST_LAYERS, lineage
from innkeeper.server.context import Context, Ctx, VMName, accepted
from innkeeper.server.models import (
    OperationView,
    PruneRequest,
    RestoreRequest,
    SnapshotList,
    SnapshotRequest,
    SnapshotView,
)
from innkeeper.store.contract import Value

router = APIRouter(prefix="/v1/vms/{vm}", tags=["snapshots"])
SnapshotName = Annotated[str, Path(description="A snapshot's name or id", min_length=1, max_length=63)]


@router.get("/snapshots", response_model=SnapshotList, summary="A VM's snapshots, the oldest first")
async def list_snapshots(ctx: Ctx, vm: VMName) -> Response:
    found = await ctx.world.find("vm", vm)
    layers = await all_layers(ctx.world)
    snapshots = await snapshots_of(ctx.world, found["id"])
    present = {
        "at": next((s["name"] for s in snapshots if s["id"] == found.get("at")), None),
        "layers": max((len(lineage(layers, top)) for top in found["disks"]), default=0),
        "most_layers": MOST_LAYERS,
        "stored_size": sum(_stored(ctx, layers[top]) for top in found["disks"]),
    }
    shown = [_view(ctx, found, s, snapshots, layers) for s in snapshots if not s["passing"]]
    return JSONResponse({"snapshots": shown, "present": present})


@router.post("/snapshots", response_model=OperationView, status_code=202, summary="Take a snapshot of all disks")
async def create_snapshot(ctx: Ctx, vm: VMName, body: SnapshotRequest) -> Response:
    found = await ctx.admitted(vm, "snapshot")
    await check_new(ctx.world, found, body.name, memory=body.memory)
    if body.memory:
        await check_memory(ctx.world, found, quiesce=body.quiesce)
    args = arguments(
        name=body.name, note=body.note, expires=_expires(body.ttl), quiesce=body.quiesce, memory=body.memory
    )
    return await _submit(ctx, "snapshot-create", found, args)


@router.get("/snapshots/{snapshot}", response_model=SnapshotView, summary="One snapshot")
async def get_snapshot(ctx: Ctx, vm: VMName, snapshot: SnapshotName) -> Response:
    found = await ctx.world.find("vm", vm)
    one, all_of_it = await find_snapshot(ctx.world, found, snapshot), await snapshots_of(ctx.world, found["id"])
    view = _view(ctx, found, one, all_of_it, await all_layers(ctx.world))
    return JSONResponse(view | {"spec": one["spec"]})


@router.delete(
    "/snapshots/{snapshot}",
    response_model=OperationView,
    status_code=202,
    summary="Remove a snapshot, merge its layers",
)
async def delete_snapshot(ctx: Ctx, vm: VMName, snapshot: SnapshotName) -> Response:
    found = await ctx.world.find("vm", vm)
    one = await find_snapshot(ctx.world, found, snapshot)
    found = await ctx.admitted(vm, "snapshot")
    return await _submit(ctx, "snapshot-delete", found, {"snapshots": [one["id"]]})


@router.post(
    "/snapshots/{snapshot}/restore", response_model=OperationView, status_code=202, summary="Go back to a snapshot"
)
async def restore_snapshot(
    ctx: Ctx, vm: VMName, snapshot: SnapshotName, body: RestoreRequest | None = None
) -> Response:
    wish = body or RestoreRequest()
    found = await ctx.world.find("vm", vm)
    one = await find_snapshot(ctx.world, found, snapshot)
    found = await ctx.admitted(vm, "restore", force=wish.force or wish.start)
    if one["state"] != "whole":
        raise ActionRefused(
            f"snapshot {one['name']} is being removed", hint=f"inn snapshot prune {found['name']} finishes that"
        )
    memory = bool(one.get("memory")) and not wish.disks_only
    if wish.paused and not memory:
        raise InvalidInput(
            f"snapshot {one['name']} is gone back to without memory, so there is nothing to pause",
            hint="leave --paused out", field="paused",
        )  # fmt: skip
    if memory:
        await check_fits(ctx.world, one)
    args = {
        "snapshot": one["id"], "name": one["name"], "keep": wish.keep, "start": wish.start or memory,
        "expires": _expires(wish.ttl), "memory": memory, "paused": wish.paused,
    }  # fmt: skip
    return await _submit(ctx, "snapshot-restore", found, args)


@router.post(
    "/snapshots/{snapshot}/measure",
    response_model=OperationView,
    status_code=202,
    summary="Measure what its layers cost who reads through them",
)
async def measure_snapshot(ctx: Ctx, vm: VMName, snapshot: SnapshotName) -> Response:
    one = await find_snapshot(ctx.world, await ctx.world.find("vm", vm), snapshot)
    return await _submit(ctx, "snapshot-measure", await ctx.admitted(vm, "snapshot"), {"snapshot": one["id"]})


@router.post(
    "/prune", response_model=OperationView, status_code=202, summary="Remove expired snapshots, merge unneeded layers"
)
async def prune_snapshots(ctx: Ctx, vm: VMName, body: PruneRequest | None = None) -> Response:
    found = await ctx.admitted(vm, "snapshot")
    automatic = bool(body and body.automatic)
    ids = [
        s["id"]
        for s in await snapshots_of(ctx.world, found["id"])
        if (s["expires"] and s["expires"] <= now()) or (automatic and s["automatic"])
    ]
    return await _submit(ctx, "snapshot-delete", found, {"snapshots": ids})


async def _submit(ctx: Context, kind: str, vm: Value, args: Value) -> Response:
    target = {"kind": "vm", "id": vm["id"], "name": vm["name"]}
    return accepted(await ctx.engine.submit(kind, target, args, hold=f"vm/{vm['id']}"))


def _expires(ttl: float | None) -> str | None:
    return stamp(datetime.now(UTC) + timedelta(seconds=ttl)) if ttl is not None else None


def _view(ctx: Context, vm: Value, snapshot: Value, every: list[Value], layers: dict[str, Value]) -> Value:
    shown = ("id", "name", "created", "note", "expires", "automatic", "state", "taken", "quiesced")
    own = [layers[each] for each in snapshot["disks"] if each in layers]
    memory = snapshot.get("memory")
    return {key: snapshot[key] for key in shown} | {
        "vm": vm["name"],
        "parent": next((s["name"] for s in every if s["id"] == snapshot["parent"]), None),
        "here": vm.get("at") == snapshot["id"],
        "stored_size": sum(_stored(ctx, layer) for layer in own) + (memory or {}).get("size", 0),
        "memory": {key: memory[key] for key in ("size", "pause")} if memory else None,
        "layers": max((len(lineage(layers, layer["id"])) for layer in own), default=0),
        "nvram": snapshot["nvram"],
    }


def _stored(ctx: Context, layer: Value) -> int:
    try:
        return layer_path(ctx.world, layer).stat().st_blocks * 512
    except OSError:
        return 0
