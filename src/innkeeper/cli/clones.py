"""`inn clone`."""

from __future__ import annotations

from argparse import Namespace

from innkeeper.cli import terminal
from innkeeper.cli.parser import usage_error
from innkeeper.cli.progress import conclude
from innkeeper.cli.snapshots import warn
from innkeeper.client import Innkeeper, Operation


def clone(inn: Innkeeper, args: Namespace) -> int:
    if args.full and args.linked:
        raise usage_error(args, "a clone is --full or --linked, not both")
    operation = inn.vm(args.vm).clone(
        args.name, linked=args.linked, keep_identity=args.keep_identity, quiesce=args.quiesce
    )

    def say(operation: Operation) -> str:
        warn(operation)
        how = f"linked: {operation.target} stays for as long as it does" if args.linked else "with disks of its own"
        start = terminal.paint(f"  start it: inn start {args.name}", "dim")
        return f"{args.name} is a clone of {operation.target}, {how}\n{start}"

    return conclude(args, operation, say)
