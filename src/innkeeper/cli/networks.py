"""`inn network …`."""

from __future__ import annotations

from argparse import Namespace
from typing import Any

from innkeeper.base.clock import age
from innkeeper.base.units import format_age
from innkeeper.cli import terminal
from innkeeper.cli.parser import usage_error
from innkeeper.cli.progress import conclude, conclude_all
from innkeeper.client import Innkeeper, Operation


def create(inn: Innkeeper, args: Namespace) -> int:
    if args.parent and args.mode not in (None, "bridged"):
        raise usage_error(args, f"--parent is for --mode bridged, and this is {args.mode}: drop one of the two")
    operation = inn.network_create(
        args.name,
        mode=args.mode or ("bridged" if args.parent else "nat"),
        parent=args.parent,
        subnet=args.subnet,
        ipv6=not args.no_ipv6,
        dns_domain=args.dns_domain,
        mtu=args.mtu,
        note=args.note,
    )
    return conclude(args, operation, lambda done: _made(inn, done))


def _made(inn: Innkeeper, operation: Operation) -> str:
    network = inn.network(operation.target)
    hint = terminal.paint(f"  join it: inn launch IMAGE --network {network['name']}", "dim")
    return f"network {network['name']} is ready: {network['mode']}, {_where(network)}\n{hint}"


def _where(network: dict[str, Any]) -> str:
    """Its subnet, or where its addresses come from."""
    return network["subnet"] or f"through {network['parent']}"


def ls(inn: Innkeeper, args: Namespace) -> int:
    networks = inn.networks()
    if args.output == "json":
        terminal.emit_json(networks)
    elif args.output == "name":
        for network in networks:
            terminal.say(network["name"])
    elif networks:
        heads = ("NAME", "MODE", "SUBNET", "IPV6", "STATE", "CARDS", "AGE", "NOTE")
        terminal.say(terminal.table(heads, [_row(network) for network in networks]))
    else:
        terminal.note("no networks yet; make one: inn network create lab")
    return 0


def _row(network: dict[str, Any]) -> tuple[terminal.Cell, ...]:
    return (
        (network["name"], "bold"),
        network["mode"],
        _where(network),
        network["prefix"] or (("none", "dim") if network["subnet"] else ("as outside", "dim")),
        (network["state"], "green" if network["state"] == "active" else "cyan"),
        str(len(network["cards"])),
        (format_age(age(network["created"])), "dim"),
        network["note"],
    )


def info(inn: Innkeeper, args: Namespace) -> int:
    network = inn.network(args.network)
    if args.output == "json":
        terminal.emit_json(network)
        return 0
    gateways = ", ".join(filter(None, (network["gateway"], network["gateway6"])))
    rows: list[tuple[str, Any]] = [
        ("Network", [(network["name"], "bold"), f"  {network['mode']}, {network['state']}"]),
        ("Subnets", ", ".join(filter(None, (network["subnet"], network["prefix"])))),
        ("Parent", network["parent"] and _parent(network)),
        ("Host", network["subnet"] and [f"{gateways} ", (f"on {network['bridge']}", "dim")]),
        ("Names", network["subnet"] and f"NAME.{network['domain']}"),
        ("MTU", network["mtu"] and f"{network['mtu']} bytes"),
        ("Note", network["note"]),
    ]
    for index, card in enumerate(network["cards"]):
        rows.append(("" if index else "Cards", f"{card['address'] or 'no address yet'}  {card['name']}"))
    if not network["cards"]:
        rows.append(("Cards", (f"none; inn launch IMAGE --network {network['name']}", "dim")))
    rows.append(("Id", (f"{network['id']}, made {format_age(age(network['created']))} ago", "dim")))
    terminal.say(terminal.page([(label, value) for label, value in rows if value]))
    return 0


def _parent(network: dict[str, Any]) -> list[terminal.Cell]:
    if network["bridge"] == network["parent"]:
        return [network["parent"], ("  a bridge that guests are plugged into", "dim")]
    return [network["parent"], (f"  in {network['bridge']}, which has the host's addresses meanwhile", "dim")]


def remove(inn: Innkeeper, args: Namespace) -> int:
    return conclude_all(args, args.networks, inn.network_delete, lambda done: f"network {done.target} is removed")
