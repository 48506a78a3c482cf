"""The operation engine, with small verbs in memory: every end, every interruption, every place to die in."""

from __future__ import annotations

import asyncio
import json
from contextlib import suppress
from dataclasses import dataclass, replace

import pytest

from innkeeper.base.clock import now
from innkeeper.base.errors import ActionRefused, Conflict, InvalidInput, MachineBusy, NotFound, StoreFailed
from innkeeper.operations import engine as engine_module
from innkeeper.operations.engine import Engine, Step, Verb
from innkeeper.operations.fault import Fault
from innkeeper.store.events import EventLog
from innkeeper.store.memory import MemoryStore

STEPS = ("one", "two", "three")
TARGET = {"kind": "vm", "id": "1", "name": "web"}
HOLD = "vm/1"


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(engine_module, "STORE_RETRY", 0.001)
    monkeypatch.setattr(engine_module, "UNDO_PAUSE", 0.001)
    monkeypatch.setattr(engine_module, "PROGRESS_EVERY", 0.0)


class RecordingStore(MemoryStore):
    """Keeps a copy of everything after each transaction: what a daemon killed there leaves behind. Fails at will."""

    def __init__(self):
        super().__init__()
        self.snapshots: list[dict] = []
        self.failing = 0
        self.on_write = None
        self.synced: list[tuple[bool, dict]] = []

    async def _persist(self, revision, texts, synced):
        self.synced.append((synced, texts))
        if self.failing:
            self.failing -= 1
            raise StoreFailed("no space left on device")
        if self.on_write:
            self.on_write(texts)

    def _apply(self, revision, texts):
        super()._apply(revision, texts)
        self.snapshots.append({key: document.value for key, document in self._documents.items()})


@dataclass
class World:
    """What the engine needs of one, and a make-believe host on which steps leave things."""

    store: MemoryStore
    events: EventLog
    host: dict[str, str]
    log: list[str]
    gates: dict[str, asyncio.Event]
    fail: set[str]
    reached: asyncio.Event


def world(store=None, host=None):
    store = store or RecordingStore()
    return World(store, EventLog(store), {} if host is None else host, [], {}, set(), asyncio.Event())


def step(name: str, keep: bool = False) -> Step:
    """Leaves `name` on the host; waits in the middle if there is a gate; fails if told so, before or after it did."""

    async def act(ctx, what):
        ctx.world.log.append(f"{what} {name}")
        ctx.world.reached.set()
        if f"{what} {name} early" in ctx.world.fail:
            raise InvalidInput(f"{what} {name} failed")

    async def do(ctx):
        await act(ctx, "do")
        ctx.world.host[f"{name}.half"] = ctx.operation
        if gate := ctx.world.gates.get(f"do {name}"):
            await gate.wait()
        ctx.report(0.5, "half")
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        ctx.world.host[name] = ctx.operation
        del ctx.world.host[f"{name}.half"]
        ctx.data[name] = "made"
        ctx.result[name] = "made"
        if f"do {name}" in ctx.world.fail:
            raise InvalidInput(f"do {name} failed")

    async def undo(ctx):
        await act(ctx, "undo")
        if gate := ctx.world.gates.get(f"undo {name}"):
            await gate.wait()
        await asyncio.sleep(0)
        ctx.world.host.pop(name, None)
        ctx.world.host.pop(f"{name}.half", None)

    return Step(name, do, undo, keep)


MAKE = Verb("make", tuple(step(name) for name in STEPS))
LAUNCH = Verb("launch", (*MAKE.steps, step("ready", keep=True)))
DELETE = Verb("delete", tuple(step(name, keep=True) for name in STEPS), cancellable=False)
VERBS = {verb.kind: verb for verb in (MAKE, LAUNCH, DELETE)}


async def until(condition):
    """Let others run until it holds: seen in the very turn in which it does."""
    for _ in range(100_000):
        if condition():
            return
        await asyncio.sleep(0)
    raise AssertionError("it never came")


async def held(w: World):
    return (await w.store.get(HOLD)).value["operation"]


async def submit(w: World, kind="make", fault=None, verbs=VERBS):
    """An engine with one operation that holds the VM."""
    if await w.store.get(HOLD) is None:
        await w.store.transact({HOLD: {"name": "web", "operation": None}})
    engine = Engine(w, verbs, fault)
    return engine, (await engine.submit(kind, dict(TARGET), {}, HOLD))["id"]


async def end_of(engine: Engine, operation: str):
    async with asyncio.timeout(10):
        while not (view := await engine.get(operation))["ended"]:
            await engine.wait(operation, view["revision"], 5)
        await until(lambda: not engine._tasks)
    return view


# --- ends ---


async def test_done():
    w = world()
    engine, operation = await submit(w)
    view = await engine.get(operation)
    assert (view["state"], view["step"], view["steps"], view["ended"]) == ("running", "one", list(STEPS), None)
    assert not {"args", "data", "index", "hold"} & set(view)
    assert await held(w) == {"id": operation, "kind": "make"}
    view = await end_of(engine, operation)
    assert (view["state"], view["step"], view["error"]) == ("done", "three", None)
    assert view["result"] == dict.fromkeys(STEPS, "made")
    assert w.log == ["do one", "do two", "do three"]
    assert set(w.host) == set(STEPS)
    assert await held(w) is None


@pytest.mark.parametrize("when", ["", " early"])
@pytest.mark.parametrize("failing", STEPS)
async def test_a_failed_step_and_all_before_it_are_undone_newest_first(failing, when):
    w = world()
    w.fail.add(f"do {failing}{when}")
    engine, operation = await submit(w)
    view = await end_of(engine, operation)
    done = STEPS[: STEPS.index(failing) + 1]
    assert w.log == [f"do {name}" for name in done] + [f"undo {name}" for name in reversed(done)]
    assert (view["state"], view["error"]["code"]) == ("failed", "invalid-input")
    assert not w.host and await held(w) is None
    events = await w.events.list()
    assert [e["kind"] for e in events] == ["operation.failed"] and events[0]["facts"]["operation"] == operation


async def test_what_is_kept_stays_when_it_fails():
    w = world()
    w.fail.add("do ready")
    engine, operation = await submit(w, "launch")
    view = await end_of(engine, operation)
    assert view["state"] == "failed" and set(w.host) == {*STEPS, "ready"}
    assert not any(line.startswith("undo") for line in w.log) and await held(w) is None


async def test_an_earlier_failure_of_a_verb_with_a_kept_step_is_undone():
    w = world()
    w.fail.add("do two")
    engine, operation = await submit(w, "launch")
    assert (await end_of(engine, operation))["state"] == "failed" and not w.host


@pytest.mark.parametrize("name", STEPS)
@pytest.mark.parametrize("action", ["fail", "twice"])
@pytest.mark.parametrize("when", ["before", "after", "undo"])
async def test_faults(name, action, when):
    w = world()
    if when == "undo":
        w.fail.add("do three")
    engine, operation = await submit(w, fault=Fault("make", name, when, action))
    view = await end_of(engine, operation)
    failed = when == "undo" or action == "fail"
    assert view["state"] == ("failed" if failed else "done")
    assert set(w.host) == (set() if failed else set(STEPS))
    assert await held(w) is None
    if action == "twice" and when != "after":
        assert w.log.count(f"{'undo' if when == 'undo' else 'do'} {name}") == 2


async def test_an_undo_that_fails_is_tried_again_and_the_others_run():
    w = world()
    w.fail |= {"do three", "undo two early"}
    engine, operation = await submit(w)
    view = await end_of(engine, operation)
    assert view["state"] == "failed" and view["error"]["facts"]["not_undone"] == ["two"]
    assert w.log.count("undo two") == engine_module.UNDO_ATTEMPTS and w.log[-1] == "undo one"
    assert set(w.host) == {"two"} and await held(w) is None


async def test_an_unforeseen_error_is_told_as_a_bug():
    async def burst(ctx):
        raise ZeroDivisionError("1/0")

    w = world()
    engine, operation = await submit(w, "odd", verbs={"odd": Verb("odd", (step("one"), Step("burst", burst)))})
    view = await end_of(engine, operation)
    assert view["state"] == "failed" and "ZeroDivisionError: 1/0" in view["error"]["detail"] and not w.host


async def test_something_else_that_is_cancelled_inside_a_step_is_a_failure():
    async def burst(ctx):
        future = asyncio.get_running_loop().create_future()
        future.cancel()
        await future

    w = world()
    engine, operation = await submit(w, "odd", verbs={"odd": Verb("odd", (step("one"), Step("burst", burst)))})
    view = await end_of(engine, operation)
    assert view["state"] == "failed" and not w.host and await held(w) is None


async def test_a_step_that_leaves_what_is_not_json_does_not_hold_for_ever():
    async def leave(ctx):
        ctx.data["x"] = object()

    w = world()
    engine, operation = await submit(w, "odd", verbs={"odd": Verb("odd", (Step("leave", leave), step("one")))})
    view = await end_of(engine, operation)
    assert view["state"] == "failed" and "object" in view["error"]["detail"] and await held(w) is None


# --- holding ---


async def test_a_held_vm_is_busy_and_says_with_what():
    w = world()
    w.gates["do one"] = asyncio.Event()
    engine, operation = await submit(w)
    with pytest.raises(MachineBusy) as caught:
        await engine.submit("delete", dict(TARGET), {}, HOLD)
    assert caught.value.facts["operation"] == operation and operation in caught.value.detail
    assert len(await engine.list()) == 1
    w.gates["do one"].set()
    await end_of(engine, operation)
    second = (await engine.submit("make", dict(TARGET), {}, HOLD))["id"]
    assert (await end_of(engine, second))["state"] == "done"


async def test_of_many_at_once_one_gets_it():
    w = world()
    await w.store.transact({HOLD: {"operation": None}})
    engine = Engine(w, VERBS)
    tries = await asyncio.gather(
        *(engine.submit("make", dict(TARGET), {}, HOLD) for _ in range(20)), return_exceptions=True
    )
    started = [t for t in tries if isinstance(t, dict)]
    assert len(started) == 1 and all(isinstance(t, MachineBusy) for t in tries if t not in started)
    await end_of(engine, started[0]["id"])


async def test_nothing_to_hold():
    engine = Engine(world(), VERBS)
    with pytest.raises(NotFound):
        await engine.submit("make", dict(TARGET), {}, HOLD)
    assert await engine.list() == []


async def test_what_another_operation_holds_is_not_released():
    w = world()
    w.gates["do three"] = asyncio.Event()
    engine, operation = await submit(w)
    await asyncio.sleep(0.01)
    await w.store.transact({HOLD: {"operation": {"id": "other", "kind": "x"}}})
    w.gates["do three"].set()
    await end_of(engine, operation)
    assert (await held(w))["id"] == "other"


async def test_what_it_held_may_be_gone_at_its_end():
    async def forget(ctx):
        await ctx.world.store.transact({HOLD: None})

    w = world()
    engine, operation = await submit(w, "forget", verbs={"forget": Verb("forget", (Step("forget", forget),))})
    assert (await end_of(engine, operation))["state"] == "done"
    assert await w.store.get(HOLD) is None


async def test_a_document_that_it_makes_is_held_from_then_on():
    async def claim(ctx):
        ctx.data["hold"] = "vm/new"
        await ctx.save()
        await ctx.world.store.transact({"vm/new": {"operation": {"id": ctx.operation, "kind": "create"}}})

    w = world()
    engine = Engine(w, {"create": Verb("create", (Step("claim", claim), step("one")))})
    operation = (await engine.submit("create", dict(TARGET), {}))["id"]
    await end_of(engine, operation)
    assert (await w.store.get("vm/new")).value == {"operation": None}


# --- cancel ---


@pytest.mark.parametrize("name", STEPS)
async def test_cancel_in_the_middle_of_a_step(name):
    w = world()
    w.gates[f"do {name}"] = asyncio.Event()
    engine, operation = await submit(w)
    await until(lambda: f"{name}.half" in w.host)
    assert (await engine.cancel(operation))["cancel_requested"]
    view = await end_of(engine, operation)
    assert (view["state"], view["error"]["code"]) == ("cancelled", "cancelled")
    assert not w.host and await held(w) is None
    assert await w.events.list() == [], "a cancel that worked is no failure"
    with pytest.raises(ActionRefused):
        await engine.cancel(operation)


async def test_cancel_while_undoing_breaks_nothing_off():
    w = world()
    w.fail.add("do three")
    w.gates["undo two"] = asyncio.Event()
    engine, operation = await submit(w)
    await until(lambda: "undo two" in w.log)
    for _ in range(3):
        assert (await engine.cancel(operation))["state"] == "undoing"
    w.gates["undo two"].set()
    view = await end_of(engine, operation)
    assert view["state"] == "failed" and not w.host and await held(w) is None


async def test_cancelling_many_times_is_cancelling_once():
    w = world()
    w.gates["do two"] = w.gates["undo two"] = asyncio.Event()
    engine, operation = await submit(w)
    await until(lambda: "two.half" in w.host)
    await asyncio.gather(*(engine.cancel(operation) for _ in range(5)))
    await asyncio.sleep(0.01)
    await engine.cancel(operation)
    w.gates["undo two"].set()
    assert (await end_of(engine, operation))["state"] == "cancelled" and not w.host


@pytest.mark.parametrize("failing", [False, True])
async def test_a_cancel_at_any_moment_ends_whole(failing):
    """At each turn of the loop from begin to end: done with all there, or not done with nothing there."""
    seen = set()
    for turns in range(120):
        w = world()
        if failing:
            w.fail.add("do three")
        engine, operation = await submit(w)
        for _ in range(turns):
            await asyncio.sleep(0)
        with suppress(ActionRefused):
            await engine.cancel(operation)
        view = await end_of(engine, operation)
        seen.add(view["state"])
        assert set(w.host) == (set(STEPS) if view["state"] == "done" else set()), (turns, view)
        assert await held(w) is None
        if view["state"] == "done":
            assert view["error"] is None and not any(line.startswith("undo") for line in w.log)
    assert seen == {"cancelled", "failed" if failing else "done"}


async def test_a_step_that_swallows_the_cancel_is_the_last():
    async def stubborn(ctx):
        with suppress(asyncio.CancelledError):
            ctx.world.reached.set()
            await asyncio.sleep(60)

    w = world()
    verb = Verb("odd", (step("one"), Step("stubborn", stubborn), step("two")))
    engine, operation = await submit(w, "odd", verbs={"odd": verb})
    await w.reached.wait()
    w.reached.clear()
    await w.reached.wait()
    await engine.cancel(operation)
    assert (await end_of(engine, operation))["state"] == "cancelled"
    assert not w.host and "do two" not in w.log


async def test_what_cannot_be_undone_cannot_be_cancelled():
    w = world()
    w.gates["do one"] = asyncio.Event()
    engine, operation = await submit(w, "delete")
    with pytest.raises(ActionRefused):
        await engine.cancel(operation)
    asyncio.get_running_loop().call_later(0.01, w.gates["do one"].set)
    await engine.give_way(operation)
    assert (await engine.get(operation))["state"] == "done"


async def test_giving_way():
    w = world()
    w.gates["do two"] = asyncio.Event()
    engine, operation = await submit(w)
    await engine.give_way(operation)
    assert await held(w) is None and not w.host
    await engine.give_way(operation)  # over already
    with pytest.raises(NotFound):
        await engine.give_way("nobody")


# --- killed and recovered ---


async def recovered(snapshot: dict, host: dict, fault=None, verbs=VERBS):
    """A new daemon on what the old one left."""
    w = world(host=host)
    if snapshot:
        await w.store.transact(snapshot)
    engine = Engine(w, verbs, fault)
    return w, engine, await engine.recover()


@pytest.mark.parametrize("kind", ["make", "launch", "delete"])
@pytest.mark.parametrize("trouble", ["", "do one", "do two early", "do three", "do ready", "cancel"])
async def test_killed_at_any_write_to_the_journal(kind, trouble):
    """The store as it was after each transaction, the host as it was then: whoever comes next ends it cleanly."""
    w = world()
    hosts = []
    w.store.on_write = lambda texts: hosts.append(dict(w.host))
    if trouble == "cancel":
        w.gates["do two"] = asyncio.Event()
    elif trouble:
        w.fail.add(trouble)
    engine, operation = await submit(w, kind)
    if trouble == "cancel":
        await until(lambda: "two.half" in w.host)
        with suppress(ActionRefused):
            await engine.cancel(operation)
        w.gates["do two"].set()
    await end_of(engine, operation)
    assert len(hosts) == len(w.store.snapshots)
    assert any(f"{name}.half" in host for host in hosts for name in STEPS), "also in the middle of a step"
    checked = 0
    hosts.append(dict(w.host))
    for snapshot, *around in zip(w.store.snapshots, hosts, hosts[1:], strict=False):
        for left in around:  # died right after the write, or right before the next
            after, again, ids = await recovered(snapshot, dict(left))
            journal = snapshot.get(f"operation/{operation}")
            if journal is None or journal["ended"]:
                assert ids == []
                continue
            assert ids == [operation]
            view = await end_of(again, operation)
            checked += 1
            assert view["state"] in ("done", "failed", "cancelled")
            assert await held(after) is None
            assert not any(key.endswith(".half") for key in after.host)
            names = {s.name for s in VERBS[kind].steps}
            if view["state"] == "done":
                assert names <= set(after.host) and set(view["result"]) == names
            elif kind == "make" or view["state"] == "cancelled":
                assert not after.host, (snapshot, view)
            if journal["state"] == "undoing":
                assert view["error"] == journal["error"], "why it failed survives"
    assert checked > 2


@pytest.mark.parametrize("name", STEPS)
@pytest.mark.parametrize("what", ["do", "undo"])
async def test_a_daemon_that_leaves_in_the_middle(name, what):
    w = world()
    w.gates[f"{what} {name}"] = asyncio.Event()
    if what == "undo":
        w.fail.add("do three")
    engine, operation = await submit(w)
    await until(lambda: f"{what} {name}" in w.log)
    await asyncio.sleep(0)
    await engine.stop()
    view = await engine.get(operation)
    assert view["state"] == ("running" if what == "do" else "undoing") and view["ended"] is None
    assert (await held(w))["id"] == operation, "it is still busy"
    w.gates.clear()
    again = Engine(w, VERBS)
    assert await again.recover() == [operation]
    view = await end_of(again, operation)
    assert view["state"] == ("done" if what == "do" else "failed")
    assert set(w.host) == (set(STEPS) if what == "do" else set()) and await held(w) is None


async def test_a_daemon_that_leaves_during_a_cancel():
    w = world()
    w.gates["do two"] = w.gates["undo two"] = asyncio.Event()
    engine, operation = await submit(w)
    await until(lambda: "two.half" in w.host)
    cancelling = asyncio.ensure_future(engine.cancel(operation))
    await until(lambda: w.store._documents[f"operation/{operation}"].value["cancel_requested"])
    async with asyncio.timeout(5):
        await asyncio.gather(engine.stop(), cancelling)
    w.gates.clear()
    again = Engine(w, VERBS)
    await again.recover()
    assert (await end_of(again, operation))["state"] == "cancelled" and not w.host and await held(w) is None


async def test_killed_again_and_again():
    """A daemon that dies at every write of the one before it; each begins with what the last left."""
    w = world()
    _, operation = await submit(w)
    snapshot, host, lives = w.store.snapshots[-1], {}, 0
    while True:
        after, engine, _ = await recovered(snapshot, host)
        writes = len(after.store.snapshots)
        await until(lambda s=after.store, e=engine, n=writes + 3: len(s.snapshots) >= n or not e._tasks)
        lives += 1
        if (view := await engine.get(operation))["ended"]:
            break
        snapshot, host = after.store.snapshots[-1], dict(after.host)
        await engine.stop()
        assert lives < 20
    assert view["state"] == "done" and lives > 2


# --- a store that fails ---


@pytest.mark.parametrize("failures", [1, 2, 5])
async def test_a_store_that_fails_for_a_while(failures):
    """From each write on: the operation ends, what it says is true, nothing is held."""
    for write in range(1, 9):
        w = world()
        count = 0

        def fail_now(texts, w=w, write=write):
            nonlocal count
            if any(key.startswith("operation/") for key in texts):
                count += 1
                if count == write:
                    w.store.failing = failures - 1
                    raise StoreFailed("no space left on device")

        engine, operation = await submit(w)
        w.store.on_write = fail_now
        view = await end_of(engine, operation)
        assert set(w.host) == (set(STEPS) if view["state"] == "done" else set()), (write, view)
        assert view["state"] == "done" or view["error"]["code"] == "store-failed"
        assert await held(w) is None


async def test_a_store_that_fails_at_submit_leaves_nothing():
    w = world()
    await w.store.transact({HOLD: {"operation": None}})
    engine = Engine(w, VERBS)
    w.store.failing = 1
    with pytest.raises(StoreFailed):
        await engine.submit("make", dict(TARGET), {}, HOLD)
    await asyncio.sleep(0.01)
    assert not w.log and await held(w) is None and await engine.list() == []


async def test_a_cancel_that_cannot_be_written_can_be_asked_again():
    w = world()
    w.gates["do two"] = asyncio.Event()
    engine, operation = await submit(w)
    await until(lambda: "two.half" in w.host)
    w.store.failing = 1
    with pytest.raises(StoreFailed):
        await engine.cancel(operation)
    await engine.cancel(operation)
    assert (await end_of(engine, operation))["state"] == "cancelled" and not w.host


async def test_an_undo_waits_for_the_store():
    async def undo(ctx):
        await ctx.world.store.transact({"name/web": None})

    async def do(ctx):
        await ctx.world.store.transact({"name/web": {"id": "1"}})

    w = world()
    w.fail.add("do one")
    engine, operation = await submit(w, "odd", verbs={"odd": Verb("odd", (Step("claim", do, undo), step("one")))})
    await until(lambda: w.store._documents[f"operation/{operation}"].value["state"] != "running")
    w.store.failing = 10
    view = await end_of(engine, operation)
    assert "not_undone" not in view["error"]["facts"] and await w.store.get("name/web") is None


async def test_a_conflict_on_the_journal_is_tried_again():
    w = world()
    w.gates["do two"] = asyncio.Event()
    engine, operation = await submit(w)
    await until(lambda: "two.half" in w.host)
    for n in range(20):  # somebody else writes the VM while it ends
        w.gates["do two"].set()
        document = await w.store.get(HOLD)
        with suppress(Conflict):
            await w.store.transact({HOLD: document.value | {"n": n}}, {HOLD: document.revision})
    view = await end_of(engine, operation)
    assert view["state"] == "done" and await held(w) is None and "n" in (await w.store.get(HOLD)).value


# --- progress, waiting, keeping ---


async def test_progress_is_reported():
    async def long(ctx):
        for part in range(4):
            ctx.report(part / 4, f"part {part}")
            await asyncio.sleep(0.005)

    w = world()
    engine, operation = await submit(w, "long", verbs={"long": Verb("long", (Step("long", long),))})
    seen = []
    async with asyncio.timeout(10):
        view = await engine.get(operation)
        while not view["ended"]:
            seen.append(view["progress"]["text"])
            view = await engine.wait(operation, view["revision"], 5)
    assert [text for text in seen if text] == [f"part {n}" for n in range(4)]


async def test_progress_that_cannot_be_written_harms_nothing():
    async def long(ctx):
        ctx.world.store.failing = 1
        ctx.report(0.5, "half")
        await asyncio.sleep(0.005)

    w = world()
    engine, operation = await submit(w, "long", verbs={"long": Verb("long", (Step("long", long),))})
    assert (await end_of(engine, operation))["state"] == "done"


async def test_waiting_ends_at_its_deadline():
    w = world()
    w.gates["do one"] = asyncio.Event()
    engine, operation = await submit(w)
    await asyncio.sleep(0.01)
    view = await engine.get(operation)
    assert (await engine.wait(operation, view["revision"], 0.01))["revision"] == view["revision"]
    assert (await engine.wait(operation, 0, 60))["revision"] == view["revision"]
    w.gates["do one"].set()
    await end_of(engine, operation)
    with pytest.raises(NotFound):
        await engine.wait("nobody", 0, 0)


async def test_old_operations_are_forgotten_and_running_ones_never(monkeypatch):
    monkeypatch.setattr(engine_module, "KEPT", 10)
    w = world()
    w.gates["do two"] = asyncio.Event()
    engine, slow = await submit(w)
    await asyncio.sleep(0.01)
    quick_verb = Verb("quick", (step("x"),))
    engine._verbs = VERBS | {"quick": quick_verb}
    for _ in range(61):
        operation = (await engine.submit("quick", {"kind": "image", "name": "i"}, {}))["id"]
        while not (view := await engine.get(operation))["ended"]:
            await engine.wait(operation, view["revision"], 5)
    ids = [o["id"] for o in await engine.list()]
    assert slow in ids and operation in ids and len(ids) <= 62
    w.gates["do two"].set()
    assert (await end_of(engine, slow))["state"] == "done", "ended last, so it is no old one"
    assert slow in [o["id"] for o in await engine.list()]


async def test_nothing_to_do_is_an_end():
    view = await Engine(world(), VERBS).nothing("make", dict(TARGET), "it is running already")
    assert (view["state"], view["progress"]["text"]) == ("done", "it is running already")
    assert view["ended"] <= now()


async def test_an_operation_of_another_version_is_ended_and_lets_go():
    store = MemoryStore()
    journal = {
        "id": "old", "kind": "vm-teleport", "target": {"kind": "vm", "id": "1", "name": "web"}, "args": {},
        "hold": "vm/1", "state": "running", "steps": ["beam"], "index": 0, "data": {}, "result": {},
        "progress": {"fraction": None, "text": ""}, "error": None, "cancel_requested": False,
        "created": "2026-01-01T00:00:00.000Z", "updated": "2026-01-01T00:00:00.000Z", "ended": None,
    }  # fmt: skip
    await store.transact({"operation/old": journal, "vm/1": {"operation": {"id": "old", "kind": "vm-teleport"}}})
    engine = Engine(world(store), {})
    assert await engine.recover() == ["old"]
    view = await engine.get("old")
    assert (view["state"], view["error"]["code"]) == ("failed", "unsupported")
    assert (await store.get("vm/1")).value["operation"] is None


async def test_the_line_of_a_step_that_needs_no_sync_is_carried_by_the_next_one():
    store = RecordingStore()
    steps = [replace(step(name), unsynced=lambda ctx, two=name == "two": two) for name in ("one", "two", "three")]
    engine, operation = await submit(world(store), "few", verbs={"few": Verb("few", tuple(steps))})
    assert (await end_of(engine, operation))["state"] == "done"
    assert [(journal["index"], journal["ended"]) for synced, journal in _lines(store, operation) if not synced] == [
        (1, None)
    ]


def _lines(store, operation):
    """What was written of an operation, but for reports of its progress, and whether it was synced."""
    found = [
        (synced, json.loads(texts[key])) for synced, texts in store.synced if (key := f"operation/{operation}") in texts
    ]
    return [(synced, journal) for synced, journal in found if not journal["progress"]["text"] or journal["ended"]]


@pytest.mark.parametrize("first", ["one", "two"])
async def test_an_operation_is_on_the_disk_when_it_is_accepted_unless_its_first_step_needs_no_sync(first):
    store = RecordingStore()
    one, two = (replace(step(name), unsynced=lambda ctx, so=name == "two": so) for name in ("one", "two"))
    skipped = replace(one, idle=lambda ctx: first == "two")
    engine, operation = await submit(world(store), "few", verbs={"few": Verb("few", (skipped, two))})
    assert (await end_of(engine, operation))["state"] == "done"
    assert [synced for synced, _ in _lines(store, operation)] == [first == "one", False, True]
