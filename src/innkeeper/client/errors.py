"""What can go wrong between a client and the daemon, and what the daemon itself says went wrong."""

from __future__ import annotations

from typing import Any

from innkeeper.base.errors import DaemonUnreachable, InnkeeperError

__all__ = ["ApiError", "DaemonUnreachable", "InnkeeperError", "SocketForbidden"]


class SocketForbidden(DaemonUnreachable):
    """The daemon's socket is there, but this user may not connect to it."""


class ApiError(InnkeeperError):
    """The daemon refused or failed: a problem+json document (RFC 9457) as an exception.

    `status` is the HTTP status, `code` the stable name to test for (`name-taken`), `facts` the numbers behind it.
    """

    def __init__(self, problem: dict[str, Any], status: int = 0) -> None:
        detail = problem.get("detail") or problem.get("title") or f"the daemon answered {status}"
        super().__init__(str(detail), hint=str(problem.get("hint") or ""), **(problem.get("facts") or {}))
        self.status: int = int(problem.get("status") or status or 500)  # type: ignore[misc]
        self._code = str(problem.get("code") or "error")

    @property
    def code(self) -> str:
        """As the daemon named it: `name-taken`, `not-found`, `machine-busy` …"""
        return self._code

    @property
    def fields(self) -> list[tuple[str, str]]:
        """(field, problem) of each value that was wrong, for a 422."""
        errors = self.facts.get("errors") or []
        return [(str(error.get("field", "")), str(error.get("problem", ""))) for error in errors]
