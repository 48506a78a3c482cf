"""Make a network: claim its name and a subnet that is free; make its bridge, rules and dnsmasq; record it as active."""

from __future__ import annotations

from contextlib import suppress

from innkeeper.base.clock import now
from innkeeper.base.errors import Conflict, InvalidInput, NameTaken, NotFound, ToolMissing, Unsupported
from innkeeper.base.ids import new_id
from innkeeper.network.uplink import check_parent
from innkeeper.operations.engine import Context, Step, Verb
from innkeeper.operations.networks import follow_rules_about
from innkeeper.operations.world import World
from innkeeper.plan.network import Subnet, check_subnet, free_subnet, network_of, network_record
from innkeeper.spec.network import NetworkSpec
from innkeeper.store.contract import Value, update

SUBNETS = "subnets/ipv4"
"""Which network has which subnet, in one document: of two that are made at once, the second sees the first's."""


async def claim(ctx: Context) -> None:
    """Record the network as `creating`, with its name and its subnet, in one transaction."""
    world, spec = ctx.world, NetworkSpec.model_validate(ctx.args["spec"])
    if "network" not in ctx.data:
        ctx.data["network"] = ctx.target["id"] = new_id()
        ctx.data["hold"] = f"network/{ctx.data['network']}"
        await ctx.save()
    network_id = ctx.data["network"]
    while not await world.store.get(f"network/{network_id}"):
        taken = await world.store.get(SUBNETS)
        subnet, onto = await _subnet(world, spec), False
        if spec.parent:
            onto = await check_parent(spec.parent)
            await _check_parent_is_free(world, spec.parent)
        record = network_record(network_id, spec, subnet, now(), onto_bridge=onto)
        record["operation"] = {"id": ctx.operation, "kind": ctx.kind}
        writes: dict[str, Value | None] = {
            f"network/{network_id}": record,
            f"name/network/{spec.name}": {"id": network_id, "name": spec.name},
            # also of a network without one: of two that want the same parent, the second sees the first
            SUBNETS: (taken.value if taken else {}) | {network_id: record["subnet"]},
        }
        checks = dict.fromkeys(writes, 0) | {SUBNETS: taken.revision if taken else 0}
        try:
            await world.store.transact(writes, checks)
        except Conflict as conflict:
            if conflict.facts["key"] != SUBNETS:
                raise name_taken(spec.name) from None


async def _check_parent_is_free(world: World, parent: str) -> None:
    """Raises `InvalidInput` where another network is about to take it in."""
    for document in await world.store.list("network/"):
        if document.value.get("parent") == parent and not document.value["onto_bridge"]:
            raise InvalidInput(
                f"{parent} is the parent of network {document.value['name']} already",
                hint="join that one: more than one VM may", field="parent",
            )  # fmt: skip


async def _subnet(world: World, spec: NetworkSpec) -> Subnet | None:
    """What was asked for, or one that is free; none for a bridged network. Raises `InvalidInput`, `Unsupported`."""
    if spec.mode == "bridged":
        return None
    others = [network_of(document.value) for document in await world.store.list("network/")]
    routes = await world.fabric.subnets_of_host()
    if spec.subnet is None:
        return free_subnet(
            [*(other.subnet for other in others if other.subnet), *(route for route in routes if route.prefixlen)]
        )
    wanted = Subnet(spec.subnet)
    check_subnet(wanted, others, routes)
    return wanted


def name_taken(name: str) -> NameTaken:
    return NameTaken(f"there is a network named {name!r} already", hint="inn network ls", name=name)


async def unclaim(ctx: Context) -> None:
    """Forget the network and give back what it had claimed."""
    await forget(ctx.world, ctx.data.get("network"))


async def forget(world: World, network_id: str | None) -> None:
    """Delete every document of a network, in one transaction."""
    if not network_id:
        return
    while document := await world.store.get(f"network/{network_id}"):
        writes: dict[str, Value | None] = dict.fromkeys((document.key, f"name/network/{document.value['name']}"))
        checks = {}
        if taken := await world.store.get(SUBNETS):
            writes[SUBNETS] = {key: subnet for key, subnet in taken.value.items() if key != network_id} or None
            checks[SUBNETS] = taken.revision
        with suppress(Conflict):
            await world.store.transact(writes, checks)


async def make(ctx: Context) -> None:
    """From here it is on the host."""
    await ctx.world.fabric.add(network_of(await ctx.world.find("network", ctx.data["network"])))


async def unmake(ctx: Context) -> None:
    """Where this daemon may not make networks, it has made nothing."""
    document = await ctx.world.store.get(f"network/{ctx.data['network']}")
    if document is not None:
        with suppress(Unsupported, ToolMissing):
            await ctx.world.fabric.remove(network_of(document.value))


async def settle(ctx: Context) -> None:
    """VMs may join it from now on."""
    network = await update(ctx.world.store, f"network/{ctx.data['network']}", lambda value: value | {"state": "active"})
    ctx.result["network"] = network["name"]
    await follow_rules_about(ctx.world, network["name"])
    if not ctx.data.get("told"):
        ctx.data["told"] = True
        target = {"kind": "network", "id": network["id"], "name": network["name"]}
        await ctx.world.events.append("network.created", f"network {network['name']} was created", target=target)


async def unsettle(ctx: Context) -> None:
    """No VM joins it while it is taken away."""
    with suppress(NotFound):
        await update(ctx.world.store, f"network/{ctx.data['network']}", lambda value: value | {"state": "creating"})


STEPS = (Step("claim", claim, unclaim), Step("make", make, unmake), Step("settle", settle, unsettle))
VERB = Verb("network-create", STEPS)
