"""Wall-clock time as the store keeps it."""

from __future__ import annotations

from datetime import UTC, datetime


def now() -> str:
    """UTC with milliseconds, RFC 3339: `2026-11-22T12:41:07.123Z`. Sorts as text."""
    return stamp(datetime.now(UTC))


def stamp(at: datetime) -> str:
    """A point in time, in UTC, as `now` writes it."""
    return at.isoformat(timespec="milliseconds").replace("+00:00", "Z")


def age(stamp: str) -> float:
    """Seconds since a stamp that `now` made."""
    return (datetime.now(UTC) - datetime.fromisoformat(stamp)).total_seconds()
