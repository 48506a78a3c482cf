"""Text for people: colour where a terminal shows it, tables, pages, bars.

Whatever comes from a guest or another user passes through `clean` before it reaches a terminal, so that nobody can move
the cursor or hide a line with an escape sequence.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Sequence
from typing import Any, TextIO

STYLES = {
    "bold": "1",
    "dim": "2",
    "red": "31",
    "green": "32",
    "yellow": "33",
    "blue": "34",
    "magenta": "35",
    "cyan": "36",
}

Cell = str | tuple[str, str]
"""Text, or text and the style it is shown in."""

_CONTROL = {code: "\ufffd" for code in (*range(32), *range(127, 160))}
_CONTROL_BUT_LINES = {code: mark for code, mark in _CONTROL.items() if code not in (9, 10)}


def clean(text: object, keep_lines: bool = False) -> str:
    """Text without control characters; line ends and tabs may stay."""
    return str(text).translate(_CONTROL_BUT_LINES if keep_lines else _CONTROL)


def colours(stream: TextIO) -> bool:
    """Whether to colour: a terminal that can, and NO_COLOR (no-color.org) not set."""
    return stream.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def interactive(stream: TextIO) -> bool:
    """Whether a person watches this stream live: a terminal, and no CI."""
    return stream.isatty() and not os.environ.get("CI") and os.environ.get("TERM") != "dumb"


def width() -> int:
    """Columns of the terminal; effectively endless where there is none."""
    if not sys.stdout.isatty():
        return 1_000_000
    try:
        return int(os.environ.get("COLUMNS") or 0) or os.get_terminal_size(sys.stdout.fileno()).columns or 80
    except (ValueError, OSError):
        return 80


def paint(text: str, style: str, stream: TextIO | None = None) -> str:
    """Text in a style, where the stream shows colours."""
    if not style or not colours(stream or sys.stdout):
        return text
    return f"\x1b[{';'.join(STYLES[name] for name in style.split())}m{text}\x1b[0m"


def say(text: str) -> None:
    """A line on stdout. A name that the terminal's encoding lacks becomes a `?` instead of an error."""
    encoding = sys.stdout.encoding or "utf-8"
    sys.stdout.write(text.encode(encoding, "replace").decode(encoding) + "\n")


def note(text: str) -> None:
    """A remark on stderr, so that stdout stays what was asked for."""
    sys.stdout.flush()
    sys.stderr.write(paint(text, "dim", sys.stderr) + "\n")


def emit_json(document: Any, *, line: bool = False) -> None:
    """JSON on stdout; on one line as a part of a stream."""
    import json

    say(json.dumps(document) if line else json.dumps(document, indent=2, ensure_ascii=False))
    if line:
        sys.stdout.flush()


def table(heads: Sequence[str], rows: Iterable[Sequence[Cell]]) -> str:
    """Aligned columns. An empty column is left out; the last, where the terminal has no room for it, goes below its
    row."""
    cells = [[(clean(c), "") if isinstance(c, str) else (clean(c[0]), c[1]) for c in row] for row in rows]
    kept = [i for i in range(len(heads)) if not cells or any(row[i][0] for row in cells)]
    wide = {i: max([len(heads[i]), *(len(row[i][0]) for row in cells)]) for i in kept}
    limit = width()
    below = kept.pop() if sum(wide[i] + 2 for i in kept) - 2 > limit and len(kept) > 2 else None

    def line(row: Sequence[tuple[str, str]]) -> str:
        texts = "".join(paint(row[i][0], row[i][1]) + " " * (wide[i] - len(row[i][0]) + 2) for i in kept).rstrip()
        if below is None or not row[below][0]:
            return texts
        text, style = row[below]
        return texts + "\n" + paint("  └ " + (text if len(text) <= limit - 4 else text[: limit - 5] + "…"), style)

    first = [(head if i != below else "", "dim") for i, head in enumerate(heads)]
    return "\n".join([line(first), *(line(row) for row in cells)])


def page(rows: Iterable[tuple[str, Cell | Sequence[Cell]]]) -> str:
    """Labels on the left, values on the right, long values wrapped under themselves. A row without a label goes on
    with the one above; a value of several cells is one line of them."""
    import textwrap

    listed = [(label, [value] if isinstance(value, (str, tuple)) else list(value)) for label, value in rows]
    indent = max((len(label) for label, _ in listed), default=0) + 3
    room = max(20, min(width(), 100) - indent)
    lines: list[str] = []
    for label, cells in listed:
        plain = [(clean(c), "") if isinstance(c, str) else (clean(c[0]), c[1]) for c in cells]
        if len(plain) == 1:
            texts = textwrap.wrap(plain[0][0], room, break_on_hyphens=False) or [""]
            values = [paint(text, plain[0][1]) for text in texts]
        else:
            values = ["".join(paint(text, style) for text, style in plain)]
        lines.append(paint(label.ljust(indent), "cyan") + values[0])
        lines += [" " * indent + value for value in values[1:]]
    return "\n".join(line.rstrip() for line in lines)


def bar(parts: Sequence[tuple[float, str]], length: int = 24) -> list[Cell]:
    """A bar of `length` columns: (fraction of the whole, style) from the left, the rest empty. Each part above zero is
    at least one column wide."""
    cells: list[Cell] = []
    left = length
    for fraction, style in parts:
        columns = min(left, max(1, round(fraction * length)) if fraction > 0 else 0)
        left -= columns
        cells.append(("█" * columns if "dim" not in style else "▒" * columns, style))
    cells.append(("░" * left, "dim"))
    return cells


STATES = {
    "running": "green",
    "paused": "yellow",
    "crashed": "red",
    "stopped": "dim",
    "done": "green",
    "failed": "red",
    "cancelled": "yellow",
    "undoing": "yellow",
}


def state(name: str) -> Cell:
    """The name of a state in its colour; states that pass are cyan."""
    return (name, STATES.get(name, "cyan"))
