"""`inn nic …`."""

from __future__ import annotations

from argparse import Namespace
from typing import Any

from innkeeper.cli import terminal
from innkeeper.cli.parser import usage_error
from innkeeper.cli.progress import conclude
from innkeeper.client import Innkeeper, Operation


def ls(inn: Innkeeper, args: Namespace) -> int:
    cards = inn.vm(args.vm).nics
    if args.output == "json":
        terminal.emit_json(cards)
    elif args.output == "name":
        for card in cards:
            terminal.say(str(card["index"]))
    elif cards:
        rows = [
            (
                (str(card["index"]), "bold"),
                card["mac"],
                card["model"],
                card["network"] or (where(card), "dim"),
                ", ".join(filter(None, (card["address"], card["address6"]))),
                (card["tap"] or card["function"] or "", "dim"),
                (str(card["dropped"]), "yellow") if card["dropped"] else "",
            )
            for card in cards
        ]
        terminal.say(terminal.table(("CARD", "MAC", "MODEL", "NETWORK", "ADDRESS", "TAP", "DROPPED"), rows))
    else:
        terminal.note(f"{args.vm} has no network card; plug one in: inn nic add {args.vm}")
    return 0


def add(inn: Innkeeper, args: Namespace) -> int:
    one_way(args, "network", "macvtap", "sriov", "mode")
    vm = inn.vm(args.vm)
    before = {card["index"] for card in vm.nics}
    if args.address and not args.network:
        raise usage_error(args, "--address is in a network: add --network")
    more = {"model": args.model, "mac": args.mac, "address": args.address}
    more |= {name: getattr(args, name) for name in ("macvtap", "macvtap_mode", "sriov", "vlan")}
    operation = vm.nic_add(network=args.network, mode=args.mode or "user", **more)
    return conclude(args, operation, lambda done: _added(inn, done, before))


def one_way(args: Namespace, *options: str) -> None:
    """A card is plugged in in one way only. Raises `UsageError`."""
    given = [f"--{name}" for name in options if getattr(args, name)]
    if len(given) > 1:
        two = " and ".join(given)
        raise usage_error(args, f"{two} are ways of saying where the card is plugged in: drop all but one")
    if args.macvtap_mode and not args.macvtap:
        raise usage_error(args, "--macvtap-mode is of --macvtap")
    if args.vlan and not args.sriov:
        raise usage_error(args, "--vlan is of --sriov")


def where(card: dict[str, Any]) -> str:
    """What a card is plugged into, in words."""
    words = {"user": "user-mode NAT", "none": "cable not plugged in"}
    if card["mode"] == "user" and card.get("backend") == "passt":
        return "user-mode NAT by passt"
    vlan = f", VLAN {card['vlan']}" if card.get("vlan") else ""
    return card.get("network") or words.get(card["mode"]) or f"{card['mode']} on {card.get('parent')}{vlan}"


def _added(inn: Innkeeper, operation: Operation, before: set[int]) -> str:
    (card,) = [card for card in inn.vm(operation.target).nics if card["index"] not in before]
    at = f"in {card['network']}, {card['address']}" if card["network"] else where(card)
    said = [f"{operation.target} has card {card['index']}: {card['mac']}, {at}"]
    said += [terminal.paint(terminal.clean(text), "yellow") for text in operation.result.get("warnings") or ()]
    return "\n".join(said)


def remove(inn: Innkeeper, args: Namespace) -> int:
    vm = inn.vm(args.vm)
    index = args.card
    if not index.isdecimal():
        mac = index.lower().replace("-", ":")
        index = next((str(card["index"]) for card in vm.nics if card["mac"] == mac), "")
    if not index:
        raise usage_error(args, f"{args.vm} has no card {args.card}: inn nic ls {args.vm}")
    return conclude(args, vm.nic_remove(int(index)), lambda done: f"card {index} of {done.target} is gone")
