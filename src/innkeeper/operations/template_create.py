"""Seal the disks of a VM as a template: copied as they are, cleaned if that is asked for, scanned for what must not be
in an image, and published as one that nobody changes any more."""

from __future__ import annotations

from contextlib import ExitStack

from innkeeper.base.errors import AgentFailed, NotSealed, Unsupported
from innkeeper.base.nofollow import open_file, write_file
from innkeeper.host.users import errand_uid
from innkeeper.operations import image_make
from innkeeper.operations.chains import chain, layer_path, role_of
from innkeeper.operations.engine import Context, Step, Verb
from innkeeper.operations.snapshots import MOST_NVRAM, all_layers
from innkeeper.operations.vm_clone import MOST_LAYER
from innkeeper.operations.world import World
from innkeeper.plan.chain import Chain, Layer
from innkeeper.plan.seal import KINDS, clean_script, findings, scan_script
from innkeeper.plan.snapshot import lineage
from innkeeper.qemu.agent_exec import capture
from innkeeper.qemu.reader import reading
from innkeeper.storage.copy import copy_files
from innkeeper.storage.formats.qcow2 import read_size
from innkeeper.store.contract import Value

READER = "tiny"
"""The image whose kernel looks into the disks."""
ALLOWED = 900.0
"""Seconds for a look into all disks."""


async def next_version(world: World, name: str) -> str:
    """One more than the highest number among a template's versions."""
    documents = await world.store.list(f"name/image/{name}:")
    versions = [document.key.rpartition(":")[2] for document in documents]
    return str(1 + max((int(version) for version in versions if version.isdigit()), default=0))


async def copy(ctx: Context) -> None:
    """All layers of all disks, and the UEFI variables, into the workspace. The VM does not run meanwhile."""
    world = ctx.world
    vm, workspace = await _vm(ctx), await image_make.new_workspace(ctx)
    layers, folder = await all_layers(world), world.home.vm(vm["id"])
    files: dict[str, str] = {}
    sizes: list[int] = []
    with ExitStack() as opened:
        pairs = []
        for disk, top in enumerate(vm["disks"]):
            for below, layer in enumerate(lineage(layers, top)):
                role = role_of(disk) + (f"-below{below}" if below else "")
                files[role] = f"{role}.qcow2"
                source = opened.enter_context(open_file(layer_path(world, layers[layer]), MOST_LAYER))
                pairs.append((source.fileno(), workspace / files[role]))
                if below == 0:
                    sizes.append(read_size(source.fileno()))
        if pairs:
            await copy_files(pairs, report=ctx.report)
    try:
        with open_file(folder / "nvram.fd", MOST_NVRAM) as variables:
            write_file(workspace / "nvram.fd", variables)
            files["nvram"] = "nvram.fd"
    except FileNotFoundError:
        pass
    base = await world.find("image", vm["image"]["id"]) if vm["image"] else {}
    name, _, version = ctx.target["name"].partition(":")
    ctx.data["image_fields"] = {
        "kind": "template", "files": files, "format": "qcow2", "virtual_size": sizes[0],
        "user": vm["spec"]["first_boot"]["user"] or base.get("user", ""), "agent": base.get("agent", False),
        "cloud_init": base.get("cloud_init", True), "min_memory": base.get("min_memory", 0), "base": base.get("id"),
        "template": {
            "name": name, "version": version, "vm": vm["name"], "by": ctx.args["by"], "note": ctx.args["note"],
            "firmware": vm["spec"]["firmware"], "disks": sizes, "scanned": False, "cleaned": False, "accepted": [],
        },
        "source": {"vm": vm["name"]} | ({"image": base["name"], "digests": base["digests"]} if base else {}),
    }  # fmt: skip


async def clean(ctx: Context) -> None:
    """With --clean: what every machine makes anew goes, from the copy."""
    if ctx.args["clean"]:
        ctx.report(None, "cleaning")
        await _in_reader(ctx, clean_script(), write=True)
        ctx.data["image_fields"]["template"]["cleaned"] = True


async def scan(ctx: Context) -> None:
    """Raises `NotSealed` with the list, unless it was accepted before; it is recorded then."""
    template, name = ctx.data["image_fields"]["template"], ctx.target["name"]
    ctx.report(None, "looking for what must not be in it")
    try:
        found = findings(await _in_reader(ctx, scan_script(), write=False))
    except Unsupported:
        if not ctx.args["accept"]:
            raise
        ctx.result["warnings"] = [f"{name} was not scanned: there is no image {READER}"]
        return
    template |= {"scanned": True, "accepted": found}
    ctx.result["findings"] = found
    if found and not ctx.args["accept"]:
        listed = "".join(f"\n  {one['path']}  ({KINDS[one['kind']]})" for one in found[:40])
        more = f"\n  and {len(found) - 40} more" if len(found) > 40 else ""
        clean = "" if ctx.args["clean"] else "--clean removes host keys, machine-id, histories, what cloud-init left; "
        raise NotSealed(
            f"{name} would have in it what must not be in an image:{listed}{more}",
            hint=f"{clean}remove it in {(await _vm(ctx))['name']}, or --accept seals it as it is",
            findings=found,
        )


async def _in_reader(ctx: Context, script: str, *, write: bool) -> str:
    """What a script prints in a guest of ours that has the copied disks. Raises `Unsupported` where there is none."""
    world, host = ctx.world, await ctx.world.host_with_qemu()
    pointer = await world.store.get(f"name/image/{READER}")
    reader = await world.store.get(f"image/{pointer.value['id']}") if pointer else None
    if reader is None or reader.value["kind"] != "kernel" or not reader.value["agent"]:
        raise Unsupported(
            f"to look into the disks of a template there must be an image {READER}",
            hint=f"inn image build {READER}; or --accept, and nobody has looked",
        )
    image = reader.value
    folder = world.home.image(image["id"])
    async with reading(
        host, folder / image["files"]["kernel"], folder / image["files"]["initrd"], image["cmdline"],
        await _disks(ctx), user=errand_uid(), write=write,
    ) as agent:  # fmt: skip
        ended, said, wrong = await capture(agent, ["/bin/sh", "-s"], stdin=script.encode(), timeout=ALLOWED)
    if ended.status != 0:
        raise AgentFailed(f"the disks could not be looked into: {wrong.decode(errors='replace').strip()[-500:]}")
    return said.decode(errors="replace")


async def _disks(ctx: Context) -> list[Chain]:
    """The copied disks, on the images that they stand on."""
    vm, fields = await _vm(ctx), ctx.data["image_fields"]
    workspace, found = ctx.world.home.workspace(ctx.operation), []
    for disk, top in enumerate(vm["disks"]):
        whole = await chain(ctx.world, vm["id"], top, absolute=True)
        names = [file for role, file in fields["files"].items() if role.split("-")[0] == role_of(disk)]
        copied = [Layer(f"copy{disk}-{n}", str(workspace / name)) for n, name in enumerate(reversed(names))]
        found.append((*whole[: len(whole) - len(copied)], *copied))
    return found


async def _vm(ctx: Context) -> Value:
    return await ctx.world.find("vm", ctx.args["vm"])


STEPS = (
    image_make.CLAIM,
    Step("copy", copy, image_make.remove_workspace),
    Step("clean", clean),
    Step("scan", scan),
    *image_make.PUBLISH,
)
VERB = Verb("template-create", STEPS)
