"""Runs operations: named steps with `do` and `undo`, journalled in the store before they run."""

from __future__ import annotations

import asyncio
import builtins
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from time import monotonic
from typing import Any

import structlog

from innkeeper.base.clock import now
from innkeeper.base.errors import (
    ActionRefused,
    Cancelled,
    Conflict,
    InnkeeperError,
    MachineBusy,
    NotFound,
    StoreFailed,
    Unsupported,
)
from innkeeper.base.ids import new_id
from innkeeper.operations.fault import Fault, Faults
from innkeeper.operations.world import World
from innkeeper.store.contract import Value

log = structlog.get_logger()

PROGRESS_EVERY = 0.4
"""Seconds between two progress reports that reach the store."""
KEPT = 500
"""Ended operations kept."""
STORE_RETRY = 1.0
"""Seconds between two attempts at a store that fails."""
UNDO_ATTEMPTS, UNDO_PAUSE = 3, 0.2
"""How often an undo is tried before what it should have undone is named in the error; seconds between, growing."""

Action = Callable[["Context"], Awaitable[None]]


async def _nothing(ctx: Context) -> None:
    """Undo of a step that leaves nothing behind."""


def _never(ctx: Context) -> bool:
    return False


def always(ctx: Context) -> bool:
    """For `Step.unsynced`."""
    return True


@dataclass(frozen=True)
class Step:
    """One step. `do` and `undo` must tolerate being run twice, and `undo` a `do` that stopped half-way."""

    name: str
    do: Action
    undo: Action = _nothing
    keep: bool = False
    idle: Callable[[Context], bool] = _never
    """Whether there is nothing to do this time: that is not worth a line in the journal, which costs a sync."""
    unsynced: Callable[[Context], bool] = _never
    """Whether its line in the journal may be lost with the host's power, and with it what the store was told since the
    last sync: the operation then goes on from an earlier line, or has never been asked for. So it is where a step
    changes only the store, or what goes with the power (processes, links), or what the next daemon sweeps (the folder
    of a VM that no document speaks of), and where it syncs before it changes anything else."""


@dataclass(frozen=True)
class Verb:
    """An operation's kind, its steps in order, and whether a person may cancel it."""

    kind: str
    steps: tuple[Step, ...]
    cancellable: bool = True


@dataclass
class Context:
    """What a step sees. `data` is journalled after each step, and by `save` in the middle of one."""

    world: World
    operation: str
    kind: str
    target: dict[str, Any]
    args: dict[str, Any]
    data: dict[str, Any]
    result: dict[str, Any]
    save: Callable[..., Awaitable[None]]
    report: Callable[[float | None, str], None]
    """Progress of this step: a fraction of 0..1 or None, and a few words."""


class Engine:
    """Submits, runs, cancels and recovers operations of the given verbs."""

    def __init__(self, world: World, verbs: Mapping[str, Verb], fault: Fault | Faults | None = None) -> None:
        self._world = world
        self._store = world.store
        self._verbs = verbs
        self._fault = fault or Faults()
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._cancelled: set[str] = set()
        self._leaving = False
        self._reports: set[asyncio.Task[None]] = set()
        self._interruptible: set[str] = set()
        """Operations that are in a `do`: never an undo or an end, which a cancel must not break off."""

    # --- what the API calls ---

    async def submit(self, kind: str, target: dict[str, Any], args: dict[str, Any], hold: str | None = None) -> Value:
        """Journal a new operation and start it. `hold` is the key of a document that it keeps for itself: its
        `operation` field is set, and cleared when the operation ends. Raises `MachineBusy` when another has it."""
        verb = self._verbs[kind]
        operation_id = new_id()
        operation: Value = {
            "id": operation_id, "kind": kind, "target": target, "args": args, "hold": hold, "state": "running",
            "steps": [step.name for step in verb.steps], "index": 0, "data": {}, "result": {},
            "progress": {"fraction": None, "text": ""}, "error": None, "cancel_requested": False,
            "created": now(), "updated": now(), "ended": None,
        }  # fmt: skip
        writes: dict[str, Value | None] = {_key(operation_id): operation}
        checks = {_key(operation_id): 0}
        if hold:
            held = await self._store.get(hold)
            if held is None:
                raise NotFound(f"{target['kind']} {target['name']!r} is gone")
            if other := held.value.get("operation"):
                raise busy(target["name"], other)
            writes[hold] = held.value | {"operation": {"id": operation_id, "kind": kind}}
            checks[hold] = held.revision
        ctx = self._context(operation)
        first = next(step for step in verb.steps if not step.idle(ctx))
        try:
            await self._store.transact(writes, checks, synced=not first.unsynced(ctx))
        except Conflict:
            return await self.submit(kind, target, args, hold)
        self._start(operation_id)
        return await self.get(operation_id)

    async def nothing(self, kind: str, target: dict[str, Any], why: str) -> Value:
        """An operation that had nothing to do: not journalled, ended already."""
        stamp = now()
        return {
            "id": "none", "revision": self._store.revision, "kind": kind, "target": target, "state": "done",
            "steps": [], "step": "", "progress": {"fraction": 1.0, "text": why}, "error": None, "result": {},
            "cancel_requested": False, "created": stamp, "updated": stamp, "ended": stamp,
        }  # fmt: skip

    async def give_way(self, operation: str) -> None:
        """Have an operation out of the way of a forced one: cancelled where that is possible, awaited to its end."""
        with suppress(ActionRefused):
            await self.cancel(operation)
        while not (view := await self.get(operation))["ended"]:
            await self.wait(operation, view["revision"], 30)

    async def get(self, operation: str) -> Value:
        """The operation as the API shows it. Raises `NotFound`."""
        document = await self._store.get(_key(operation))
        if document is None:
            raise NotFound(f"there is no operation {operation!r}", hint="inn op ls shows the recent ones")
        return _view(document.value, document.revision)

    async def list(self) -> list[Value]:
        """All operations, newest first."""
        documents = await self._store.list("operation/")
        return sorted((_view(d.value, d.revision) for d in documents), key=lambda o: str(o["created"]), reverse=True)

    async def wait(self, operation: str, after: int, seconds: float, *, to_its_end: bool = False) -> Value:
        """The operation as soon as it has ended or, unless `to_its_end`, its revision is above `after`; as it is after
        `seconds`."""
        try:
            async with asyncio.timeout(seconds):
                while True:
                    revision = self._store.revision
                    view = await self.get(operation)
                    if view["ended"] or (view["revision"] > after and not to_its_end):
                        return view
                    async for _ in self._store.watch(_key(operation), revision):
                        break
        except (TimeoutError, Conflict):
            return await self.get(operation)

    async def cancel(self, operation: str) -> Value:
        """Ask for an end: the step at hand is interrupted and what was done is undone."""
        view = await self.get(operation)
        if view["ended"]:
            raise ActionRefused(f"operation {operation} has ended already ({view['state']})")
        if not self._verbs[view["kind"]].cancellable:
            raise ActionRefused(f"{view['kind']} cannot be undone half-way, so it cannot be cancelled")
        if view["state"] == "running" and operation not in self._cancelled:
            self._cancelled.add(operation)
            try:
                await self._change(operation, {"cancel_requested": True})
            except BaseException:
                self._cancelled.discard(operation)
                raise
            task = self._tasks.get(operation)
            if task is not None and operation in self._interruptible:  # it may have ended while that was written
                task.cancel()
        return await self.get(operation)

    # --- the daemon's life ---

    async def recover(self) -> builtins.list[str]:
        """Go on with what a daemon before this one left. Returns the ids."""
        left = [d.value for d in await self._store.list("operation/") if not d.value["ended"]]
        for journal in left:
            if journal["kind"] in self._verbs:
                self._start(journal["id"])
                continue
            unknown = Unsupported(f"{journal['kind']} is not an operation of this version", hint="upgrade Innkeeper")
            end = {"state": "failed", "error": unknown.document(), "ended": now()}
            await self._change(journal["id"], end, release=True)
        return [journal["id"] for journal in left]

    async def stop(self) -> None:
        """Interrupt what runs, without undoing: the next daemon goes on with it."""
        self._leaving = True
        tasks, self._tasks = list(self._tasks.values()), {}
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, *self._reports, return_exceptions=True)

    # --- running ---

    def _start(self, operation: str) -> None:
        task = asyncio.create_task(self._run(operation), name=f"operation {operation}")
        self._tasks[operation] = task
        task.add_done_callback(lambda _: self._tasks.pop(operation, None))

    async def _run(self, operation: str) -> None:
        document = await self._store.get(_key(operation))
        assert document is not None
        journal = document.value
        verb = self._verbs[journal["kind"]]
        ctx = self._context(journal)
        index, error = journal["index"], journal["error"]
        if journal["state"] == "running":
            if journal["cancel_requested"]:
                error = _cancelled(verb, ctx)
            else:
                index, error = await self._forward(ctx, verb, index)
            if error is None:
                await self._end(ctx, "done", None)
                return
            if index < len(verb.steps) and verb.steps[index].keep and error["code"] != "cancelled":
                await self._end(ctx, "failed", error)
                return
            await self._persist(ctx, {"state": "undoing", "error": error})
        left = [step.name for step in reversed(verb.steps[: index + 1]) if not await self._undo(ctx, verb, step)]
        if left:
            error = error | {"facts": error["facts"] | {"not_undone": left}}
        await self._end(ctx, "cancelled" if error["code"] == "cancelled" else "failed", error)

    async def _forward(self, ctx: Context, verb: Verb, index: int) -> tuple[int, Value | None]:
        """Do the steps from `index` on. Returns the step it came to, and why it went no further if it did not."""
        self._interruptible.add(ctx.operation)
        journalled = index
        try:
            while index < len(verb.steps):
                if ctx.operation in self._cancelled:
                    return index, _cancelled(verb, ctx)
                await self._do(ctx, verb, index, journalled=index == journalled)
                index += 1
        except asyncio.CancelledError:
            if self._leaving:
                raise
            if ctx.operation in self._cancelled:
                if task := asyncio.current_task():
                    task.uncancel()  # it was heeded: the undoing is not cancelled
                return index, _cancelled(verb, ctx)
            return index, _problem(RuntimeError("something that the step waited for was cancelled"))
        except Exception as failure:
            return index, _problem(failure)
        finally:
            self._interruptible.discard(ctx.operation)
        return index, None

    async def _undo(self, ctx: Context, verb: Verb, step: Step) -> bool:
        """Undo one step: as often as only the store is in the way, else `UNDO_ATTEMPTS` times. False for «in vain»."""
        attempt = 1
        while True:
            try:
                again = await self._fault(verb.kind, step.name, "undo")
                await step.undo(ctx)
                if again:
                    await step.undo(ctx)
                return True
            except StoreFailed as error:
                log.error("the store fails while undoing; trying again", step=step.name, error=str(error))
                await asyncio.sleep(STORE_RETRY)
            except Exception:
                log.exception("undo failed", operation=ctx.operation, step=step.name, attempt=attempt)
                if attempt == UNDO_ATTEMPTS:
                    return False
                await asyncio.sleep(UNDO_PAUSE * attempt)
                attempt += 1

    async def _do(self, ctx: Context, verb: Verb, index: int, *, journalled: bool) -> None:
        step = verb.steps[index]
        if not journalled and not step.idle(ctx):
            progress = {"fraction": None, "text": ""}
            done = {"data": ctx.data, "result": ctx.result, "target": ctx.target}
            await self._change(
                ctx.operation, {"index": index, "progress": progress} | done, synced=not step.unsynced(ctx)
            )
        again = await self._fault(verb.kind, step.name, "before")
        await step.do(ctx)
        if again:
            await step.do(ctx)
        await self._fault(verb.kind, step.name, "after")

    def _context(self, journal: Value) -> Context:
        operation = journal["id"]
        last = 0.0

        def report(fraction: float | None, text: str) -> None:
            nonlocal last
            if monotonic() - last < PROGRESS_EVERY:
                return
            last = monotonic()
            task = asyncio.ensure_future(
                self._try_change(operation, {"progress": {"fraction": fraction, "text": text}})
            )
            self._reports.add(task)
            task.add_done_callback(self._reports.discard)

        async def save(*, synced: bool = True) -> None:
            hold = ctx.data.get("hold", journal["hold"])
            await self._change(operation, {"data": ctx.data, "target": ctx.target, "hold": hold}, synced=synced)

        ctx = Context(
            self._world, operation, journal["kind"], dict(journal["target"]), journal["args"], dict(journal["data"]),
            dict(journal["result"]), save, report,
        )  # fmt: skip
        return ctx

    async def _end(self, ctx: Context, state: str, error: Value | None) -> None:
        """Record the end and let go of what was held, in one transaction; what comes after is a courtesy.

        The arguments may hold secrets (a VM's user-data), and nobody needs them any more."""
        await self._persist(ctx, {"state": state, "error": error, "ended": now(), "args": {}}, release=True)
        self._cancelled.discard(ctx.operation)
        if error and state == "failed":
            await self._world.events.append(
                "operation.failed", f"{ctx.kind} of {ctx.target['name']} failed: {error['detail']}",
                target=ctx.target, level="error", operation=ctx.operation,
            )  # fmt: skip
        try:
            await self._forget_old()
        except InnkeeperError as failure:
            log.warning("old operations were not forgotten", error=str(failure))

    async def _persist(self, ctx: Context, fields: Value, release: bool = False) -> None:
        """Write the journal, waiting for the store as long as it takes: an end must not be lost."""
        fields = fields | {"data": ctx.data, "target": ctx.target, "result": ctx.result}
        while True:
            try:
                await self._change(ctx.operation, fields, release)
                return
            except StoreFailed as error:
                log.error("the journal cannot be written; trying again", error=str(error))
                await asyncio.sleep(STORE_RETRY)
            except (TypeError, ValueError):
                # A step left something that is not JSON: a bug, and no reason to hold a VM for ever.
                log.exception("what a step left cannot be journalled", operation=ctx.operation)
                fields = {key: value for key, value in fields.items() if key not in ("data", "target", "result")}

    async def _try_change(self, operation: str, fields: Value) -> None:
        try:
            await self._change(operation, fields, synced=False)
        except InnkeeperError as error:
            log.warning("progress not recorded", error=str(error))

    async def _change(self, operation: str, fields: Value, release: bool = False, *, synced: bool = True) -> None:
        while True:
            document = await self._store.get(_key(operation))
            assert document is not None
            if document.value["ended"]:
                return  # a progress report that came late
            new = document.value | fields | {"updated": now()}
            writes: dict[str, Value | None] = {document.key: new}
            checks = {document.key: document.revision}
            for hold in _held(new) if release else ():
                held = await self._store.get(hold)
                if held is not None and (held.value.get("operation") or {}).get("id") == operation:
                    writes[hold] = held.value | {"operation": None}
                    checks[hold] = held.revision
            try:
                await self._store.transact(writes, checks, synced=synced)
                return
            except Conflict:
                continue

    async def _forget_old(self) -> None:
        ended = sorted((o for o in await self.list() if o["ended"]), key=lambda o: str(o["ended"]), reverse=True)
        if len(ended) > KEPT + 50:
            await self._store.transact({_key(o["id"]): None for o in ended[KEPT:]})


def busy(name: str, operation: Mapping[str, Any]) -> MachineBusy:
    """The refusal that names the operation."""
    return MachineBusy(
        f"{name} is busy: {operation['kind']} ({operation['id']}) is under way",
        hint=f"inn op show {operation['id']} tells how far it is, inn op cancel {operation['id']} stops it",
        operation=operation["id"],
    )


def _key(operation: str) -> str:
    return f"operation/{operation}"


def _held(journal: Value) -> list[str]:
    """Keys of the documents that an operation holds: none, one, or several where a step has set `data["hold"]` so."""
    hold = journal["hold"] or []
    return [hold] if isinstance(hold, str) else hold


def _view(journal: Value, revision: int) -> Value:
    hidden = ("args", "data", "index", "hold")
    steps = journal["steps"]
    return {k: v for k, v in journal.items() if k not in hidden} | {
        "revision": revision,
        "step": steps[min(journal["index"], len(steps) - 1)],
    }


def _cancelled(verb: Verb, ctx: Context) -> Value:
    return Cancelled(f"{verb.kind} of {ctx.target['name']} was cancelled").document()


def _problem(failure: Exception) -> Value:
    if isinstance(failure, InnkeeperError):
        return failure.document()
    log.error("a step failed in a way nobody foresaw", exc_info=failure)
    return InnkeeperError(f"{type(failure).__name__}: {failure}", hint="this is a bug: see the daemon's log").document()
