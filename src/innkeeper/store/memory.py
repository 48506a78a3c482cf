"""A store in memory: the read side of the SQLite store, and a store of its own for tests."""

from __future__ import annotations

import asyncio
import bisect
import itertools
import json
from collections import deque
from collections.abc import AsyncIterator, Mapping, Sequence

from innkeeper.base.errors import Conflict
from innkeeper.store.contract import Change, Document, Value

REMEMBERED = 4096
"""Changes kept for watchers that come late."""


class MemoryStore:
    """Documents in a dict with sorted keys: a read costs a look-up, a listing its own length."""

    def __init__(self) -> None:
        self._documents: dict[str, Document] = {}
        self._keys: list[str] = []
        self._revision = 0
        self._forgotten = 0
        self._changes: deque[Change] = deque(maxlen=REMEMBERED)
        self._changed = asyncio.Event()
        self._writing = asyncio.Lock()

    @property
    def revision(self) -> int:
        return self._revision

    async def get(self, key: str) -> Document | None:
        return self._documents.get(key)

    async def list(self, prefix: str) -> list[Document]:
        first = bisect.bisect_left(self._keys, prefix)
        last = bisect.bisect_left(self._keys, prefix + "\U0010ffff")
        return [self._documents[key] for key in self._keys[first:last]]

    async def transact(
        self, writes: Mapping[str, Value | None], checks: Mapping[str, int] | None = None, *, synced: bool = True
    ) -> int:
        # Through JSON: the caller keeps its own copy, and what is not JSON fails here rather than at a restart.
        texts = {key: None if value is None else json.dumps(value) for key, value in writes.items()}
        writing = self._transact(texts, checks or {}, synced)
        # Shielded: a caller that is cancelled half-way must not leave the medium and the memory apart. One that is not
        # synced waits for nothing once it has its turn.
        return await (asyncio.shield(writing) if synced else writing)

    async def _transact(self, texts: Mapping[str, str | None], checks: Mapping[str, int], synced: bool) -> int:
        async with self._writing:
            for key, expected in checks.items():
                document = self._documents.get(key)
                actual = document.revision if document else 0
                if actual != expected:
                    raise Conflict(f"{key} has changed", key=key, expected=expected, actual=actual)
            await self._persist(self._revision + 1, texts, synced)
            self._apply(self._revision + 1, texts)
            return self._revision

    async def _persist(self, revision: int, texts: Mapping[str, str | None], synced: bool) -> None:
        """Make the writes durable, as far as `transact` promises, before anyone can see them."""

    def _apply(self, revision: int, texts: Mapping[str, str | None]) -> None:
        self._revision = revision
        for key, text in texts.items():
            if text is None:
                if self._documents.pop(key, None) is None:
                    continue
                del self._keys[bisect.bisect_left(self._keys, key)]
                value = None
            else:
                value = json.loads(text)
                if key not in self._documents:
                    bisect.insort(self._keys, key)
                self._documents[key] = Document(key, revision, value)
            if len(self._changes) == REMEMBERED:
                self._forgotten = self._changes[0].revision
            self._changes.append(Change(key, revision, value))
        self._changed.set()
        self._changed = asyncio.Event()

    def _since(self, after: int) -> Sequence[Change]:
        """Few of many, as a rule."""
        return [*itertools.takewhile(lambda change: change.revision > after, reversed(self._changes))][::-1]

    async def watch(self, prefix: str, after: int) -> AsyncIterator[Change]:
        while True:
            if after < self._forgotten:
                raise Conflict(f"changes up to revision {self._forgotten} are forgotten", revision=after)
            changed = self._changed
            upto = self._revision
            for change in self._since(after):
                if change.key.startswith(prefix):
                    yield change
            after = upto
            await changed.wait()

    async def close(self) -> None:
        """Nothing to release."""
