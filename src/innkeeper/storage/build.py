"""Build a golden image from a recipe, in a folder of its own.

What is made here is published by others: a build that fails or is cancelled leaves nothing outside its workspace.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from innkeeper.base.errors import InvalidInput
from innkeeper.spec.recipe import Firmware, Recipe
from innkeeper.storage import build_initramfs as initramfs
from innkeeper.storage.build_disk import build_disk
from innkeeper.storage.build_packages import Report, own_space, unpack
from innkeeper.storage.cage import Limits, run_tool


@dataclass(frozen=True)
class Built:
    """A finished image, with its files in the workspace and what one must know to boot it."""

    boot: Literal["disk", "kernel"]
    files: Mapping[str, str]
    """Role → file name: `disk`, or `kernel` and `initrd`."""
    virtual_size: int
    """Bytes of the disk; 0 without one."""
    cmdline: str | None
    """For `kernel`: the kernel command line."""
    user: str
    firmware: tuple[Firmware, ...]
    has_agent: bool
    has_cloud_init: bool
    min_memory: int
    """Bytes."""
    inputs: Mapping[str, Any]
    """What it was made from: recipe name and digest, suite, kernel package, package → version."""


async def build(recipe: Recipe, workspace: Path, *, job: str, report: Report) -> Built:
    """Build `recipe` in `workspace`, an existing private folder of which everything is wiped first.

    `report(fraction, text)` is called as the work advances: 0 to 1, or None while that is unknown.
    Raises `ToolMissing`, `ToolFailed`, `ToolTimeout`, `RecipeInvalid`, and `Unsupported` when the host's apt does not
    know Debian.
    """
    await _wipe(workspace, job)
    try:
        built = await (_build_initramfs if recipe.initramfs else _build_disk)(recipe, workspace, job, report)
    except BaseException:
        await _wipe(workspace, job)
        raise
    report(1.0, "built")
    return built


async def _build_initramfs(recipe: Recipe, workspace: Path, job: str, report: Report) -> Built:
    assert recipe.initramfs is not None
    wanted, root = recipe.initramfs, workspace / "root"
    packages = await unpack(recipe, root, workspace=workspace, job=job, report=_part(report, 0.0, 0.9))
    report(0.9, "packing the initramfs")
    release = initramfs.kernel_release(root)
    tree = initramfs.base_tree()
    if recipe.files_folder:
        initramfs.add_overlay(tree, recipe.files_folder)
    initramfs.add_programs(tree, root, wanted.programs)
    initramfs.add_modules(tree, root, release, wanted.modules, wanted.extra_modules)
    if "busybox" in wanted.programs:
        busybox = next(path for path in (root / "usr/bin/busybox", root / "bin/busybox") if path.exists())
        applets = await run_tool([busybox, "--list-full"], limits=Limits(seconds=30), job=job)
        initramfs.link_applets(tree, applets.split())
        tree.link("init", "usr/sbin/init")
    initramfs.write_initramfs(tree, workspace / "initrd", wanted.compression)
    (root / f"boot/vmlinuz-{release}").replace(workspace / "kernel")
    (workspace / "kernel").chmod(0o644)
    _keep_only(workspace, {"kernel", "initrd"})
    return _built(recipe, packages, {"kernel": "kernel", "initrd": "initrd"}, 0)


async def _build_disk(recipe: Recipe, workspace: Path, job: str, report: Report) -> Built:
    packages, size = await build_disk(
        recipe,
        workspace,
        job=job,
        report=_part(report, 0.0, 0.95),
        convert_report=_part(report, 0.95, 1.0),
    )
    _keep_only(workspace, {"disk.qcow2"})
    return _built(recipe, packages, {"disk": "disk.qcow2"}, size)


def _built(recipe: Recipe, packages: dict[str, str], files: dict[str, str], virtual_size: int) -> Built:
    return Built(
        boot="disk" if recipe.disk else "kernel",
        files=files,
        virtual_size=virtual_size,
        cmdline=None if recipe.disk else recipe.cmdline,
        user=recipe.user,
        firmware=tuple(recipe.firmware),
        has_agent=recipe.guest_agent,
        has_cloud_init=recipe.cloud_init,
        min_memory=recipe.min_memory,
        inputs={
            "recipe": recipe.name,
            "recipe_digest": recipe_digest(recipe),
            "suite": recipe.suite,
            "architecture": recipe.architecture,
            "kernel": recipe.kernel,
            "packages": packages,
        },
    )


def recipe_digest(recipe: Recipe) -> str:
    """SHA-256 over the recipe's fields and the files it names, so that a changed script is a changed recipe."""
    digest = hashlib.sha256(recipe.model_dump_json().encode())
    folder = recipe.files_folder
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()] if folder else []
    named = [(path.relative_to(folder).as_posix(), path) for path in files if folder]
    if recipe.script_file:
        named.append(("", recipe.script_file))
    for name, path in named:
        digest.update(name.encode() + b"\0" + hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()


def _part(report: Report, start: float, end: float) -> Report:
    """`report` for a part of the whole."""
    return lambda fraction, text: report(None if fraction is None else start + (end - start) * min(1.0, fraction), text)


async def _wipe(workspace: Path, job: str) -> None:
    """Empty the workspace; what belongs to subordinate ids goes in the user namespace that made it."""
    if not workspace.is_absolute() or not workspace.is_dir() or workspace.is_symlink():
        raise InvalidInput(f"workspace {str(workspace)!r} is not an absolute path of a folder")
    try:
        _keep_only(workspace, set())
    except PermissionError:
        await run_tool(
            [*await own_space(job), "find", workspace, "-xdev", "-mindepth", "1", "-delete"],
            limits=Limits(seconds=300),
            job=job,
            no_new_privs=False,
        )


def _keep_only(workspace: Path, names: set[str]) -> None:
    for entry in list(workspace.iterdir()):
        if entry.name in names:
            continue
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        else:
            entry.unlink()
