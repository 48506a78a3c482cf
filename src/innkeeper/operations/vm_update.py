"""Give a VM a changed spec. A running one is restarted with it only by whoever asks for that."""

from __future__ import annotations

from innkeeper.machine.states import LIVE
from innkeeper.operations.engine import Context, Step, Verb
from innkeeper.plan.record import public_spec
from innkeeper.spec.vm import VMSpec
from innkeeper.store.contract import Value, update


async def write(ctx: Context) -> None:
    """The new spec counts from the next start on."""
    spec = VMSpec.model_validate(ctx.args["spec"])

    def change(vm: Value) -> Value | None:
        ctx.data.setdefault("old", vm["spec"])
        new = public_spec(spec) | {"first_boot": vm["spec"]["first_boot"]}
        return vm | {"spec": new, "pending": vm["state"] in LIVE}

    await update(ctx.world.store, f"vm/{ctx.target['id']}", change)
    ctx.result["vm"] = ctx.target["name"]


async def unwrite(ctx: Context) -> None:
    """The old spec again."""
    if old := ctx.data.get("old"):
        await update(ctx.world.store, f"vm/{ctx.target['id']}", lambda vm: vm | {"spec": old, "pending": False})


VERB = Verb("vm-update", (Step("write", write, unwrite),))
