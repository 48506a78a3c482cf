"""Hostile strings, the same ones every time."""

from __future__ import annotations

import random

PIECES = [
    ",", "=", '"', "'", "\\", "\n", "\r", "\t", "\0", " ", "{", "}", "[", "]", ":", "/", "//", "..", "-", "--", "%",
    "%s", "$(id)", "`id`", "${IFS}", ";", "|", "&", "<", ">", "#", "~", "*", "?", "!", "é", "☃", "\u2028", "\ufeff",
    "\ufffe",
    "\ufdd0", "\U0010ffff", "\u202e", "\x1b[2J", "\x7f", "json:", "nbd:", "fat:", "/dev/fdset/1", ",readonly=on",
    ",file=/etc/shadow", '","backing":"', "\\u0000", "-S", "-incoming", "exec:id", "on", "a", "B", "0", "é" * 30,
    "x" * 200, "guest=", "\ud800",
]  # fmt: skip


def hostile_strings(count: int, seed: int) -> list[str]:
    """Pieces that mean something somewhere, and any characters there are; the same ones every time."""
    dice = random.Random(seed)
    made = []
    while len(made) < count:
        parts = [
            dice.choice(PIECES) if dice.random() < 0.7 else "".join(chr(dice.randrange(1, 0x3000)) for _ in range(3))
            for _ in range(dice.randint(1, 6))
        ]
        made.append("".join(parts))
    return made


def hostile_serials(count: int, seed: int) -> list[str]:
    """As `hostile_strings`, of what a serial number may be made of: 20 printable ASCII characters at most."""
    dice = random.Random(seed)
    pieces = [piece for piece in PIECES if piece.isascii() and piece.isprintable() and len(piece) <= 20]
    printable = [chr(code) for code in range(0x20, 0x7F)]
    return [
        "".join(dice.choice(pieces) if dice.random() < 0.6 else dice.choice(printable) for _ in range(8))[
            : dice.randint(1, 20)
        ]
        for _ in range(count)
    ]
