"""`inn template warm` and `inn fork`."""

from __future__ import annotations

import signal
import sys
import time
from argparse import Namespace
from contextlib import suppress
from types import FrameType

from innkeeper.cli import terminal
from innkeeper.cli.execute import run
from innkeeper.cli.keys import public_keys
from innkeeper.cli.launch import text
from innkeeper.cli.names import friendly_name
from innkeeper.cli.parser import usage_error
from innkeeper.cli.progress import conclude, follow
from innkeeper.client import ApiError, Innkeeper, Operation, vm_spec


def warm(inn: Innkeeper, args: Namespace) -> int:
    """Boot, wait, capture."""
    keys = public_keys(args.ssh_key)[0] if inn.image(args.image).get("cloud_init") else []
    name = args.name or f"{args.image.replace(':', '-')}-warm"
    spec = vm_spec(
        name.replace(".", "-"),
        args.image,
        cpus=args.cpus,
        memory=args.memory,
        disk=args.disk,
        firmware=args.firmware,
        ssh_keys=keys,
        user_data=text(args, "user_data"),
        network=args.network,
    )
    operation = inn.warm(args.image, spec, name=name, until=args.until, refresh=args.refresh, timeout=args.timeout)
    return conclude(args, operation, _warmed)


def _warmed(operation: Operation) -> str:
    name = operation.target
    return f"image {name} is warm\n" + terminal.paint(f"  try it: inn fork {name} --rm -- uname -a", "dim")


def fork(inn: Innkeeper, args: Namespace) -> int:
    """Fork, once or many times; with a command, run it there and end with its status."""
    if args.argv and args.count != 1:
        raise usage_error(args, "a command runs in one fork: drop --count")
    if args.rm and not args.argv:
        raise usage_error(args, "--rm needs a command after --; for a fork that goes by itself use --ttl")
    stem = args.name or friendly_name()
    names = [stem] if args.count == 1 else [f"{stem}-{number}" for number in range(1, args.count + 1)]
    if not args.argv:
        begun = time.monotonic()
        operations = _begin(inn, args, names)
        failed = _follow_all(args, operations)
        if args.output == "text" and not args.no_wait and len(names) > 1:
            done = len(names) - failed
            terminal.note(f"{done} forks of {args.source} are running after {time.monotonic() - begun:.1f} s")
        return 1 if failed else 0
    (operation,) = _begin(inn, args, names)
    _orderly_end()
    try:
        follow(operation)
        return run(inn.vm(operation.target), args)
    finally:
        if args.rm:
            _away(inn, operation)


def _begin(inn: Innkeeper, args: Namespace, names: list[str]) -> list[Operation]:
    more = {"snapshot": args.snapshot, "network": args.network, "ttl": args.ttl, "force": args.force}
    return inn.forks(args.source, names, **more)


def _follow_all(args: Namespace, operations: list[Operation]) -> int:
    from innkeeper.cli.main import report

    failed = 0
    for operation in operations:
        try:
            if not args.no_wait:
                follow(operation)
        except ApiError as error:
            failed += 1
            report(error)
            continue
        if args.output in ("text", "name"):
            ways = terminal.paint(f"  inn exec {operation.target} -- COMMAND", "dim")
            terminal.say(operation.target if args.output == "name" else f"{operation.target} is running{ways}")
    if args.output == "json":
        terminal.emit_json([operation.document for operation in operations])
    return failed


def _orderly_end() -> None:
    """A signal that would end us ends the command first, so that the fork can be taken away."""

    def leave(number: int, frame: FrameType | None) -> None:
        sys.exit(128 + number)

    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, leave)


def _away(inn: Innkeeper, operation: Operation) -> None:
    with suppress(ApiError):
        inn.vm(operation.target).delete(force=True)
