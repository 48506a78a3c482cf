"""An operation: something the daemon does that takes time."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from innkeeper.client.errors import ApiError

if TYPE_CHECKING:
    from innkeeper.client.api import Innkeeper

Progress = Callable[["Operation"], object]
"""Called with the operation whenever its document changed."""

ENDED = ("done", "failed", "cancelled")

POLL = 25
"""Seconds one long poll lasts; the API's limit is 30."""


class Operation:
    """A handle on one operation; `document` is what the daemon last said about it."""

    def __init__(self, innkeeper: Innkeeper, document: dict[str, Any]) -> None:
        self._innkeeper = innkeeper
        self.document = document

    def __repr__(self) -> str:
        return f"<Operation {self.id} {self.kind} {self.target} {self.state}>"

    @property
    def id(self) -> str:
        return str(self.document["id"])

    @property
    def kind(self) -> str:
        """The verb: `vm-launch`, `image-build` …"""
        return str(self.document["kind"])

    @property
    def target(self) -> str:
        """The name of what it works on."""
        target = self.document.get("target") or {}
        return str(target.get("name") or target.get("id") or "")

    @property
    def state(self) -> str:
        """`running`, `undoing`, `done`, `failed` or `cancelled`."""
        return str(self.document["state"])

    @property
    def ended(self) -> bool:
        return self.state in ENDED

    @property
    def idle(self) -> bool:
        """Things were as asked already: nothing was done, and `text` says so."""
        return self.id == "none"

    @property
    def steps(self) -> list[str]:
        """The names of its steps, in order."""
        return list(self.document.get("steps") or ())

    @property
    def step(self) -> str:
        """The step it is at."""
        return str(self.document.get("step") or "")

    @property
    def fraction(self) -> float | None:
        """How much of the current step is done, 0 to 1; None where nobody knows."""
        value = (self.document.get("progress") or {}).get("fraction")
        return None if value is None else float(value)

    @property
    def text(self) -> str:
        """What it is doing right now, for people."""
        return str((self.document.get("progress") or {}).get("text") or "")

    @property
    def result(self) -> dict[str, Any]:
        return self.document.get("result") or {}

    @property
    def error(self) -> ApiError | None:
        """Why it failed or was cancelled; None otherwise."""
        problem = self.document.get("error")
        if problem:
            return ApiError(problem)
        if self.state in ("failed", "cancelled"):
            return ApiError({"code": self.state, "detail": f"{self.kind} of {self.target} {self.state}"})
        return None

    def poll(self, seconds: float = 0, *, to_its_end: bool = False) -> Operation:
        """Ask once; with `seconds`, the daemon answers as soon as something changed, or it has ended, at the latest
        after that."""
        query = {"after": self.document.get("revision", 0), "wait": seconds, "to_its_end": to_its_end}
        self.document = self._innkeeper.call("GET", f"/operations/{self.id}", query=query if seconds else None)
        return self

    def wait(self, on_progress: Progress | None = None) -> Operation:
        """Block until it has ended. Raises `ApiError` with its reason when it failed or was cancelled."""
        self.wait_quietly(on_progress)
        if error := self.error:
            raise error
        return self

    def wait_quietly(self, on_progress: Progress | None = None) -> Operation:
        """Block until it has ended, however it ended."""
        if on_progress:
            on_progress(self)
        while not self.ended:
            self.poll(POLL, to_its_end=on_progress is None)
            if on_progress:
                on_progress(self)
        return self

    def cancel(self) -> Operation:
        """Ask it to stop and to undo what it did; `wait` tells when that is over."""
        self.document = self._innkeeper.call("POST", f"/operations/{self.id}/cancel")
        return self
