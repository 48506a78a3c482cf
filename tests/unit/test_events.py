"""The event log: order, what is kept, followers of every speed."""

from __future__ import annotations

import asyncio

import pytest

from innkeeper.base.errors import StoreFailed
from innkeeper.store import events as events_module
from innkeeper.store.events import EventLog
from innkeeper.store.memory import REMEMBERED, MemoryStore


async def fill(log: EventLog, count: int, first: int = 1) -> None:
    for number in range(first, first + count):
        await log.append("vm.started", f"number {number}")


async def take(follower, count: int) -> list[int]:
    async with asyncio.timeout(10):
        return [(await anext(follower))["seq"] for _ in range(count)]


async def nothing_more(follower) -> None:
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.02):
            await anext(follower)


async def test_an_event_says_what_happened_to_whom():
    log = EventLog(MemoryStore())
    target = {"kind": "vm", "id": "1", "name": "web"}
    await log.append("vm.paused", "web paused", target=target, level="error", disk="disk0")
    (event,) = await log.list()
    assert event.pop("at").endswith("Z")
    assert event == {
        "seq": 1, "kind": "vm.paused", "level": "error", "target": target, "text": "web paused",
        "facts": {"disk": "disk0"},
    }  # fmt: skip


async def test_after_and_tail():
    log = EventLog(MemoryStore())
    await fill(log, 10)
    assert [e["seq"] for e in await log.list()] == list(range(1, 11))
    assert [e["seq"] for e in await log.list(after=7)] == [8, 9, 10]
    assert [e["seq"] for e in await log.list(tail=3)] == [8, 9, 10]
    assert [e["seq"] for e in await log.list(after=8, tail=30)] == [9, 10]
    assert await log.list(tail=0) == []


async def test_numbers_go_on_after_a_restart():
    store = MemoryStore()
    await fill(EventLog(store), 3)
    await fill(EventLog(store), 2)
    assert [e["seq"] for e in await EventLog(store).list()] == [1, 2, 3, 4, 5]


async def test_many_at_once_lose_none():
    log = EventLog(MemoryStore())
    await asyncio.gather(*(log.append("a", str(n)) for n in range(50)))
    assert sorted(e["seq"] for e in await log.list()) == list(range(1, 51))
    assert {e["text"] for e in await log.list()} == {str(n) for n in range(50)}


async def test_old_ones_are_forgotten(monkeypatch):
    monkeypatch.setattr(events_module, "KEPT", 200)
    store = MemoryStore()
    log = EventLog(store)
    for count in range(1, 701):
        await log.append("a", "b")
        kept = [e["seq"] for e in await log.list()]
        assert kept == list(range(kept[0], count + 1)) and min(count, 200) <= len(kept) <= 300
    again = EventLog(store)  # a restart goes on with what is there
    await fill(again, 150)
    assert 200 <= len(await again.list()) <= 300


async def test_an_event_that_cannot_be_written_is_lost_and_harms_nothing(monkeypatch):
    monkeypatch.setattr(events_module, "KEPT", 10)
    store = MemoryStore()
    log = EventLog(store)
    await fill(log, 110)
    real = store._persist

    async def full(revision, texts, synced):
        raise StoreFailed("no space left on device")

    store._persist = full
    await fill(log, 5)  # one of them would have forgotten the old ones
    store._persist = real
    await fill(log, 5)
    kept = [e["seq"] for e in await log.list()]
    assert kept == [*range(kept[0], 111), *range(116, 121)] and len(kept) <= 110, "forgotten later, when it could be"


async def test_following():
    log = EventLog(MemoryStore())
    await fill(log, 5)
    new, last_two, after = log.follow(), log.follow(tail=2), log.follow(after=3)
    everything, beyond = log.follow(after=0), log.follow(after=99)
    assert await take(last_two, 2) == [4, 5] == await take(after, 2)
    assert await take(everything, 5) == [1, 2, 3, 4, 5]
    await nothing_more(beyond)
    following = [asyncio.ensure_future(take(f, 3)) for f in (new, last_two, after, everything)]
    await asyncio.sleep(0.01)
    await fill(log, 3)
    assert await asyncio.gather(*following) == [[6, 7, 8]] * 4


async def test_a_follower_gets_only_events_and_each_once():
    store = MemoryStore()
    log = EventLog(store)
    follower = log.follow(after=0)
    reading = asyncio.ensure_future(take(follower, 20))
    for number in range(1, 21):
        await store.transact({f"vm/{number}": {}})
        await log.append("a", "b")
        if number % 3 == 0:
            await asyncio.sleep(0)
    assert await reading == list(range(1, 21))


async def test_a_slow_follower_misses_nothing_that_the_log_still_has():
    store = MemoryStore()
    log = EventLog(store)
    await fill(log, 1)
    follower = log.follow(after=0)
    assert await take(follower, 1) == [1]
    await fill(log, 5, first=2)
    for number in range(REMEMBERED + 10):  # far more than the store remembers
        await store.transact({"vm/1": {"n": number}})
    assert await take(follower, 5) == [2, 3, 4, 5, 6]
    reading = asyncio.ensure_future(take(follower, 1))
    await asyncio.sleep(0.01)
    await fill(log, 1)
    assert await reading == [7]


async def test_a_slow_follower_skips_what_the_log_has_forgotten(monkeypatch):
    monkeypatch.setattr(events_module, "KEPT", 100)
    log = EventLog(MemoryStore())
    follower = log.follow(after=0)
    await fill(log, 1)
    assert await take(follower, 1) == [1]
    await fill(log, REMEMBERED + 500)
    newest = (await log.list())[-1]["seq"]
    seen = []
    while not seen or seen[-1] != newest:
        seen += await take(follower, 1)
    assert seen == sorted(set(seen)) and len(seen) >= 100
