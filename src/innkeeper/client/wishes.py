"""A wish in words → the document the API takes: `launch` options into a VM spec, `8080:80` into a port forward.

The daemon checks everything; here only what needs to be understood to write the document.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from innkeeper.base.errors import InvalidInput
from innkeeper.base.units import parse_rate, parse_size

_PUBLISH = re.compile(
    r"(?:(?P<address>[^:\[\]]+|\[[^\[\]]+\]):)?(?P<host>\d{1,5}):(?P<guest>\d{1,5})(?:/(?P<protocol>tcp|udp))?"
)


def parse_publish(text: str) -> dict[str, Any]:
    """`[ADDRESS:]HOST:GUEST[/udp]` → a port forward; an IPv6 address is in brackets. Raises `InvalidInput`."""
    match = _PUBLISH.fullmatch(text.strip())
    if not match or not all(1 <= int(match[port]) <= 65535 for port in ("host", "guest")):
        raise InvalidInput(f"{text!r} is not a port to publish", hint="write [ADDRESS:]HOST:GUEST[/udp], like 8080:80")
    forward: dict[str, Any] = {"host": int(match["host"]), "guest": int(match["guest"])}
    if match["protocol"]:
        forward["protocol"] = match["protocol"]
    if match["address"]:
        forward["address"] = match["address"].strip("[]")
    return forward


def endpoint(address: str, port: int) -> str:
    """`127.0.0.1:80`, `[::]:80`."""
    return f"[{address}]:{port}" if ":" in address else f"{address}:{port}"


def vm_spec(
    name: str,
    image: str | None = None,
    *,
    cpus: int | None = None,
    memory: str | int | None = None,
    disk: str | int | Iterable[str | int] | None = None,
    firmware: str | None = None,
    iso: str | os.PathLike[str] | None = None,
    publish: Iterable[str] = (),
    nic: str | None = None,
    network: str | None = None,
    macvtap: str | None = None,
    macvtap_mode: str | None = None,
    sriov: str | None = None,
    vlan: int | None = None,
    address: str | None = None,
    limit: str | int | None = None,
    user: str | None = None,
    ssh_keys: Iterable[str] = (),
    user_data: str | None = None,
    network_config: str | None = None,
    ignition: str | None = None,
    env: Mapping[str, str] | None = None,
    metadata: bool = False,
    tags: Iterable[str] = (),
    note: str = "",
) -> dict[str, Any]:
    """A VM spec. Sizes are bytes or text like `2G`; `disk` is the first disk's size, or one size per disk.

    What is left out is left to the daemon's defaults. Raises `InvalidInput` for a size or port that makes no sense.
    """
    first_boot: dict[str, Any] = {
        "user": user,
        "ssh_keys": list(ssh_keys),
        "user_data": user_data,
        "network_config": network_config,
        "ignition": ignition,
        "env": dict(env or {}),
    }
    forwards = [parse_publish(text) for text in publish]
    ways = {"network": network, "macvtap": macvtap, "sriov": sriov, nic or "user": nic}
    if len(chosen := [f"{mode} {where}" for mode, where in ways.items() if where]) > 1:
        raise InvalidInput(f"a card cannot be plugged in twice: {' and '.join(chosen)}", hint="drop one of the two")
    mode = next((mode for mode, where in ways.items() if where), "user")
    card: dict[str, Any] = {"mode": mode, "publish": forwards}
    more = {"network": network, "parent": macvtap or sriov, "macvtap_mode": macvtap_mode, "vlan": vlan}
    more["address"] = address
    if nic == "passt":
        more |= {"mode": "user", "backend": "passt"}
    card |= {key: value for key, value in more.items() if value}
    if limit:
        card["limit"] = parse_rate(limit)
    if nic == "none" and forwards:
        raise InvalidInput("ports cannot be published without a network card's cable", hint="drop `nic=none`")
    wish: dict[str, Any] = {
        "name": name,
        "image": image,
        "cpus": cpus,
        "memory": None if memory is None else parse_size(memory),
        "firmware": firmware,
        "iso": None if iso is None else str(Path(iso).absolute()),
        "disks": None,
        "nics": [card] if chosen or forwards else None,
        "first_boot": {key: value for key, value in first_boot.items() if value not in (None, [], {})} or None,
        "metadata": metadata or None,
        "tags": list(tags) or None,
        "note": note or None,
    }
    if disk is not None:
        sizes = [disk] if isinstance(disk, (str, int)) else list(disk)
        wish["disks"] = [{"size": parse_size(size)} for size in sizes]
    return {key: value for key, value in wish.items() if value is not None}
