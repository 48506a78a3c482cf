"""`inn start`, `stop`, `restart`, `pause`, `resume`, `rm`: each on one VM or several."""

from __future__ import annotations

from argparse import Namespace

from innkeeper.cli import identity
from innkeeper.cli.progress import conclude_all
from innkeeper.cli.snapshots import warn
from innkeeper.client import Innkeeper, Operation


def _act(inn: Innkeeper, args: Namespace, action: str, said: str) -> int:
    timeout: float | None = getattr(args, "timeout", None)
    force = bool(getattr(args, "force", False))

    def done(operation: Operation) -> str:
        warn(operation)
        return f"{operation.target}: {operation.text}" if operation.idle else f"{operation.target} {said}"

    return conclude_all(args, args.vms, lambda name: inn.vm(name).act(action, force=force, timeout=timeout), done)


def start(inn: Innkeeper, args: Namespace) -> int:
    return _act(inn, args, "start", "is running")


def stop(inn: Innkeeper, args: Namespace) -> int:
    return _act(inn, args, "stop", "is stopped")


def restart(inn: Innkeeper, args: Namespace) -> int:
    return _act(inn, args, "restart", "is running again")


def pause(inn: Innkeeper, args: Namespace) -> int:
    return _act(inn, args, "pause", "is paused")


def resume(inn: Innkeeper, args: Namespace) -> int:
    return _act(inn, args, "resume", "is running")


def remove(inn: Innkeeper, args: Namespace) -> int:
    def gone(operation: Operation) -> str:
        if not args.no_wait and (vm_id := operation.document["target"].get("id")):
            identity.forget(str(vm_id))
        warn(operation)
        return f"{operation.target} is removed"

    return conclude_all(args, args.vms, lambda name: inn.vm(name).act("delete", force=args.force), gone)
