"""A virtual machine as a person asks for it."""

from __future__ import annotations

import re
from typing import Literal

from pydantic import Field, field_validator, model_validator

from innkeeper.base.units import GIB
from innkeeper.spec.disk import DiskSpec
from innkeeper.spec.firewall import FirewallSpec
from innkeeper.spec.nic import NicSpec
from innkeeper.spec.quantity import ImageReference, MemorySize, Model, Name

MAX_SEED = 256 * 1024
"""Bytes of user-data or Ignition. NoCloud has no limit of its own; this one keeps documents small."""

_ENV_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,127}")


class FirstBoot(Model):
    """What the guest is told at its first boot, through a NoCloud seed or Ignition. May hold secrets: it is kept
    apart from the VM's document and is never part of an answer of the API."""

    user: str | None = Field(
        default=None,
        pattern=r"^[a-z_][a-z0-9_-]{0,31}$",
        description="Login user; the image's own by default",
    )
    ssh_keys: tuple[str, ...] = Field(default=(), max_length=64, description="OpenSSH public key lines")
    user_data: str | None = Field(default=None, max_length=MAX_SEED, description="cloud-init user-data")
    network_config: str | None = Field(default=None, max_length=MAX_SEED, description="cloud-init network-config")
    ignition: str | None = Field(default=None, max_length=MAX_SEED, description="Ignition configuration, JSON")
    env: dict[str, str] = Field(default={}, max_length=256, description="Environment variables in the guest")

    @field_validator("ssh_keys")
    @classmethod
    def _one_line_each(cls, keys: tuple[str, ...]) -> tuple[str, ...]:
        for key in keys:
            parts = key.split(None, 2)
            if not key.strip().isprintable() or len(parts) < 2 or not re.fullmatch(r"[a-z0-9@.-]+", parts[0]):
                raise ValueError(f"{key[:40]!r} is not an OpenSSH public key (type, base64, comment on one line)")
        return tuple(key.strip() for key in keys)

    @field_validator("env")
    @classmethod
    def _environment_names(cls, env: dict[str, str]) -> dict[str, str]:
        for name, value in env.items():
            if not _ENV_NAME.fullmatch(name):
                raise ValueError(f"{name[:40]!r} is not a name for an environment variable")
            if "\0" in value or "\n" in value or len(value) > 32768:
                raise ValueError(f"the value of {name} has a newline or NUL in it, or is over 32 KiB")
        return env


class VMSpec(Model):
    """A VM: what `inn launch` makes and `inn apply` keeps as written."""

    name: Name = Field(description="Also the guest's hostname")
    image: ImageReference | None = Field(default=None, description="None: an empty first disk, to install from an ISO")
    # More need an x2APIC, which TCG of QEMU 7.2 lacks, and interrupt remapping, which is not planned yet.
    cpus: int = Field(default=2, ge=1, le=255, description="vCPUs")
    memory: MemorySize = Field(default=2 * GIB, description="RAM, bytes or text like 2G")
    disks: tuple[DiskSpec, ...] = Field(default=(DiskSpec(size=20 * GIB),), max_length=24)
    nics: tuple[NicSpec, ...] = Field(default=(NicSpec(),), max_length=8)
    firmware: Literal["bios", "uefi"] = "bios"
    iso: str | None = Field(
        default=None,
        max_length=4096,
        description="Host path of a disc to boot once; ejected after the guest restarts",
    )
    first_boot: FirstBoot = FirstBoot()
    metadata: bool = Field(
        default=False, description="The guest can ask 169.254.169.254 for its own data, user-data included"
    )
    tags: tuple[Name, ...] = Field(
        default=(), max_length=50, description="Words that firewall rules and `inn ls` know it by, with others"
    )
    firewall: FirewallSpec = Field(default=FirewallSpec(), description="What its cards in networks let in and out")
    note: str = Field(default="", max_length=1000, description="Free text for people")

    @field_validator("tags")
    @classmethod
    def _each_once(cls, tags: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(sorted(set(tags)))

    @field_validator("iso")
    @classmethod
    def _absolute(cls, value: str | None) -> str | None:
        if value is not None and (not value.startswith("/") or "\0" in value):
            raise ValueError(f"{value!r} is not an absolute path")
        return value

    @model_validator(mode="after")
    def _bootable(self) -> VMSpec:
        if not self.image and not self.iso and not self.disks:
            raise ValueError("a VM needs an image, an ISO or a disk to boot from")
        for index, disk in enumerate(self.disks):
            if disk.size is None and (index > 0 or not self.image):
                raise ValueError(f"disk {index} has no size, and no image to take it from")
        forwards = [forward for nic in self.nics for forward in nic.publish]
        for index, forward in enumerate(forwards):
            if any(forward.clashes(other) for other in forwards[:index]):
                raise ValueError(f"host port {forward.host}/{forward.protocol} is published twice")
        if self.metadata and not any(nic.network for nic in self.nics):
            raise ValueError("the metadata service is asked through a network: give a card one (--network)")
        macs = [nic.mac for nic in self.nics if nic.mac]
        if len(macs) != len(set(macs)):
            raise ValueError("two NICs have the same MAC address")
        return self
