"""A golden image, as it is recorded and as it is asked for."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from innkeeper.spec.quantity import ImageName, ImageReference, Model, Name, Version

ImportFormat = Literal["qcow2", "raw", "vmdk", "vdi", "vhdx", "vpc"]
Digest = Annotated[str, Field(pattern=r"^[0-9a-fA-F]{64}$", description="SHA-256, 64 hex digits")]


class BuildRequest(Model):
    """Build an image from a recipe."""

    recipe: ImageName = Field(description="Name of a recipe in recipes/")
    name: ImageName | None = Field(default=None, description="The recipe's own name by default")
    replace: bool = Field(default=False, description="Build anew where an image of this name exists")


class ImportRequest(Model):
    """Take a copy of a disk image file on the host. The file itself is not changed."""

    path: str = Field(max_length=4096, pattern=r"^/[^\x00]*$")
    name: ImageName
    format: ImportFormat | None = Field(default=None, description="Told from the file's header when absent")


class PullRequest(Model):
    """Download a disk image and check its digest before anything reads it."""

    url: str = Field(max_length=4096, pattern=r"^https?://[^\s\x00-\x1f]+$")
    sha256: Digest
    name: ImageName
    format: ImportFormat | None = None


class Warm(Model):
    """What a captured guest was, and so what each of its forks has to be."""

    image: str = Field(description="Name of the image that was booted")
    spec: dict[str, Any] = Field(description="Its VM's spec, without secrets")
    machine_type: str
    accelerator: str
    cpu_model: str
    qemu: str = Field(description="Version of the QEMU that it ran in")
    uuid: str
    uuid_at: tuple[tuple[int, int], ...] = Field(description="Offset in RAM, form: where the UUID is (plan/rebirth)")
    macs: tuple[str, ...]
    waits: tuple[str, ...] = Field(
        description="What a process that waits in the guest to be told who it is holds open (plan/waiting)"
    )


class TemplateRequest(Model):
    """Seal the disks of a VM as a template: an image, and a version of it."""

    vm: Name
    name: ImageName
    version: Version | None = Field(default=None, description="The next number by default")
    accept: bool = Field(default=False, description="Seal it with whatever the scan finds in it")
    clean: bool = Field(
        default=False, description="Remove host keys, machine-id, histories, what cloud-init left; the VM keeps them"
    )
    by: str = Field(default="", max_length=200, description="Who asks for it, as they say")
    note: str = Field(default="", max_length=1000)


class Finding(Model):
    """Something in a template that should not be in it."""

    kind: str
    path: str


class Template(Model):
    """What a template was sealed from, and how."""

    name: ImageName
    version: Version
    vm: str = Field(description="Name of the VM")
    by: str
    note: str
    firmware: Literal["bios", "uefi"]
    disks: tuple[int, ...] = Field(description="Bytes the guest sees, of each disk")
    scanned: bool = Field(description="Somebody has looked for what must not be in it")
    cleaned: bool
    accepted: tuple[Finding, ...] = Field(description="What was found and accepted")


class Image(Model):
    """An image as it lies in the pool. Recorded once its bytes are whole and verified, never before."""

    id: str
    name: ImageReference
    kind: Literal["disk", "kernel", "warm", "template"] = Field(
        description="disk: boots by its own loader; kernel: booted directly; warm: a running guest, to fork; template: "
        "the disks of a VM, sealed"
    )
    files: dict[str, str] = Field(
        description="Role (disk, kernel, initrd; of a warm one or a template disk, disk1, …, disk1-below1, …, ram, "
        "devices, nvram, seed) → file name in the image's folder"
    )
    format: str = Field(description="Format of the disk file, recorded here and never probed again")
    cmdline: str = Field(default="", description="Kernel command line where kind is kernel")
    virtual_size: int = Field(description="Bytes the guest sees; 0 where there is no disk")
    stored_size: int = Field(description="Bytes allocated on the host")
    digests: dict[str, str] = Field(description="File name → BLAKE3 of its bytes")
    stamps: dict[str, tuple[int, ...]] = Field(
        default={}, description="File name → size, inode, times of change: of a file that nobody has touched since"
    )
    user: str = Field(default="", description="Login user the image is made for")
    agent: bool = Field(default=False, description="Carries the guest agent")
    min_memory: int = Field(default=0, description="Bytes of RAM below which it does not come up; 0 where unknown")
    cloud_init: bool = Field(default=False, description="Reads a NoCloud seed")
    base: str | None = Field(default=None, description="Id of the image that this one stands on")
    warm: Warm | None = None
    template: Template | None = None
    verified: str | None = Field(default=None, description="When the digests were last proved")
    source: dict[str, Any] = Field(description="How it was made: recipe and inputs, or file or URL and digest")
    created: str
