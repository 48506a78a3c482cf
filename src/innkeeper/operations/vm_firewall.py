"""Change a VM's firewall rules or tags, at once if it runs.

The VM's document is written first, then the host is brought to what it says, in one transaction of nftables; undoing is
the same with the old document.
"""

from __future__ import annotations

from typing import Any

from pydantic import TypeAdapter

from innkeeper.base.errors import ActionRefused
from innkeeper.operations.engine import Context, Step, Verb, always
from innkeeper.operations.networks import follow
from innkeeper.operations.world import World
from innkeeper.plan.rules import with_change
from innkeeper.spec.firewall import AddRule, FirewallChange, FirewallRule, SetDefault, SetTags
from innkeeper.spec.vm import VMSpec
from innkeeper.store.contract import Value, update

CHANGE: TypeAdapter[FirewallChange] = TypeAdapter(FirewallChange)


async def check(world: World, vm: Value, change: FirewallChange) -> None:
    """What can be known to be wrong. Raises `InvalidInput`, `NotFound` also for a peer that is not there,
    `ActionRefused` where no card is one that rules can be for, or none can reach the host."""
    with_change(VMSpec.model_validate(vm["spec"]), change)
    if isinstance(change, SetTags):
        return
    if not any(nic["mode"] == "network" for nic in vm["spec"]["nics"]):
        raise ActionRefused(
            f"{vm['name']} has no card in a network, and rules are for those",
            hint=f"inn nic add {vm['name']} --network default plugs one in",
        )
    if isinstance(change, AddRule):
        await _check_peer(world, vm, change.rule)


async def _check_peer(world: World, vm: Value, rule: FirewallRule) -> None:
    kind, _, name = rule.peer.partition(":")
    if kind in ("vm", "network"):
        found = await world.find(kind, name)
        if kind == "network" and found["mode"] == "bridged":
            raise ActionRefused(
                f"who is in network {name} is not known by address: it is bridged", hint="name an address or subnet"
            )
    if rule.peer == "host" and rule.action == "allow":
        modes = {(await world.find("network", nic["network"]))["mode"] for nic in vm["spec"]["nics"] if nic["network"]}
        if not modes & {"nat", "host-only"}:
            raise ActionRefused(
                f"{vm['name']} is in no network from which the host is to be reached ({', '.join(sorted(modes))})",
                hint="nat and host-only networks are such",
            )


async def write(ctx: Context) -> None:
    """The VM's document."""
    key = f"vm/{ctx.target['id']}"
    vm = await ctx.world.find("vm", ctx.target["id"])
    if "old" not in ctx.data:
        ctx.data["old"] = {field: vm["spec"].get(field) for field in ("firewall", "tags")}
        await ctx.save(synced=False)
    before = VMSpec.model_validate(vm["spec"] | {k: v for k, v in ctx.data["old"].items() if v is not None})
    after = with_change(before, CHANGE.validate_python(ctx.args["change"]))
    fields = after.model_dump(mode="json", include={"firewall", "tags"})
    await update(ctx.world.store, key, lambda value: value | {"spec": value["spec"] | fields}, synced=False)
    ctx.result["vm"] = ctx.target["name"]


async def bring(ctx: Context) -> None:
    """The host has what the document says."""
    await follow(ctx.world, ctx.target["id"])
    vm = await ctx.world.find("vm", ctx.target["id"])
    ctx.result["warnings"] = remarks(vm, CHANGE.validate_python(ctx.args["change"]))


async def take_back(ctx: Context) -> None:
    """Undo of both."""
    if "old" not in ctx.data:
        return
    fields = {field: value for field, value in ctx.data["old"].items() if value is not None}
    await update(ctx.world.store, f"vm/{ctx.target['id']}", lambda value: value | {"spec": value["spec"] | fields})
    await follow(ctx.world, ctx.target["id"])


def remarks(vm: Value, change: FirewallChange) -> list[str]:
    """What whoever asked for it may not have thought of, in sentences."""
    said, name = [], vm["name"]
    if isinstance(change, SetDefault) and change.action == "deny":
        if change.direction == "out":
            said.append(f"this keeps {name} from DNS too: inn firewall allow {name} out udp 53 --to host")
        else:
            said.append(f"this keeps inn ssh out too: inn firewall allow {name} in tcp 22 --from host")
    wired = [(str(index), nic["mode"]) for index, nic in enumerate(vm["spec"]["nics"])]
    others = [index for index, mode in wired if mode not in ("network", "none", "absent")]
    if others and not isinstance(change, SetTags):
        said.append(f"rules are not for card {', '.join(others)} of {name}, which is in no network of Innkeeper's")
    return said


STEPS = (Step("write", write, take_back, unsynced=always), Step("bring", bring))
VERB = Verb("vm-firewall", STEPS)


def arguments(change: FirewallChange) -> dict[str, Any]:
    """What the journal keeps of a request."""
    return {"change": change.model_dump(mode="json")}
