"""Faults on purpose, so that tests can fail, repeat or kill at every step of every operation."""

from __future__ import annotations

import os
import signal
from dataclasses import dataclass

from innkeeper.base.errors import InnkeeperError


class InjectedFault(InnkeeperError):
    """A test asked for this failure."""


@dataclass
class Fault:
    """One fault, which comes to pass once. when: before, after, undo; action: fail, kill, twice."""

    kind: str = ""
    step: str = ""
    when: str = ""
    action: str = ""
    spent: bool = False

    async def __call__(self, kind: str, step: str, when: str) -> bool:
        """Called at each point; True asks the engine to run the step twice."""
        if self.spent or (kind, step, when) != (self.kind, self.step, self.when):
            return False
        self.spent = True
        if self.action == "fail":
            raise InjectedFault(f"injected at {kind}/{step}/{when}")
        if self.action == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        return self.action == "twice"


@dataclass(frozen=True)
class Faults:
    """Several of them."""

    faults: tuple[Fault, ...] = ()

    @staticmethod
    def from_environment() -> Faults:
        """`INNKEEPER_FAULT`: `kind/step/when/action`, several with commas between them."""
        texts = os.environ.get("INNKEEPER_FAULT", "").split(",")
        points = [text.split("/") for text in texts if text]
        return Faults(tuple(Fault(kind, step, when, action) for kind, step, when, action in points))

    async def __call__(self, kind: str, step: str, when: str) -> bool:
        """As `Fault`."""
        return any([await fault(kind, step, when) for fault in self.faults])
