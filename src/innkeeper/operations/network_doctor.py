"""What is wrong with the host's network, on request and before a boot; with `fix` what is safe to put right is."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import structlog

from innkeeper.network.survey import survey
from innkeeper.operations.engine import Context
from innkeeper.operations.networks import networks, nics
from innkeeper.operations.world import World
from innkeeper.plan import doctor_parents
from innkeeper.plan.doctor import Finding, diagnose
from innkeeper.plan.network import Network
from innkeeper.plan.survey import Ours
from innkeeper.store.contract import Value

log = structlog.get_logger()


async def examine(world: World, name: str | None = None, *, fix: bool = False) -> list[Finding]:
    """Of one network, or of all. With `fix` those that are safe are put right, and come marked as `fixed`. Raises
    `NotFound`, `NetworkFailed`."""
    wanted = [(await world.find("network", name))["name"]] if name else None
    found = await _findings(world, wanted)
    if not fix or not any(finding.fixable for finding in found):
        return found
    for text in await world.fabric.heal(look_at_rules=True):
        await world.events.append("network.healed", text, level="warning")
    left = await _findings(world, wanted)
    fixed = [finding for finding in found if finding.fixable and finding not in left]
    return [replace(finding, fixed=True) for finding in fixed] + left


async def _findings(
    world: World, wanted: list[str] | None, vms: list[Value] | None = None, *, quick: bool = False
) -> list[Finding]:
    """Of these networks, or of all; and of the interfaces that cards of these VMs are on."""
    known = await networks(world)
    looked_at = [network for network in known.values() if wanted is None or network.name in wanted]
    below = doctor_parents.parents(await world.vms() if vms is None else vms) if wanted is None or vms else []
    if not looked_at and not below:
        return []
    ours = await _ours(world, known, quick)
    seen = await survey(ours.nics, quick=quick)
    return [*doctor_parents.diagnose(below, seen), *diagnose(ours, seen, looked_at, quick=quick)]


async def _ours(world: World, known: dict[str, Network], quick: bool) -> Ours:
    # before a boot not looked at: it is healed within seconds, and takes the longer the more VMs there are
    whole, without = (True, frozenset[str]()) if quick else await world.fabric.condition()
    return Ours(
        networks=tuple(known.values()),
        nics=tuple([nic for vm in await world.vms() for nic in await nics(world, vm, known)]),
        taken=Counter(document.key.split("/")[1] for document in await world.store.list("address/")),
        rules_whole=whole,
        without_resolver=without,
    )


async def warn_before_boot(ctx: Context, vm: Value) -> None:
    """What would keep the guest from its networks is said in the operation's result and in the events. It starts all
    the same."""
    wanted = [nic["network"] for nic in vm["spec"]["nics"] if nic.get("network")]
    on_host = any(nic.get("parent") for nic in vm["spec"]["nics"])
    if not (wanted or on_host) or ctx.data.get("examined"):
        return
    ctx.data["examined"] = True
    try:
        found = await _findings(ctx.world, wanted, [vm], quick=True)
    except Exception:  # whatever is wrong with the doctor, or the host, a VM starts without it
        log.exception("no look at the network before a boot", vm=vm["name"])
        return
    target = {"kind": "vm", "id": vm["id"], "name": vm["name"]}
    for finding in found:
        if finding.level != "note":
            text = f"{finding.what}: {finding.consequence}"
            ctx.result["warnings"] = [*ctx.result.get("warnings", ()), f"{text} (inn network doctor says more)"]
            await ctx.world.events.append("network.warning", text, target=target, level="warning", code=finding.code)
