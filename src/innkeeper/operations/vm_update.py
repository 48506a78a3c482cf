"""Give a VM a changed spec. A running one is restarted with it only by whoever asks for that."""

from __future__ import annotations

from innkeeper.base.errors import Conflict
from innkeeper.machine.states import LIVE
from innkeeper.operations.engine import Context, Step, Verb
from innkeeper.operations.vm_create import claim_ports
from innkeeper.plan.identity import macs
from innkeeper.plan.record import public_spec
from innkeeper.spec.vm import VMSpec
from innkeeper.store.contract import Value


async def write(ctx: Context) -> None:
    """The new spec counts from the next start on. The host ports that it adds are claimed, those it drops given back,
    in the same transaction."""
    spec = VMSpec.model_validate(ctx.args["spec"])
    vm = await ctx.world.find("vm", ctx.target["id"])
    if "old" not in ctx.data:
        ctx.data["old"] = {field: vm[field] for field in ("spec", "identity", "pending")}
        ctx.data["old_ports"] = [d.key for d in await ctx.world.store.list("port/") if d.value["id"] == vm["id"]]
        await ctx.save()
    identity = vm["identity"]
    ports, ssh_port = await claim_ports(ctx, spec, _owner(ctx), identity["slot"], identity["ssh_port"])
    changed = {
        "spec": public_spec(spec) | {"first_boot": vm["spec"]["first_boot"]},
        "identity": identity | {"macs": list(macs(vm["id"], spec)), "ssh_port": ssh_port},
    }
    if not await _change(ctx, changed, set(ports)):
        await write(ctx)
    ctx.result["vm"] = ctx.target["name"]


async def unwrite(ctx: Context) -> None:
    """The old spec and the old ports again. Raises `Conflict` when another VM has taken one of them."""
    if "old" in ctx.data and not await _change(ctx, ctx.data["old"], set(ctx.data["old_ports"])):
        raise Conflict(f"the host ports that {ctx.target['name']} had are taken")


async def _change(ctx: Context, fields: Value, ports: set[str]) -> bool:
    """Set fields of the VM and have it claim exactly these ports; False when one of them was taken meanwhile."""
    store = ctx.world.store
    had = {d.key for d in await store.list("port/") if d.value["id"] == ctx.target["id"]}
    writes: dict[str, Value | None] = dict.fromkeys(ports - had, _owner(ctx)) | dict.fromkeys(had - ports)
    while True:
        document = await store.get(f"vm/{ctx.target['id']}")
        assert document is not None  # this operation holds it
        vm = {"pending": document.value["state"] in LIVE} | fields
        try:
            checks = {document.key: document.revision, **dict.fromkeys(ports - had, 0)}
            await store.transact({document.key: document.value | vm, **writes}, checks)
            return True
        except Conflict as conflict:
            if conflict.facts["key"] != document.key:
                return False


def _owner(ctx: Context) -> Value:
    return {"id": ctx.target["id"], "name": ctx.target["name"]}


VERB = Verb("vm-update", (Step("write", write, unwrite),))
