"""`inn screenshot`."""

from __future__ import annotations

import sys
from argparse import Namespace
from pathlib import Path

from innkeeper.cli import terminal
from innkeeper.cli.parser import usage_error
from innkeeper.client import Innkeeper


def screenshot(inn: Innkeeper, args: Namespace) -> int:
    """Write a PNG into a file or to stdout, which then carries nothing else."""
    if args.file == "-":
        if sys.stdout.isatty():
            raise usage_error(args, "stdout is a terminal, which shows no PNG: name a file or redirect it")
        sys.stdout.buffer.write(inn.vm(args.vm).screenshot())
        return 0
    picture = inn.vm(args.vm).screenshot()
    Path(args.file).write_bytes(picture)
    if args.output == "json":
        terminal.emit_json({"path": str(Path(args.file).absolute()), "bytes": len(picture)})
    else:
        terminal.say(f"{args.file}: {len(picture)} bytes")
    return 0
