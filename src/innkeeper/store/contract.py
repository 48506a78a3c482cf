"""What a store does."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from innkeeper.base.errors import Conflict, NotFound

Value = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Document:
    """A value under a key. `revision` grows with every transaction of the store; `value` is read-only."""

    key: str
    revision: int
    value: Value


@dataclass(frozen=True, slots=True)
class Change:
    """One key changed; `value` is None when it was deleted."""

    key: str
    revision: int
    value: Value | None


class Store(Protocol):
    """Documents are JSON objects. All methods raise `StoreFailed` when the medium does."""

    async def get(self, key: str) -> Document | None:
        """The document under `key`, or None."""

    async def list(self, prefix: str) -> list[Document]:
        """All documents whose key begins with `prefix`, by key."""

    async def transact(
        self, writes: Mapping[str, Value | None], checks: Mapping[str, int] | None = None, *, synced: bool = True
    ) -> int:
        """Write all (None deletes) or nothing; returns the new revision.

        It outlives the daemon; if `synced`, and with all that came before it, also the host's power. What is not is
        for writes that nobody acts upon before a synced one has come after them.

        `checks` gives the revision each key must still have, 0 for «must not exist»; else `Conflict` is raised,
        with the first key that differs in `facts["key"]`.
        """

    def watch(self, prefix: str, after: int) -> AsyncIterator[Change]:
        """Every change under `prefix` with a revision above `after`, in order, then those to come.

        Raises `Conflict` when `after` is older than the store remembers: read anew, then watch.
        """

    @property
    def revision(self) -> int:
        """The revision of the latest transaction."""

    async def close(self) -> None:
        """Release what the store holds."""


async def update(store: Store, key: str, change: Callable[[Value], Value | None], *, synced: bool = True) -> Value:
    """Read, change, compare-and-set, again if somebody else was quicker. Returns the new value.

    `change` gets a shallow copy and returns the new value, or None for «leave it»; `synced` as in `transact`. Raises
    `NotFound`.
    """
    while True:
        document = await store.get(key)
        if document is None:
            raise NotFound(f"{key} is gone")
        new = change(dict(document.value))
        if new is None or new == document.value:
            return document.value
        try:
            await store.transact({key: new}, {key: document.revision}, synced=synced)
        except Conflict:
            continue
        return new
