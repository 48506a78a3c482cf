"""A disk of a VM."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from innkeeper.spec.quantity import DiskSize, Model

DiskBus = Literal["virtio-blk", "virtio-scsi"]


class DiskSpec(Model):
    """One disk. The first disk of a VM with an image starts as an overlay on that image."""

    size: DiskSize | None = Field(
        default=None, description="Virtual size, bytes or text like 20G; the image's own size when absent"
    )
    bus: DiskBus = Field(default="virtio-blk", description="virtio-scsi for many disks in one PCI slot")
    serial: str = Field(
        default="",
        max_length=20,
        pattern=r"^[ -~]*$",
        description="Serial number the guest sees: 20 printable ASCII characters at most (virtio 1.2, 5.2.6)",
    )
