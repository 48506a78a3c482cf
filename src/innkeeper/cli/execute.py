"""`inn exec`."""

from __future__ import annotations

import os
import sys
from argparse import Namespace
from collections.abc import Iterable
from typing import BinaryIO

from innkeeper.cli import terminal
from innkeeper.cli.parser import usage_error
from innkeeper.client import VM, Innkeeper


def execute(inn: Innkeeper, args: Namespace) -> int:
    """Run the command; its bytes go through unchanged, and its status is ours."""
    if not args.argv:
        raise usage_error(args, f"no command: inn exec {args.vm} -- COMMAND…")
    return run(inn.vm(args.vm), args)


def run(vm: VM, args: Namespace) -> int:
    """The same in a VM that was just made."""
    stdin = None if args.no_stdin else _stdin()
    env = environment(args, args.env or ())
    options = {"stdin": stdin, "env": env, "cwd": args.cwd, "timeout": args.timeout}
    if args.output == "json":
        result = vm.exec(args.argv, **options)
        terminal.emit_json(
            {
                "stdout": result.stdout.decode(errors="replace"),
                "stderr": result.stderr.decode(errors="replace"),
                "status": result.status,
            }
        )
        return result.status
    streams = {"stdout": sys.stdout.buffer, "stderr": sys.stderr.buffer}
    for kind, value in vm.exec_stream(args.argv, **options):
        if kind == "exit":
            return int(value)
        if kind == "signal":
            terminal.note(f"inn: the command was ended by signal {value}")
            return 128 + int(value)
        if kind in streams:
            streams[kind].write(value)
            streams[kind].flush()
    return 1


def environment(args: Namespace, pairs: Iterable[str]) -> dict[str, str]:
    """`K=V`, or `K` with the value it has here. Raises `UsageError` for a K that is not set."""
    env: dict[str, str] = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not equals and name not in os.environ:
            raise usage_error(args, f"--env {name}: not set here; write {name}=VALUE")
        env[name] = value if equals else os.environ[name]
    return env


def _stdin() -> BinaryIO | None:
    try:
        return None if sys.stdin is None or sys.stdin.isatty() else sys.stdin.buffer
    except ValueError:  # closed
        return None
