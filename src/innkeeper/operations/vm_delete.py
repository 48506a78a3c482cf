"""Delete a VM: from every state, and to the end also after a crash."""

from __future__ import annotations

from innkeeper.base.clock import now
from innkeeper.base.errors import InUse, NotFound
from innkeeper.operations.chains import clones_of
from innkeeper.operations.engine import Context, Step, Verb
from innkeeper.operations.vm_create import discard_folder, forget
from innkeeper.operations.world import World
from innkeeper.store.contract import Value, update


async def check_alone(world: World, vm: Value) -> None:
    """Linked clones may stand on its disks: then it stays (DESIGN.md 5.11). Raises `InUse`."""
    if clones := await clones_of(world, vm["id"]):
        raise InUse(
            f"the disks of {vm['name']} are those that {', '.join(clones)} stand on",
            hint=f"delete those linked clones first; inn clone {clones[0]} NEW makes one that stands on its own",
            users=clones,
        )


async def mark(ctx: Context) -> None:
    """From here there is no way back."""
    stamp = now()
    vm = await ctx.world.store.get(f"vm/{ctx.target['id']}")
    if vm is not None and vm.value["state"] != "deleting":
        await check_alone(ctx.world, vm.value)
    try:
        await update(
            ctx.world.store,
            f"vm/{ctx.target['id']}",
            lambda vm: None if vm["state"] == "deleting" else vm | {"state": "deleting", "reason": "", "since": stamp},
        )
    except NotFound:
        return  # the daemon died after it was forgotten


async def kill(ctx: Context) -> None:
    """End its QEMU. Whoever asked has passed admission: it was stopped, or --force was given."""
    await ctx.world.machines.discard(ctx.target["id"])


async def delete_files(ctx: Context) -> None:
    """Its disks are gone after this."""
    discard_folder(ctx, ctx.target["id"])


async def forget_it(ctx: Context) -> None:
    """Give back its name, number and ports."""
    if await ctx.world.store.get(f"vm/{ctx.target['id']}"):
        await forget(ctx, ctx.target["id"])
        await ctx.world.events.append("vm.deleted", f"{ctx.target['name']} was deleted", target=dict(ctx.target))


STEPS = (
    Step("mark", mark, keep=True),
    Step("kill", kill, keep=True),
    Step("delete-files", delete_files, keep=True),
    Step("forget", forget_it, keep=True),
)
VERB = Verb("vm-delete", STEPS, cancellable=False)
