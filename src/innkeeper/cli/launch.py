"""`inn launch`."""

from __future__ import annotations

import sys
import time
from argparse import Namespace
from pathlib import Path
from typing import Any

from innkeeper.cli import identity, terminal
from innkeeper.cli.execute import environment
from innkeeper.cli.keys import public_keys
from innkeeper.cli.names import friendly_name
from innkeeper.cli.nics import one_way
from innkeeper.cli.parser import usage_error
from innkeeper.cli.progress import conclude
from innkeeper.cli.vms import ports
from innkeeper.client import ApiError, Innkeeper, Operation, vm_spec

TRIES = 5
"""Friendly names to try before giving up."""


def launch(inn: Innkeeper, args: Namespace) -> int:
    """Make the spec, begin, follow, and say how to get in."""
    if not args.image and not args.iso:
        raise usage_error(args, "name an image to start from, or a disc with --iso (images: inn image ls)")
    if args.nic == "none" and args.publish:
        raise usage_error(args, "--publish needs a network card whose cable is plugged in: drop --nic none")
    one_way(args, "network", "macvtap", "sriov", "nic")
    if args.address and not args.network:
        raise usage_error(args, "--address is in a network: add --network (inn network ls)")
    if args.limit and not args.network:
        raise usage_error(args, "--limit is of a card in a network: add --network (inn network ls)")
    if args.metadata and not args.network:
        raise usage_error(args, "--metadata is asked through a network: add --network (inn network ls)")
    if args.iso and not Path(args.iso).is_file():
        raise usage_error(args, f"--iso {args.iso}: there is no such file")
    keys, private = _keys(inn, args)
    options: dict[str, Any] = {
        "image": args.image,
        "cpus": args.cpus,
        "memory": args.memory,
        "disk": args.disk,
        "firmware": args.firmware,
        "iso": args.iso,
        "publish": args.publish or (),
        "nic": args.nic,
        "network": args.network,
        "macvtap": args.macvtap,
        "macvtap_mode": args.macvtap_mode,
        "sriov": args.sriov,
        "vlan": args.vlan,
        "address": args.address,
        "limit": args.limit,
        "user": args.user,
        "ssh_keys": keys,
        "user_data": text(args, "user_data"),
        "network_config": text(args, "network_config"),
        "ignition": text(args, "ignition"),
        "env": environment(args, args.env or ()),
        "metadata": args.metadata,
        "tags": args.tag or (),
        "note": args.note,
    }
    operation = _begin(inn, args, options)
    if args.ssh_key and private:
        _remember(inn, operation, private)
    return conclude(args, operation, lambda done: _said(inn, done))


def _begin(inn: Innkeeper, args: Namespace, options: dict[str, Any]) -> Operation:
    for attempt in range(TRIES):
        spec = vm_spec(args.name or friendly_name(), **options)
        try:
            return inn.create(spec, start=not args.no_start, force=args.force)
        except ApiError as error:
            if args.name or error.code != "name-taken" or attempt == TRIES - 1:
                raise
    raise AssertionError("unreachable")


def _remember(inn: Innkeeper, operation: Operation, private: list[Path]) -> None:
    """Keep which keys open this guest, as soon as it has an id: its operation has only just begun."""
    for _ in range(30):
        try:
            return identity.remember(inn.vm(operation.target).info["id"], private)
        except ApiError as error:
            if error.status != 404 or operation.poll().ended:
                return
            time.sleep(0.1)


def _keys(inn: Innkeeper, args: Namespace) -> tuple[list[str], list[Path]]:
    """The keys asked for; by default the person's where the image would read them."""
    if args.ssh_key:
        return public_keys(args.ssh_key)
    if not args.image or args.ignition or not inn.image(args.image).get("cloud_init"):
        return [], []
    return public_keys(None)


def text(args: Namespace, option: str) -> str | None:
    """The text of the file that an option names; `-` is stdin."""
    name = getattr(args, option)
    if name is None:
        return None
    try:
        return sys.stdin.read() if name == "-" else Path(name).expanduser().read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise usage_error(args, f"{name} is not UTF-8 text") from None


def _said(inn: Innkeeper, operation: Operation) -> str:
    """What there is now, and how to get in."""
    vm = inn.vm(operation.target).info
    name = vm["name"]
    rows: list[tuple[str, Any]] = [
        ("VM", [(name, "bold"), " is ", terminal.state(vm["state"])]),
        ("Ports", ports(vm)),
    ]
    ways = []
    if vm["state"] == "stopped":
        ways.append(f"inn start {name}")
    elif inn.vm(name).has_ssh:
        ways.append(f"inn ssh {name}")
    elif vm.get("agent"):
        ways.append(f"inn exec {name} -- COMMAND")
    ways += [f"inn console {name}", f"inn logs {name}"] if vm["state"] != "stopped" else []
    rows.append(("Enter" if vm["state"] != "stopped" else "Start", ways[0]))
    if ways[1:]:
        rows.append(("Look", ", ".join(ways[1:])))
    rows += [("Warning", (str(text), "yellow")) for text in operation.result.get("warnings") or ()]
    return terminal.page([(label, value) for label, value in rows if value])
