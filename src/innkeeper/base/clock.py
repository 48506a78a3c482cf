"""Wall-clock time as the store keeps it."""

from __future__ import annotations

from datetime import UTC, datetime


def now() -> str:
    """UTC with milliseconds, RFC 3339: `2026-11-22T12:41:07.123Z`. Sorts as text."""
    return datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def age(stamp: str) -> float:
    """Seconds since a stamp that `now` made."""
    return (datetime.now(UTC) - datetime.fromisoformat(stamp)).total_seconds()
