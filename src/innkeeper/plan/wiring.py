"""What a VM's NICs are after a change: pure functions.

A card's number is for life: its MAC, its address, its tap and its PCI port follow from it. So one that goes leaves an
empty place where others are behind it, and the next one comes into the first empty place.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import assert_never

from pydantic import ValidationError

from innkeeper.base.errors import ActionRefused, InvalidInput, NotFound, PortTaken, Unsupported
from innkeeper.plan.identity import Identity
from innkeeper.plan.pci import SPARES
from innkeeper.spec.nic import EVERYWHERE, EVERYWHERE4, NicSpec, PortForward
from innkeeper.spec.quantity import said
from innkeeper.spec.vm import VMSpec
from innkeeper.spec.wiring import AddNic, Change, Publish, RemoveNic, SetNic, Unpublish

MOST = 8
"""NICs of a VM."""
ABSENT = NicSpec(mode="absent")


def changed(spec: VMSpec, identity: Identity, change: Change) -> tuple[VMSpec, Identity]:
    """The spec after a change, and the identity but for its MACs. Raises `InvalidInput`, `NotFound`, `PortTaken`,
    `Unsupported`, `ActionRefused`."""
    nics = list(spec.nics)
    cards = identity.cards
    match change:
        case Publish(forward=forward):
            index = _card(spec, change.nic)
            _check_unpublished(spec, identity, forward)
            if nics[index].mode == "user" and forward.address == EVERYWHERE:
                forward = forward.model_copy(update={"address": EVERYWHERE4})  # all that there is
            nics[index] = _with(nics[index], index, {"publish": (*nics[index].publish, forward)})
        case Unpublish(host=host, protocol=protocol):
            nics = [_without(nic, host, protocol) for nic in nics]
            if nics == list(spec.nics):
                raise NotFound(f"{spec.name} does not publish host port {host}/{protocol}", hint="inn ports")
        case AddNic(nic=nic):
            cards, index = _place(spec, cards)
            nics[index : index + 1] = [nic]
        case SetNic():
            nics[change.index] = _set(_existing(spec, change.index), change)
        case RemoveNic(index=index):
            _existing(spec, index)
            cards = len(nics) if cards is None else cards
            nics[index] = ABSENT
            while nics and nics[-1].mode == "absent":
                nics.pop()
        case _:
            assert_never(change)
    macs = [nic.mac for nic in nics if nic.mac]
    if len(macs) != len(set(macs)):
        raise InvalidInput(f"{spec.name} has a card with this MAC address already", field="mac")
    return spec.model_copy(update={"nics": tuple(nics)}), identity.model_copy(update={"cards": cards})


def check_live(spec: VMSpec, identity: Identity, change: SetNic) -> None:
    """Raise `ActionRefused` for what a card of a running VM cannot become: QEMU has no words for it."""
    old, new = spec.nics[change.index], _set(spec.nics[change.index], change)
    for what, before, after in (
        ("model", old.model, new.model),
        ("MAC address", identity.macs[change.index], new.mac or identity.macs[change.index]),
        ("mode", old.mode, new.mode),
    ):
        if before != after:
            raise ActionRefused(
                f"the {what} of card {change.index} is {before} for as long as {spec.name} runs",
                hint=f"inn stop {spec.name} first; or take the card away (inn nic rm) and add another (inn nic add)",
            )


def replugged(old: VMSpec, new: VMSpec) -> list[int]:
    """Cards that have come into another network or have another address there: their guest has to ask for it."""
    pairs = enumerate(zip(old.nics, new.nics, strict=False))
    return [
        index
        for index, (before, after) in pairs
        if before.mode == after.mode == "network" and (before.network, before.address) != (after.network, after.address)
    ]


def _set(nic: NicSpec, change: SetNic) -> NicSpec:
    """The card with what the change names. Raises `InvalidInput`."""
    wish = {key: value for key, value in change if key in NicSpec.model_fields and value is not None}
    if change.network and nic.parent:
        raise InvalidInput(
            f"card {change.index} is on {nic.parent} of the host, past Innkeeper's networks, and comes into none",
            field="network", hint=f"take it away (inn nic rm) and add another: inn nic add --network {change.network}",
        )  # fmt: skip
    if change.network not in (None, nic.network):
        wish = {"mode": "network", "address": None, "backend": "qemu"} | wish
    if change.limit == 0:
        wish["limit"] = None
    if not wish:
        raise InvalidInput("nothing of the card is to change", hint="say what: --network, --limit, --link, …")
    return _with(nic, change.index, wish)


def _with(nic: NicSpec, index: int, fields: Mapping[str, object]) -> NicSpec:
    """The card with these fields. Raises `InvalidInput`."""
    try:
        return NicSpec.model_validate({**dict(nic), **fields})
    except ValidationError as error:
        (first, *_) = error.errors()
        raise InvalidInput(f"card {index}: {said(first)}", field=".".join(map(str, first["loc"]))) from None


def _existing(spec: VMSpec, index: int) -> NicSpec:
    if index >= len(spec.nics) or spec.nics[index].mode == "absent":
        raise NotFound(f"{spec.name} has no card {index}", hint=f"inn nic ls {spec.name}")
    return spec.nics[index]


def _card(spec: VMSpec, wanted: int | None) -> int:
    if wanted is not None:
        nic = _existing(spec, wanted)
        if nic.mode not in ("user", "network"):
            why = _past_the_host(nic) if nic.parent else "nothing comes in there"
            raise ActionRefused(f"card {wanted} of {spec.name} is of mode {nic.mode}: {why}")
        return wanted
    for index, nic in enumerate(spec.nics):
        if nic.mode in ("user", "network"):
            return index
    for index, nic in enumerate(spec.nics):
        if nic.parent:
            raise ActionRefused(
                f"no card of {spec.name} can have a port published; card {index} is of mode {nic.mode}:"
                f" {_past_the_host(nic)}",
                hint=f"inn nic add {spec.name} --network NETWORK",
            )
    raise ActionRefused(
        f"{spec.name} has no network card that is plugged in", hint=f"inn nic add {spec.name} --network NETWORK"
    )


def _past_the_host(nic: NicSpec) -> str:
    return f"its packets go past this host, and others outside {nic.parent} reach the guest's own address"


def _check_unpublished(spec: VMSpec, identity: Identity, forward: PortForward) -> None:
    where = f"host port {forward.host}/{forward.protocol}"
    for nic in spec.nics:
        for other in nic.publish:
            if (other.protocol, other.host) == (forward.protocol, forward.host):
                raise PortTaken(
                    f"{where} leads to port {other.guest} of {spec.name} already",
                    hint=f"inn unpublish {spec.name} {other.host}", port=other.host, holder=spec.name,
                )  # fmt: skip
    if forward.protocol == "tcp" and forward.host == identity.ssh_port:
        raise PortTaken(
            f"{where} leads to SSH of {spec.name}", hint="choose another", port=forward.host, holder=spec.name
        )


def _without(nic: NicSpec, host: int, protocol: str) -> NicSpec:
    kept = tuple(forward for forward in nic.publish if (forward.host, forward.protocol) != (host, protocol))
    return nic.model_copy(update={"publish": kept})


def _place(spec: VMSpec, cards: int | None) -> tuple[int | None, int]:
    """(cards with root ports of their own, the first empty place)."""
    index = next((at for at, nic in enumerate(spec.nics) if nic.mode == "absent"), len(spec.nics))
    cards = len(spec.nics) if cards is None else cards
    if index >= MOST or index - cards >= SPARES:
        raise Unsupported(f"{spec.name} has no place for another card", hint=f"inn nic rm {spec.name} takes one away")
    return cards, index
