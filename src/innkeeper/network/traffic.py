"""What came for published ports, and when last: counted by nftables, remembered while the daemon runs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from innkeeper.base.clock import now

Key = tuple[str, str, int]
"""Tap, protocol, host port."""


@dataclass(frozen=True)
class Seen:
    """Packets and bytes towards the guest. `last`: of the look that found more than the one before, None for never."""

    packets: int = 0
    bytes: int = 0
    last: str | None = None


class Traffic:
    """Sums over the counters, which begin anew whenever rules are made anew."""

    def __init__(self) -> None:
        self._counters: dict[Key, tuple[int, int]] = {}
        self._seen: dict[Key, Seen] = {}

    def look(self, counters: Mapping[Key, tuple[int, int]]) -> None:
        """The counters as they are now; ports that are not among them are forgotten."""
        self._seen = {key: self._more(key, *counter) for key, counter in counters.items()}
        self._counters = dict(counters)

    def of(self, tap: str, protocol: str, port: int) -> Seen:
        """Of one published port."""
        return self._seen.get((tap, protocol, port), Seen())

    def _more(self, key: Key, packets: int, size: int) -> Seen:
        before, seen = self._counters.get(key, (0, 0)), self._seen.get(key, Seen())
        if packets < before[0]:
            before = (0, 0)
        if packets == before[0]:
            return seen
        return Seen(seen.packets + packets - before[0], seen.bytes + size - before[1], now())
