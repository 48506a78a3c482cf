"""Sizes, durations and rates as people write them."""

from __future__ import annotations

import re

from innkeeper.base.errors import InvalidInput

KIB, MIB, GIB, TIB = 1 << 10, 1 << 20, 1 << 30, 1 << 40

_SIZE = re.compile(r"(\d{1,18}(?:\.\d{1,6})?)\s*([kmgtp]?)(?:i?b)?", re.IGNORECASE | re.ASCII)
_POWER = {"": 0, "k": 1, "m": 2, "g": 3, "t": 4, "p": 5}
_DURATION = re.compile(r"(\d{1,9}(?:\.\d{1,6})?)\s*(ms|s|m|h|d|w)?", re.ASCII)
_RATE = re.compile(r"(\d{1,15}(?:\.\d{1,6})?)\s*(?:([kmg]?)bit)?", re.ASCII)
_BITS = {"g": 10**9, "m": 10**6, "k": 10**3, "": 1}
_SECONDS = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0, "w": 604800.0}


def parse_size(text: str | int) -> int:
    """Bytes: `2G`, `512MiB`, `1.5g`, `4096`. Suffixes are powers of 1024. Raises `InvalidInput`."""
    if isinstance(text, int) and not isinstance(text, bool):
        if text < 0:
            raise InvalidInput(f"size {text} is negative")
        return text
    match = _SIZE.fullmatch(str(text).strip())
    if not match:
        raise InvalidInput(f"size {str(text)!r} is not understood", hint="write it like 512M, 2G or 1.5T")
    return (
        int(float(match[1]) * 1024 ** _POWER[match[2].lower()])
        if "." in match[1]
        else int(match[1]) * 1024 ** _POWER[match[2].lower()]
    )


def format_size(count: float) -> str:
    """A short form for people: `2 GiB`, `1.5 GiB`, `312 MiB`, `17 B`."""
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if abs(count) < 1024 or unit == "TiB":
            break
        count /= 1024
    return f"{count:.0f} {unit}" if count >= 100 or count == int(count) else f"{count:.1f} {unit}"


def parse_duration(text: str | float) -> float:
    """Seconds: `90`, `500ms`, `10m`, `3d`. Raises `InvalidInput`."""
    match = _DURATION.fullmatch(str(text).strip())
    if not match:
        raise InvalidInput(f"duration {str(text)!r} is not understood", hint="write it like 30s, 10m or 3d")
    return float(match[1]) * _SECONDS[match[2] or "s"]


def format_age(seconds: float) -> str:
    """How long ago, for a table: `5s`, `12m`, `3h`, `9d`."""
    for unit, size in (("d", 86400), ("h", 3600), ("m", 60)):
        if seconds >= size:
            return f"{seconds // size:.0f}{unit}"
    return f"{max(0, seconds):.0f}s"


def parse_rate(text: str | int) -> int:
    """Bits per second, written as tc(8) does: `100mbit`, `512kbit`, `2.5gbit`. Raises `InvalidInput`."""
    match = _RATE.fullmatch(str(text).strip().lower())
    if not match:
        raise InvalidInput(f"rate {str(text)!r} is not understood", hint="write it like 512kbit, 100mbit or 2.5gbit")
    return int(float(match[1]) * _BITS[match[2] or ""])


def format_rate(bits: int) -> str:
    """The same of a number: `100mbit`."""
    unit = next(unit for unit, size in _BITS.items() if bits % size == 0)
    return f"{bits // _BITS[unit]}{unit}bit"
