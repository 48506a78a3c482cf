"""What was made for a time: there is notice, once, before it goes."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from datetime import UTC, datetime, timedelta

import pytest

from innkeeper.base.clock import stamp
from innkeeper.base.home import Home
from innkeeper.operations import expiry
from innkeeper.operations.engine import Context, Engine, Step, Verb
from innkeeper.operations.world import World
from innkeeper.store.events import EventLog
from innkeeper.store.memory import MemoryStore

DAY = timedelta(days=1)
removed: list[str] = []


async def remove(ctx: Context) -> None:
    removed.extend(ctx.args["snapshots"])
    await ctx.world.store.transact({f"snapshot/{each}": None for each in ctx.args["snapshots"]})


@pytest.fixture
def world(monkeypatch, tmp_path) -> World:
    monkeypatch.setattr(expiry, "EVERY", 0.0)
    removed.clear()
    store = MemoryStore()
    return World(Home(tmp_path, tmp_path, tmp_path), store, EventLog(store), None, None, None)  # type: ignore[arg-type]


async def events_after_looking(world: World, *snapshots: tuple[str, timedelta, timedelta]) -> list[tuple[str, str]]:
    """(kind, text) of what is said of snapshots (name, age, time that is left), however often somebody looks."""
    now = datetime.now(UTC)
    vm = {"id": "a", "name": "web", "expires": None, "operation": None}
    await world.store.transact({"vm/a": vm, "name/vm/web": {"id": "a"}})
    for name, age, left in snapshots:
        snapshot = {
            "id": name, "vm": "a", "name": name, "created": stamp(now - age), "expires": stamp(now + left),
            "state": "whole", "noticed": False, "passing": "",
        }  # fmt: skip
        await world.store.transact({f"snapshot/{name}": snapshot})
    engine = Engine(world, {"snapshot-delete": Verb("snapshot-delete", (Step("remove", remove),))})
    looking = asyncio.create_task(expiry.expire(world, engine))
    for _ in range(300):
        await asyncio.sleep(0)
    looking.cancel()
    with suppress(asyncio.CancelledError):
        await looking
    await engine.stop()
    return [(event["kind"], event["text"]) for event in await world.events.list()]


async def test_notice_is_given_once_a_day_before(world):
    said = await events_after_looking(
        world, ("early", DAY, 2 * DAY), ("late", 2 * DAY, DAY / 2), ("long", 30 * DAY, DAY * 1.01)
    )
    assert [kind for kind, _ in said] == ["snapshot.expiring"] and "snapshot late of web expires" in said[0][1]
    assert not removed


async def test_a_short_life_has_notice_in_its_last_quarter(world):
    said = await events_after_looking(
        world,
        ("young", timedelta(minutes=29), timedelta(minutes=31)),
        ("old", timedelta(minutes=50), timedelta(minutes=10)),
    )
    assert [kind for kind, _ in said] == ["snapshot.expiring"] and "snapshot old of web" in said[0][1]


async def test_what_is_over_is_removed(world):
    said = await events_after_looking(world, ("over", DAY, -timedelta(seconds=1)))
    assert removed == ["over"] and "snapshot.expired" in [kind for kind, _ in said]
