"""Delete a network that no VM is in: from every state, and to the end also after a crash."""

from __future__ import annotations

from innkeeper.base.errors import InUse
from innkeeper.operations.engine import Context, Step, Verb
from innkeeper.operations.network_create import forget
from innkeeper.operations.networks import cards, follow_rules_about
from innkeeper.operations.world import World
from innkeeper.plan.network import network_of
from innkeeper.store.contract import Value, update


async def users(world: World, network_id: str) -> list[Value]:
    """The cards in a network: {name, nic, address} of each, by VM."""
    found = [
        {key: card[key] for key in ("name", "nic", "address")} for card in await cards(world, f"address/{network_id}/")
    ]
    return sorted(found, key=lambda card: (card["name"], card["nic"]))


async def check_unused(world: World, network: Value) -> None:
    """Raises `InUse` where a VM is in it, running or not."""
    if names := sorted({card["name"] for card in await users(world, network["id"])}):
        text = f"network {network['name']} is that of {', '.join(names)}"
        raise InUse(text, hint="remove those VMs first", users=names)


async def mark(ctx: Context) -> None:
    """From here there is no way back. No VM joins after this look: the mark fails the claim of one that had read
    the network before (`networks.py: claim_checks`)."""
    key = f"network/{ctx.target['id']}"
    network = await update(ctx.world.store, key, lambda network: network | {"state": "deleting"})
    try:
        await check_unused(ctx.world, network)
    except InUse:
        await update(ctx.world.store, key, lambda network: network | {"state": "active"})
        raise


async def unmake(ctx: Context) -> None:
    """Bridge, rules and dnsmasq are gone; with the last network, everything else of ours too."""
    await ctx.world.fabric.remove(network_of(await ctx.world.find("network", ctx.target["id"])))


async def forget_it(ctx: Context) -> None:
    """Give back its name and its subnet."""
    if await ctx.world.store.get(f"network/{ctx.target['id']}"):
        await forget(ctx.world, ctx.target["id"])
        await follow_rules_about(ctx.world, ctx.target["name"])
        text = f"network {ctx.target['name']} was deleted"
        await ctx.world.events.append("network.deleted", text, target=dict(ctx.target))


STEPS = (Step("mark", mark, keep=True), Step("unmake", unmake, keep=True), Step("forget", forget_it, keep=True))
VERB = Verb("network-delete", STEPS, cancellable=False)
