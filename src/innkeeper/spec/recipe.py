"""A recipe: how a golden image is made. A YAML file with the files it needs in a folder beside it.

The package carries `recipes/`; in a source checkout they lie at its root.
"""

from __future__ import annotations

import re
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PrivateAttr,
    StringConstraints,
    ValidationError,
    model_validator,
)

from innkeeper.base.errors import InvalidInput, NotFound, RecipeInvalid
from innkeeper.base.ids import IMAGE_NAME_PATTERN
from innkeeper.base.units import MIB, parse_size
from innkeeper.spec.quantity import said

Suite = Literal["bookworm", "trixie"]
Firmware = Literal["bios", "uefi"]

PackageName = Annotated[str, StringConstraints(pattern=r"^[a-z0-9][a-z0-9+.-]+$")]
"""Debian policy 5.6.7."""
ModuleName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_-]+$")]
ProgramName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_+.-]+$")]
UserName = Annotated[str, StringConstraints(pattern=r"^[a-z_][a-z0-9_-]{0,31}$")]
CommandLine = Annotated[str, StringConstraints(pattern=r"^[\x21-\x7e]+( [\x21-\x7e]+)*$", max_length=1024)]


def _size(value: Any) -> int:
    if not isinstance(value, str | int) or isinstance(value, bool):
        raise ValueError(f"{value!r} is not a size; write it like 512M or 2G")
    try:
        return parse_size(value)
    except InvalidInput as error:
        raise ValueError(f"{error.detail}; {error.hint}" if error.hint else error.detail) from error


def _inside(value: Any) -> str:
    path = PurePosixPath(value) if isinstance(value, str) and value else None
    if path is None or path.is_absolute() or ".." in path.parts:
        raise ValueError(f"{value!r} must be a path inside the recipes folder")
    return str(path)


Size = Annotated[int, BeforeValidator(_size), Field(ge=MIB)]
"""Bytes; written like 64M."""
InnerPath = Annotated[str, BeforeValidator(_inside)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class InitramfsRecipe(_Strict):
    """A guest whose root is its initramfs; the host hands kernel and initrd to QEMU."""

    compression: Literal["none", "zstd"] = "none"
    programs: list[ProgramName] = Field(min_length=1)
    """Names of programs in the packages' bin and sbin folders; their shared libraries come along."""
    modules: list[ModuleName] = []
    """Kernel modules to load at boot, in this order."""
    extra_modules: list[ModuleName] = []
    """Kernel modules that are only there for `modprobe`."""


class DiskRecipe(_Strict):
    """A disk with GPT, GRUB for BIOS and UEFI, and an ext4 root that grows at first boot."""

    esp: Size = 64 * MIB
    """Size of the EFI system partition."""
    free: Size = 512 * MIB
    """Room left in the root file system before it grows."""
    script: InnerPath | None = None
    """Run by /bin/sh inside the finished root."""
    modules: list[ModuleName] = []
    """Kernel modules of the guest's initramfs; those the kernel has not are left out."""
    mask: list[Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9@_.\\-]+\.[a-z]+$")]] = []
    """systemd units that a guest does not need."""


class Recipe(_Strict):
    """What to build; exactly one of `disk` and `initramfs` says as what."""

    name: Annotated[str, StringConstraints(pattern=IMAGE_NAME_PATTERN)]
    description: Annotated[str, StringConstraints(min_length=1, max_length=200)]
    suite: Suite
    architecture: Literal["amd64"] = "amd64"
    kernel: PackageName
    """The package that brings the kernel."""
    packages: list[PackageName] = []
    user: UserName
    """Who one logs in as."""
    guest_agent: bool
    cloud_init: bool
    min_memory: Size
    firmware: list[Firmware] = Field(min_length=1)
    cmdline: CommandLine
    """Kernel command line, without the root device."""
    files: InnerPath | None = None
    """A folder whose files are copied into the root; one that begins with `#!` becomes executable."""
    disk: DiskRecipe | None = None
    initramfs: InitramfsRecipe | None = None

    _folder: Path = PrivateAttr(default=Path())

    @model_validator(mode="after")
    def _one_kind(self) -> Self:
        if (self.disk is None) == (self.initramfs is None):
            raise ValueError("give exactly one of 'disk' and 'initramfs'")
        return self

    @property
    def files_folder(self) -> Path | None:
        return self._folder / self.files if self.files else None

    @property
    def script_file(self) -> Path | None:
        return self._folder / self.disk.script if self.disk and self.disk.script else None


def recipes_folder() -> Path:
    """Where the recipes that come with Innkeeper lie."""
    package = Path(__file__).resolve().parents[1]
    inside = package / "recipes"
    return inside if inside.is_dir() else package.parents[1] / "recipes"


def recipe_names() -> list[str]:
    """The recipes that come with Innkeeper."""
    return sorted(path.stem for path in recipes_folder().glob("*.yaml"))


def load_recipe(name_or_path: str | Path) -> Recipe:
    """The recipe of this name, or in this file (a path has a '/' or ends in .yaml or .yml).

    Raises `NotFound` when there is none, and `RecipeInvalid`, which names the file and each bad field.
    """
    text = str(name_or_path)
    if "/" in text or text.endswith((".yaml", ".yml")):
        path = Path(text).absolute()
    elif re.fullmatch(IMAGE_NAME_PATTERN, text):
        path = recipes_folder() / f"{text}.yaml"
    else:
        raise NotFound(f"no recipe {text!r}", hint=f"there are: {', '.join(recipe_names())}")
    try:
        content = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise RecipeInvalid(f"{path} is not UTF-8 text: {error}") from error
    except OSError as error:
        raise NotFound(
            f"no recipe {text!r}: {error.strerror}", hint=f"there are: {', '.join(recipe_names())}"
        ) from error
    return parse_recipe(content, path)


def parse_recipe(content: str, path: Path) -> Recipe:
    """A recipe from its text; the files it names lie beside `path`. Raises `RecipeInvalid`."""
    try:
        data = yaml.safe_load(content)
    except yaml.YAMLError as error:  # its own text would quote the file, which may be none of the caller's business
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or "a character that YAML does not allow"
        raise RecipeInvalid(f"{path}{where}: not YAML: {problem}") from error
    if not isinstance(data, dict):
        raise RecipeInvalid(f"{path} is not a recipe: a mapping of fields is expected")
    try:
        recipe = Recipe.model_validate(data)
    except ValidationError as error:
        problems = {
            ".".join(str(part) for part in problem["loc"]) or "recipe": _sentence(problem)
            for problem in error.errors(include_url=False)
        }
        listed = "; ".join(f"{field}: {text}" for field, text in problems.items())
        raise RecipeInvalid(f"{path}: {listed}", fields=sorted(problems), field=next(iter(problems))) from error
    recipe._folder = path.parent
    for what, needed in (("files", recipe.files_folder), ("disk.script", recipe.script_file)):
        if needed is not None and not needed.exists():
            raise RecipeInvalid(f"{path}: {what}: {needed} is not there", fields=[what], field=what)
    return recipe


def _sentence(problem: Any) -> str:
    text = said(problem)
    given = problem["input"]
    shown = isinstance(given, str | int | float | bool) and repr(given) not in text
    return f"{text}, not {given!r}" if shown and problem["type"] != "extra_forbidden" else text
