"""Give a VM a changed spec. A running one is restarted with it only by whoever asks for that."""

from __future__ import annotations

from innkeeper.base.errors import ActionRefused, Conflict
from innkeeper.machine.states import LIVE
from innkeeper.operations.engine import Context, Step, Verb
from innkeeper.operations.networks import claim_addresses, claim_checks, follow
from innkeeper.operations.vm_create import claim_ports
from innkeeper.plan.identity import macs
from innkeeper.plan.pci import SPARES
from innkeeper.plan.record import public_spec
from innkeeper.spec.vm import VMSpec
from innkeeper.store.contract import Value

CLAIMS = ("port/", "address/")
PARENT = ("parent", "macvtap_mode", "vlan")
"""Fields of a card on an interface of the host."""
AT_ONCE = ("firewall", "tags", "note")
"""Fields of a spec that no QEMU has anything to do with."""


async def write(ctx: Context) -> None:
    """The new spec counts from the next start on."""
    spec = VMSpec.model_validate(ctx.args["spec"])
    vm = await ctx.world.find("vm", ctx.target["id"])
    old = ctx.data["old"]["spec"] if "old" in ctx.data else vm["spec"]
    if vm["state"] in LIVE and _networks(public_spec(spec)) != _networks(old):
        raise ActionRefused(
            f"{vm['name']} is {vm['state']}, so its cards stay in their networks, with their addresses",
            hint=f"inn nic add and rm change that while it runs; or inn stop {vm['name']} first",
        )
    cards = vm["identity"].get("cards")
    if cards is not None and len(spec.nics) > cards + SPARES:
        cards = None
    waits = vm["state"] in LIVE and (vm["pending"] or _of_qemu(public_spec(spec)) != _of_qemu(old))
    await rewrite(ctx, spec, {"cards": cards}, pending=waits)
    await follow(ctx.world, vm["id"])


def _of_qemu(spec: Value) -> Value:
    """What a running QEMU keeps until the next start."""
    return {field: value for field, value in spec.items() if field not in AT_ONCE}


def _networks(spec: Value) -> list[tuple[str | None, ...]]:
    return [
        (nic.get("network") and nic.get("mac"), *(nic.get(key) for key in ("network", "address", *PARENT)))
        for nic in spec["nics"]
    ]


async def rewrite(ctx: Context, spec: VMSpec, identity: Value, *, pending: bool) -> None:
    """Give the VM this spec and these fields of its identity. Host ports and addresses that it adds are claimed, those
    it drops given back, in the same transaction."""
    vm = await ctx.world.find("vm", ctx.target["id"])
    if "old" not in ctx.data:
        ctx.data["old"] = {field: vm[field] for field in ("spec", "identity", "pending")}
        ctx.data["old_claims"] = await _claims(ctx)
        await ctx.save()
    owner = {"id": ctx.target["id"], "name": ctx.target["name"]}
    while True:
        ports, ssh_port = await claim_ports(ctx, spec, owner, vm["identity"]["slot"], vm["identity"]["ssh_port"])
        addresses = await claim_addresses(ctx.world, spec, owner)
        fields = {
            "spec": public_spec(spec) | {"first_boot": vm["spec"]["first_boot"]},
            "identity": vm["identity"] | identity | {"macs": list(macs(vm["id"], spec)), "ssh_port": ssh_port},
            "pending": pending,
        }
        if await _change(ctx, fields, ports | addresses):
            break
    ctx.result["vm"] = ctx.target["name"]


async def unwrite(ctx: Context) -> None:
    """The old spec, the old ports and addresses again. Raises `Conflict` when another VM has taken one of them."""
    if "old" not in ctx.data:
        return
    if not await _change(ctx, ctx.data["old"], ctx.data["old_claims"]):
        raise Conflict(f"the host ports or addresses that {ctx.target['name']} had are taken")
    await follow(ctx.world, ctx.target["id"])


async def _claims(ctx: Context) -> dict[str, Value]:
    documents = [document for prefix in CLAIMS for document in await ctx.world.store.list(prefix)]
    return {document.key: document.value for document in documents if document.value["id"] == ctx.target["id"]}


async def _change(ctx: Context, fields: Value, claims: dict[str, Value]) -> bool:
    """Set fields of the VM and have it claim exactly this; False when some of it was taken meanwhile."""
    store = ctx.world.store
    had = await _claims(ctx)
    new = {key: value for key, value in claims.items() if key not in had}
    writes: dict[str, Value | None] = {**new, **dict.fromkeys(had.keys() - claims.keys())}
    while True:
        document = await store.get(f"vm/{ctx.target['id']}")
        assert document is not None  # this operation holds it
        checks = {document.key: document.revision, **await claim_checks(ctx.world, new)}
        try:
            await store.transact({document.key: document.value | fields, **writes}, checks)
            return True
        except Conflict as conflict:
            if not str(conflict.facts["key"]).startswith(("vm/", "network/")):
                return False


VERB = Verb("vm-update", (Step("write", write, unwrite),))
