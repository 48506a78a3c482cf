"""Faults on purpose, so that tests can fail, repeat or kill at every step of every operation."""

from __future__ import annotations

import os
import signal
from dataclasses import dataclass

from innkeeper.base.errors import InnkeeperError


class InjectedFault(InnkeeperError):
    """A test asked for this failure."""


@dataclass(frozen=True)
class Fault:
    """`kind/step/when/action` from `INNKEEPER_FAULT`; when: before, after, undo; action: fail, kill, twice."""

    kind: str = ""
    step: str = ""
    when: str = ""
    action: str = ""

    @staticmethod
    def from_environment() -> Fault:
        text = os.environ.get("INNKEEPER_FAULT", "")
        return Fault(*text.split("/")) if text else Fault()

    async def __call__(self, kind: str, step: str, when: str) -> bool:
        """Called at each point; True asks the engine to run the step twice."""
        if (kind, step) != (self.kind, self.step):
            return False
        if self.action == "twice":
            return when == "before"
        if when == self.when and self.action == "fail":
            raise InjectedFault(f"injected at {kind}/{step}/{when}")
        if when == self.when and self.action == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        return False
