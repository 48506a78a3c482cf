"""The network `default`: nat, made when the first VM asks for it: nobody has to begin with `inn network create`."""

from __future__ import annotations

from collections.abc import Iterable

from innkeeper.base.errors import NetworkFailed
from innkeeper.operations.engine import Engine
from innkeeper.operations.world import World
from innkeeper.spec.network import DEFAULT, NetworkSpec

LONGEST = 60.0
"""Seconds."""


async def ensure_default(world: World, engine: Engine, wanted: Iterable[str | None]) -> None:
    """Make it if it is among the networks that are `wanted` and is not there. Raises `NetworkFailed` with the
    reason why it could not be made."""
    if DEFAULT not in wanted or await world.store.get(f"name/network/{DEFAULT}"):
        return
    spec = NetworkSpec(name=DEFAULT, note="made on first use")
    target = {"kind": "network", "id": None, "name": DEFAULT}
    made = await engine.submit("network-create", target, {"spec": spec.model_dump(mode="json")})
    made = await engine.wait(made["id"], made["revision"], LONGEST, to_its_end=True)
    error = made["error"]
    if error and error["code"] != "name-taken":  # by another request for the same
        raise NetworkFailed(f"the network {DEFAULT} cannot be made: {error['detail']}", hint=error["hint"])
