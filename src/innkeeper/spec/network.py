"""A network that VMs join, as a person asks for it."""

from __future__ import annotations

import ipaddress
from typing import Literal

from pydantic import Field, field_validator, model_validator

from innkeeper.spec.nic import Interface
from innkeeper.spec.quantity import Model, Name

Mode = Literal["nat", "host-only", "internal", "bridged"]
DEFAULT = "default"
"""The name of the nat network that is made when a VM first asks for it."""
PRIVATE = tuple(ipaddress.IPv4Network(block) for block in ("10.0.0.0/8", "172.16.0.0/12", "192.168.0.0/16"))


class NetworkSpec(Model):
    """What `inn network create` asks for."""

    name: Name
    mode: Mode = Field(
        default="nat",
        description="nat: guests reach out, and in comes what is published; host-only: the host reaches guests, there "
        "is no way out; internal: guests among themselves; bridged: guests are on the network outside, like the host",
    )
    parent: Interface | None = Field(
        default=None, description="bridged: the host's interface or bridge that leads there"
    )
    subnet: str | None = Field(
        default=None, description="IPv4, private, /16 to /29, like 10.77.0.0/24; one that is free when absent"
    )
    ipv6: Literal["auto", "none"] = Field(default="auto", description="auto: addresses of its own under fd00::/8")
    dns_domain: Name = Field(default="inn", description="Guests find each other as NAME.inn")
    mtu: int | None = Field(
        default=None, ge=1280, le=65521, description="Bytes that a packet has at most; the kernel's 1500 when absent"
    )
    note: str = Field(default="", max_length=1000, description="Free text for people")

    @field_validator("subnet")
    @classmethod
    def _a_private_subnet(cls, value: str | None) -> str | None:
        if value is None:
            return None
        try:
            subnet = ipaddress.IPv4Network(value)
        except ValueError:
            raise ValueError(f"{value!r} is not an IPv4 subnet like 10.77.0.0/24") from None
        if not 16 <= subnet.prefixlen <= 29:
            raise ValueError(f"{value!r} is not between /16 and /29")
        if not any(subnet.subnet_of(block) for block in PRIVATE):
            raise ValueError(f"{value!r} is not private: take one of 10.0.0.0/8, 172.16.0.0/12, 192.168.0.0/16")
        return str(subnet)

    @model_validator(mode="after")
    def _what_fits_the_mode(self) -> NetworkSpec:
        if (self.mode == "bridged") != (self.parent is not None):
            raise ValueError("a bridged network has a parent, like eth0 or br0, and no other has one")
        if self.mode == "bridged":
            for name in ("subnet", "ipv6", "dns_domain", "mtu"):
                if getattr(self, name) != type(self).model_fields[name].default:
                    raise ValueError(f"{name} of a bridged network is what the network outside has: leave it out")
        return self
