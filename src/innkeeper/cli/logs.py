"""`inn logs`."""

from __future__ import annotations

import re
import sys
from argparse import Namespace
from collections.abc import Iterable, Iterator

from innkeeper.cli import terminal
from innkeeper.client import Innkeeper

_COLOUR = rb"\x1b\[[0-9;]*m"
_SEQUENCE = re.compile(
    rb"(" + _COLOUR + rb")"
    rb"|\x1b\[[0-?]*[ -/]*[@-~]"  # CSI: cursor, erase, modes (ECMA-48, 5.4)
    rb"|\x1b[\]PX^_][^\x07\x1b\n]*(?:\x07|\x1b\\)?"  # OSC, DCS, SOS, PM, APC: titles, clipboards
    rb"|\x1b[ -/]*[0-~]"  # two-byte escapes, such as a full reset
    rb"|\xc2[\x80-\x9f]"  # C1 controls in UTF-8, which some terminals obey
    rb"|[\x00-\x08\x0b-\x1a\x1c-\x1f\x7f]|\x1b"
)
_UNFINISHED = re.compile(rb"(?:\x1b(?:\[[0-?]*[ -/]*|[\]PX^_][^\x07\x1b\n]*|[ -/]*)|\xc2)\Z")


def logs(inn: Innkeeper, args: Namespace) -> int:
    """Bytes as they are into a pipe or file; on a terminal without what would rearrange it; as JSON line by line."""
    blocks = inn.vm(args.vm).logs(follow=args.follow, tail=args.tail)
    if args.output == "json":
        for line in _lines(blocks):
            terminal.emit_json({"line": _SEQUENCE.sub(b"", line).decode(errors="replace")}, line=True)
        return 0
    out = sys.stdout.buffer
    tame = sys.stdout.isatty()
    for block in _harmless(blocks, terminal.colours(sys.stdout)) if tame else blocks:
        out.write(block)
        out.flush()
    if terminal.colours(sys.stdout):
        out.write(b"\x1b[0m")
    return 0


def _harmless(blocks: Iterable[bytes], colour: bool) -> Iterator[bytes]:
    """The same block by block; a sequence that is cut in two by their border waits for its end."""
    rest = b""
    for block in blocks:
        text = rest + block
        unfinished = _UNFINISHED.search(text, max(0, len(text) - 64))
        keep = unfinished.start() if unfinished else len(text)
        text, rest = text[:keep], text[keep:]
        yield harmless(text, colour)
    yield harmless(rest, colour)


def harmless(text: bytes, colour: bool = True) -> bytes:
    """Text with its colours and line ends, without any other control sequence."""
    return _SEQUENCE.sub(lambda match: match[1] if colour and match[1] else b"", text)


def _lines(blocks: Iterable[bytes]) -> Iterator[bytes]:
    rest = b""
    for block in blocks:
        *whole, rest = (rest + block).split(b"\n")
        yield from (line.rstrip(b"\r") for line in whole)
    if rest:
        yield rest
