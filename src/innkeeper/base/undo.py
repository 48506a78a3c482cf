"""Undo what was done to the host when a later action fails."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from types import TracebackType

import structlog

log = structlog.get_logger()


class Undo:
    """A stack of undo actions, run newest first when the block ends with an error.

    >>> async with Undo() as undo:
    ...     fd = os.open(path, flags)
    ...     undo.add(os.close, fd)

    An undo action that itself fails is logged and does not keep the others from running.
    """

    def __init__(self) -> None:
        self._actions: list[Callable[[], object]] = []

    def add(self, action: Callable[..., object], *args: object) -> None:
        """Register `action(*args)`; it may be a coroutine function."""
        self._actions.append(lambda: action(*args))

    async def __aenter__(self) -> Undo:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            return
        for action in reversed(self._actions):
            try:
                outcome = action()
                if isinstance(outcome, Awaitable):
                    await outcome
            except Exception:
                log.exception("undo failed")
