"""`inn nic …`."""

from __future__ import annotations

from argparse import Namespace

from innkeeper.base.units import format_rate
from innkeeper.cli import terminal
from innkeeper.cli.parser import usage_error
from innkeeper.cli.progress import conclude
from innkeeper.cli.vms import described, where
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
                format_rate(card["limit"]) if card["limit"] else "",
                ("down", "yellow") if card["link"] == "down" else "",
                (card["tap"] or card["function"] or "", "dim"),
                (str(card["dropped"]), "yellow") if card["dropped"] else "",
            )
            for card in cards
        ]
        terminal.say(
            terminal.table(("CARD", "MAC", "MODEL", "NETWORK", "ADDRESS", "LIMIT", "LINK", "TAP", "DROPPED"), rows)
        )
    else:
        terminal.note(f"{args.vm} has no network card; plug one in: inn nic add {args.vm}")
    return 0


def add(inn: Innkeeper, args: Namespace) -> int:
    one_way(args, "network", "macvtap", "sriov", "mode")
    vm = inn.vm(args.vm)
    before = {card["index"] for card in vm.nics}
    for option in ("address", "limit"):
        if getattr(args, option) and not args.network:
            raise usage_error(args, f"--{option} is of a card in a network: add --network")
    more = {"model": args.model, "mac": args.mac, "address": args.address, "limit": args.limit}
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


def _added(inn: Innkeeper, operation: Operation, before: set[int]) -> str:
    (card,) = [card for card in inn.vm(operation.target).nics if card["index"] not in before]
    said = [f"{operation.target} has card {card['index']}: {', '.join(filter(None, described(card)))}"]
    said += [terminal.paint(terminal.clean(text), "yellow") for text in operation.result.get("warnings") or ()]
    return "\n".join(said)


def change(inn: Innkeeper, args: Namespace) -> int:
    vm, index = inn.vm(args.vm), _index(inn, args)
    wish = {key: getattr(args, key) for key in ("network", "address", "limit", "link", "model", "mac")}
    if not any(wish.values()):
        raise usage_error(args, "nothing of the card is to change: say what, like --network or --limit")
    return conclude(args, vm.nic_set(index, **wish), lambda done: _is(inn, done, index))


def _is(inn: Innkeeper, operation: Operation, index: int) -> str:
    (card,) = [card for card in inn.vm(operation.target).nics if card["index"] == index]
    return f"card {index} of {operation.target}: {', '.join(filter(None, described(card)))}"


def remove(inn: Innkeeper, args: Namespace) -> int:
    index = _index(inn, args)
    return conclude(args, inn.vm(args.vm).nic_remove(index), lambda done: f"card {index} of {done.target} is gone")


def _index(inn: Innkeeper, args: Namespace) -> int:
    """The card that is meant by its number or its MAC address."""
    if args.card.isdecimal():
        return int(args.card)
    mac = args.card.lower().replace("-", ":")
    for card in inn.vm(args.vm).nics:
        if card["mac"] == mac:
            return int(card["index"])
    raise usage_error(args, f"{args.vm} has no card {args.card}: inn nic ls {args.vm}")
