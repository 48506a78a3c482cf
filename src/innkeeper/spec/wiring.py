"""Changes of a VM's NICs and of the ports that lead to them."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from innkeeper.spec.nic import NicSpec, PortForward
from innkeeper.spec.quantity import Model, Name, NewRate


class Publish(Model):
    """Have a host port lead into the guest."""

    do: Literal["publish"] = "publish"
    forward: PortForward
    nic: int | None = Field(
        default=None, ge=0, description="Number of the card; the first that is plugged in when absent"
    )


class Unpublish(Model):
    """Have a host port lead nowhere again."""

    do: Literal["unpublish"] = "unpublish"
    host: int = Field(ge=1, le=65535, description="Port on the host")
    protocol: Literal["tcp", "udp"] = "tcp"


class AddNic(Model):
    """One more card, in the first empty place."""

    do: Literal["add"] = "add"
    nic: NicSpec


class RemoveNic(Model):
    """A card away. Those behind it keep their numbers."""

    do: Literal["remove"] = "remove"
    index: int = Field(ge=0, description="Number of the card")


class SetNic(Model):
    """Another network, address, limit or link of a card, running or not; another model or MAC while its VM is stopped.
    What is left out stays as it is."""

    do: Literal["set"] = "set"
    index: int = Field(ge=0, description="Number of the card")
    network: Name | None = Field(default=None, description="It gets another address there")
    address: str | None = None
    model: Literal["virtio", "e1000e"] | None = None
    mac: str | None = None
    limit: NewRate | None = Field(default=None, description="Text like 100mbit, or none: as fast as it goes")
    link: Literal["up", "down"] | None = None


Change = Annotated[Publish | Unpublish | AddNic | SetNic | RemoveNic, Field(discriminator="do")]
