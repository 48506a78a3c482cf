"""`inn firewall …` and `inn tag …`."""

from __future__ import annotations

import socket
from argparse import Namespace
from contextlib import suppress
from typing import Any

from innkeeper.base.clock import age
from innkeeper.base.units import format_age
from innkeeper.cli import terminal
from innkeeper.cli.parser import usage_error
from innkeeper.cli.progress import conclude
from innkeeper.client import Innkeeper, Operation

ACTIONS = {"allow": "green", "deny": "red"}
PREPOSITIONS = {"in": "from", "out": "to"}


def ls(inn: Innkeeper, args: Namespace) -> int:
    firewall = inn.vm(args.vm).firewall.overview()
    if args.output == "json":
        terminal.emit_json(firewall)
        return 0
    rows = [
        (
            (str(rule["number"]), "bold"),
            rule["direction"],
            (rule["action"], ACTIONS[rule["action"]]),
            rule["protocol"],
            ", ".join(rule["ports"]),
            _peer(rule),
            (_packets(rule["packets"]), "dim"),
            rule["note"],
        )
        for rule in firewall["rules"]
    ]
    for direction, action in (("in", firewall["inbound"]), ("out", firewall["outbound"])):
        seen = (_packets(firewall["defaults"][direction]), "dim")
        rows.append((("else", "dim"), direction, (action, ACTIONS[action]), "any", "", "", seen, ""))
    terminal.say(terminal.table(("RULE", "WAY", "DOES", "PROTOCOL", "PORTS", "PEER", "JUDGED", "NOTE"), rows))
    if firewall["tags"]:
        terminal.say(f"\ntags: {' '.join(firewall['tags'])}")
    return 0


def _packets(number: int) -> str:
    return f"{number} packet{'' if number == 1 else 's'}" if number else ""


def _peer(rule: dict[str, Any]) -> str:
    return "" if rule["peer"] == "any" else f"{PREPOSITIONS[rule['direction']]} {rule['peer']}"


def allow(inn: Innkeeper, args: Namespace) -> int:
    return _add(inn, args, "allow")


def deny(inn: Innkeeper, args: Namespace) -> int:
    return _add(inn, args, "deny")


def _add(inn: Innkeeper, args: Namespace, action: str) -> int:
    wrong = args.to if args.direction == "in" else args.source
    if wrong is not None:
        right, other = ("--from", "--to") if args.direction == "in" else ("--to", "--from")
        raise usage_error(args, f"what goes {args.direction} is {right[2:]} somebody: {right} instead of {other}")
    ports = tuple(filter(None, (args.ports or "").split(",")))
    peer = args.source or args.to or "any"
    operation = inn.vm(args.vm).firewall.add(
        action, args.direction, args.protocol, ports, peer=peer, at=args.at, note=args.note
    )
    return conclude(args, operation, lambda done: _said(done, _added(inn, done, args)))


def _added(inn: Innkeeper, operation: Operation, args: Namespace) -> str:
    rules = inn.vm(operation.target).firewall.overview()["rules"]
    rule = rules[(args.at or len(rules)) - 1]
    words = (rule["action"], rule["direction"], rule["protocol"], ",".join(rule["ports"]), _peer(rule))
    return f"rule {rule['number']} of {operation.target}: {' '.join(filter(None, words))}"


def remove(inn: Innkeeper, args: Namespace) -> int:
    operation = inn.vm(args.vm).firewall.remove(args.rule)
    return conclude(args, operation, lambda done: _said(done, f"rule {args.rule} of {done.target} is gone"))


def default(inn: Innkeeper, args: Namespace) -> int:
    operation = inn.vm(args.vm).firewall.default(args.direction, args.action)
    what = "comes in" if args.direction == "in" else "goes out"
    verdict = "passes" if args.action == "allow" else "is dropped"
    return conclude(
        args, operation, lambda done: _said(done, f"what {what} and fits no rule of {done.target} {verdict}")
    )


def tag(inn: Innkeeper, args: Namespace) -> int:
    operation = inn.vm(args.vm).firewall.tag(add=args.tags)
    return conclude(args, operation, lambda done: _said(done, f"{done.target} has {' '.join(args.tags)}"))


def untag(inn: Innkeeper, args: Namespace) -> int:
    operation = inn.vm(args.vm).firewall.tag(remove=args.tags)
    return conclude(args, operation, lambda done: _said(done, f"{done.target} has {' '.join(args.tags)} no more"))


def _said(operation: Operation, text: str) -> str:
    remarks = [terminal.paint(f"  {remark}", "yellow") for remark in operation.result.get("warnings") or ()]
    return "\n".join([text, *remarks])


def log(inn: Innkeeper, args: Namespace) -> int:
    vm = inn.vm(args.vm)
    denied = vm.firewall.log()
    if args.output == "json":
        terminal.emit_json(denied)
        return 0
    for entry in reversed(denied):
        when = (f"{format_age(age(entry['last']))} ago".rjust(8), "dim")
        terminal.say(terminal.paint(*when) + "  " + sentence(args.vm, entry))
    if not denied:
        terminal.note(f"the rules of {args.vm} have denied nothing within a day")
    for card in vm.nics:
        if card["dropped"]:
            text = f"card {card['index']} has sent {_packets(card['dropped'])} as somebody else, or as a router"
            terminal.say(terminal.paint(f"besides: {text}: dropped", "yellow"))
    return 0


def sentence(vm: str, entry: dict[str, Any]) -> str:
    """`db (10.77.0.5) was kept from TCP port 22 (ssh) of web: 3 packets; rule 2`."""
    peer = f"{entry['name']} ({entry['peer']})" if entry["name"] else entry["peer"]
    who, whom = (peer, vm) if entry["direction"] == "in" else (vm, peer)
    why = f"rule {entry['rule']}" if entry["rule"] else f"the default for what goes {entry['direction']}"
    return f"{who} was kept from {_what(entry)} of {whom}: {_packets(entry['packets'])}; {why}"


def _what(entry: dict[str, Any]) -> str:
    protocol = {"ipv6-icmp": "ICMPv6"}.get(entry["protocol"], entry["protocol"].upper())
    if entry["port"] is None:
        return f"the {protocol}"
    name = ""
    with suppress(OSError):
        name = f" ({socket.getservbyport(entry['port'], entry['protocol'])})"
    return f"{protocol} port {entry['port']}{name}"
