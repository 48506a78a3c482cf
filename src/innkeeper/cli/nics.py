"""`inn nic …`."""

from __future__ import annotations

from argparse import Namespace

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
        words = {"user": "user-mode NAT", "none": "cable not plugged in"}
        rows = [
            (
                (str(card["index"]), "bold"),
                card["mac"],
                card["model"],
                card["network"] or (words.get(card["mode"], card["mode"]), "dim"),
                ", ".join(filter(None, (card["address"], card["address6"]))),
                (card["tap"] or "", "dim"),
                (str(card["dropped"]), "yellow") if card["dropped"] else "",
            )
            for card in cards
        ]
        terminal.say(terminal.table(("CARD", "MAC", "MODEL", "NETWORK", "ADDRESS", "TAP", "DROPPED"), rows))
    else:
        terminal.note(f"{args.vm} has no network card; plug one in: inn nic add {args.vm}")
    return 0


def add(inn: Innkeeper, args: Namespace) -> int:
    if args.network and args.mode:
        raise usage_error(args, "--network and --mode are two ways of saying where the card is plugged in: drop one")
    vm = inn.vm(args.vm)
    before = {card["index"] for card in vm.nics}
    if args.address and not args.network:
        raise usage_error(args, "--address is in a network: add --network")
    more = {"model": args.model, "mac": args.mac, "address": args.address}
    operation = vm.nic_add(network=args.network, mode=args.mode or "user", **more)
    return conclude(args, operation, lambda done: _added(inn, done, before))


def _added(inn: Innkeeper, operation: Operation, before: set[int]) -> str:
    (card,) = [card for card in inn.vm(operation.target).nics if card["index"] not in before]
    where = f"in {card['network']}, {card['address']}" if card["network"] else "user-mode NAT"
    return f"{operation.target} has card {card['index']}: {card['mac']}, {where}"


def remove(inn: Innkeeper, args: Namespace) -> int:
    vm = inn.vm(args.vm)
    index = args.card
    if not index.isdecimal():
        mac = index.lower().replace("-", ":")
        index = next((str(card["index"]) for card in vm.nics if card["mac"] == mac), "")
    if not index:
        raise usage_error(args, f"{args.vm} has no card {args.card}: inn nic ls {args.vm}")
    return conclude(args, vm.nic_remove(int(index)), lambda done: f"card {index} of {done.target} is gone")
