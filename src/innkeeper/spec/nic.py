"""A network card of a VM: QEMU's user-mode NAT, a network of ours, an interface of the host, or no cable plugged in."""

from __future__ import annotations

import ipaddress
import re
from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from innkeeper.spec.quantity import Model, Name, Rate

EVERYWHERE, EVERYWHERE4 = "::", "0.0.0.0"
"""As a socket means them: all addresses of both IP versions; all of IPv4."""


class PortForward(Model):
    """A host port that leads into the guest: `--publish 8080:80`."""

    host: int = Field(ge=1, le=65535, description="Port on the host")
    guest: int = Field(ge=1, le=65535, description="Port in the guest")
    protocol: Literal["tcp", "udp"] = "tcp"
    address: str = Field(
        default="127.0.0.1",
        description="Host address that listens: one of its own; `::` for all, 0.0.0.0 for all of IPv4",
    )
    note: str = Field(default="", max_length=1000, description="Why it is there, for people")

    @field_validator("address")
    @classmethod
    def _an_address(cls, value: str) -> str:
        try:
            return str(ipaddress.ip_address(value))
        except ValueError:
            raise ValueError(f"{value!r} is not an IPv4 or IPv6 address") from None

    @property
    def families(self) -> tuple[int, ...]:
        """Over which IP versions it leads in: 4, 6."""
        return (4, 6) if self.address == EVERYWHERE else (6,) if ":" in self.address else (4,)

    @property
    def everywhere(self) -> bool:
        """Whether it listens on all addresses, at least of IPv4."""
        return self.address in (EVERYWHERE, EVERYWHERE4)

    def clashes(self, other: PortForward) -> bool:
        """Whether both want the same port of the same address."""
        if (self.protocol, self.host) != (other.protocol, other.host) or not {*self.families} & {*other.families}:
            return False
        return self.address == other.address or self.everywhere or other.everywhere


Interface = Annotated[str, Field(pattern=r"^[^\s/:]{1,15}$")]
"""A network device of the host, as `ip link` names it."""
ON_PARENT = ("macvtap", "sriov")
"""Modes of cards that are on an interface of the host."""
_MAC = re.compile(r"[0-9a-f]{2}(:[0-9a-f]{2}){5}")


class NicSpec(Model):
    """One network card."""

    mode: Literal["user", "network", "macvtap", "sriov", "none", "absent"] = Field(
        default="user",
        description="user: QEMU's own NAT, needs no privilege; network: the one that `network` names; macvtap: the "
        "network that `parent` is in, past the host itself; sriov: a virtual function of `parent`, past QEMU; "
        "none: cable not plugged in; absent: an empty place, so that the cards behind it keep their numbers",
    )
    network: Name | None = Field(default=None, description="The network that it is plugged into")
    backend: Literal["qemu", "passt"] = Field(
        default="qemu", description="user: QEMU's own NAT, or that of passt, which has IPv6"
    )
    parent: Interface | None = Field(default=None, description="macvtap, sriov: the host's interface, like eth0")
    macvtap_mode: Literal["bridge", "vepa", "private"] | None = Field(
        default=None,
        description="To other guests on the same parent: bridge, the default: directly; vepa: by the switch outside, "
        "which has to send frames back where they came from; private: not at all",
    )
    vlan: int | None = Field(
        default=None, ge=1, le=4094, description="sriov: the VLAN outside; the guest sees no tag, and gets in no other"
    )
    model: Literal["virtio", "e1000e"] = "virtio"
    mac: str | None = Field(default=None, description="Made from the VM's id when absent")
    address: str | None = Field(
        default=None, description="Its IPv4 address in the network, for good; one that is free when absent"
    )
    limit: Rate | None = Field(
        default=None, description="Most bits per second in each direction, or text like 100mbit; for cards in networks"
    )
    link: Literal["up", "down"] = Field(default="up", description="down: as if somebody had pulled the cable out")
    publish: tuple[PortForward, ...] = ()

    @model_validator(mode="after")
    def _plugged_in_somewhere(self) -> NicSpec:
        if (self.mode == "network") != (self.network is not None):
            raise ValueError(
                f"mode {self.mode!r} and network {self.network!r} do not fit: mode network names its network"
            )
        if (self.mode in ON_PARENT) != (self.parent is not None):
            raise ValueError(f"mode {self.mode!r} and parent {self.parent!r} do not fit: macvtap and sriov name theirs")
        if self.macvtap_mode and self.mode != "macvtap":
            raise ValueError(f"a card of mode {self.mode!r} has no macvtap_mode")
        if self.backend != "qemu" and self.mode != "user":
            raise ValueError(f"a card of mode {self.mode!r} has no backend: that is of user")
        if self.vlan and self.mode != "sriov":
            raise ValueError(f"a card of mode {self.mode!r} has no vlan: that is of sriov")
        if self.mode == "sriov" and self.model != "virtio":
            raise ValueError("a virtual function is what it is: leave the model out")
        if self.address and self.mode != "network":
            by = "the network outside gives them" if self.parent else "only Innkeeper's networks give them"
            raise ValueError(f"a card of mode {self.mode!r} cannot be given an address: {by}")
        if self.limit and self.mode != "network":
            raise ValueError(
                f"a card of mode {self.mode!r} takes no limit: its packets pass nothing of the host's that could hold"
                " them back; put it into a network"
            )
        if self.link == "down" and self.mode in ("none", "absent", "sriov"):
            why = ": QEMU does not have it in hand" if self.parent else ""
            raise ValueError(f"a card of mode {self.mode!r} has no cable to pull out{why}")
        if self.publish and self.mode not in ("user", "network"):
            own = ": others reach the guest's own address" if self.parent else ""
            raise ValueError(f"a port cannot be published on a card of mode {self.mode!r}{own}")
        if self.mode == "network" and any(forward.address == "::1" for forward in self.publish):
            raise ValueError("Linux leads nothing from ::1 into a network; publish on 127.0.0.1, or on `::` for all")
        if self.mode == "user" and (beyond := [f.address for f in self.publish if 6 in f.families]):
            nat = "Innkeeper has passt lead" if self.backend == "passt" else "QEMU's own NAT leads"
            raise ValueError(
                f"{nat} in over IPv4 only, not from {beyond[0]}: 0.0.0.0 is all of IPv4; or put"
                " the card into a nat network"
            )
        return self

    @field_validator("address")
    @classmethod
    def _an_ipv4_address(cls, value: str | None) -> str | None:
        try:
            return value and str(ipaddress.IPv4Address(value))
        except ValueError:
            raise ValueError(f"{value!r} is not an IPv4 address like 10.77.0.10") from None

    @field_validator("mac")
    @classmethod
    def _a_unicast_mac(cls, value: str | None) -> str | None:
        if value is None:
            return None
        mac = value.lower().replace("-", ":")
        if not _MAC.fullmatch(mac):
            raise ValueError(f"{value!r} is not a MAC address like 52:54:00:12:34:56")
        if int(mac[:2], 16) & 1:
            raise ValueError(f"{value!r} is a multicast address; the first byte of a card's MAC is even")
        if mac == "00:00:00:00:00:00":  # QEMU takes it for none given, and makes one up
            raise ValueError(f"{value!r} is no card's MAC address")
        return mac
