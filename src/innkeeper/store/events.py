"""The event log: what happened, as sentences, in the store under `event/<seq>`."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any, Literal

import structlog

from innkeeper.base.clock import now
from innkeeper.base.errors import Conflict, StoreFailed
from innkeeper.store.contract import Store, Value

log = structlog.get_logger()

KEPT = 5000
"""Events kept; older ones are forgotten, a hundred at a time."""

Level = Literal["info", "warning", "error"]


class EventLog:
    """Appends events and follows them. Losing an event, as a power cut may the last ones,
    harms nothing else."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._next: int | None = None
        self._first = 0

    async def append(
        self, kind: str, text: str, *, target: dict[str, Any] | None = None, level: Level = "info", **facts: Any
    ) -> None:
        """Record that `kind` (like `vm.paused`) happened to `target` ({kind, id, name}); `text` is a sentence."""
        if self._next is None:
            kept = await self._store.list("event/")
            if self._next is None:
                self._first = int(kept[0].value["seq"]) if kept else 1
                self._next = int(kept[-1].value["seq"]) + 1 if kept else 1
        seq, self._next = self._next, self._next + 1
        event = {"seq": seq, "at": now(), "kind": kind, "level": level, "target": target, "text": text, "facts": facts}
        log.log({"info": 20, "warning": 30, "error": 40}[level], text, event_kind=kind)
        writes: dict[str, Value | None] = {_key(seq): event}
        first = self._first if seq - self._first < KEPT + 100 else seq - KEPT + 1
        writes |= {_key(old): None for old in range(self._first, first)}
        try:
            await self._store.transact(writes, synced=False)
            self._first = max(self._first, first)
        except StoreFailed as error:
            log.error("event lost", error=str(error))

    async def list(self, after: int = 0, tail: int | None = None) -> list[Value]:
        """Events with a sequence number above `after`, oldest first; the last `tail` of them."""
        events = [d.value for d in await self._store.list("event/") if d.value["seq"] > after]
        return events if tail is None else events[max(0, len(events) - tail) :]

    async def follow(self, after: int | None = None, tail: int = 0) -> AsyncIterator[Value]:
        """What `list` gives, then every event to come. A follower too slow for the store's memory of changes reads
        on in the log: it misses only what the log itself has forgotten."""
        revision = self._store.revision
        past = await self.list()
        last = after if after is not None else (past[-1]["seq"] if past else 0)
        for event in [e for e in past if e["seq"] > last] if after is not None else past[max(0, len(past) - tail) :]:
            last = event["seq"]
            yield event
        while True:
            try:
                async for change in self._store.watch("event/", revision):
                    if change.value is not None and change.value["seq"] > last:
                        last = change.value["seq"]
                        yield change.value
            except Conflict:
                revision = self._store.revision
                for event in await self.list(last):
                    last = event["seq"]
                    yield event


def _key(seq: int) -> str:
    return f"event/{seq:016d}"
