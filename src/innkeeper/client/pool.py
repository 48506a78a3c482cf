"""Forks that are made ahead, so that whoever needs one does not wait."""

from __future__ import annotations

from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from types import TracebackType
from typing import TYPE_CHECKING

from innkeeper.client.errors import ApiError

if TYPE_CHECKING:
    from innkeeper.client.api import Innkeeper
    from innkeeper.client.vm import VM


class Pool:
    """Keeps `ready` forks of a warm image; use it in a `with`, which ends those that nobody took.

    >>> with inn.pool("debian-12-warm", ready=4) as pool:
    ...     with pool.take() as vm:
    ...         vm.exec(["hostname"])
    """

    def __init__(self, innkeeper: Innkeeper, image: str, ready: int) -> None:
        self._innkeeper, self._image = innkeeper, image
        self._threads = ThreadPoolExecutor(max_workers=max(1, ready), thread_name_prefix="innkeeper-pool")
        self._coming: deque[Future[VM]] = deque()
        for _ in range(ready):
            self._order()

    def _order(self) -> None:
        self._coming.append(self._threads.submit(self._innkeeper.fork, self._image))

    def take(self) -> VM:
        """The next one; it is the caller's to delete. Another is begun in its place. Raises `ApiError`."""
        self._order()
        return self._coming.popleft().result()

    def close(self) -> None:
        """Delete the forks that nobody took."""
        for coming in self._coming:
            if not coming.cancel():
                with suppress(ApiError):
                    coming.result().delete(force=True)
        self._coming.clear()
        self._threads.shutdown()

    def __enter__(self) -> Pool:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
