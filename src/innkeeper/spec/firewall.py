"""What a VM's cards in networks let in and out, as a person asks for it: rules, and what counts where none fits."""

from __future__ import annotations

import ipaddress
import itertools
import re
from typing import Annotated, Literal

from pydantic import Field, TypeAdapter, ValidationError, field_validator, model_validator

from innkeeper.spec.quantity import Model, Name

Action = Literal["allow", "deny"]
Direction = Literal["in", "out"]
MOST_RULES = 200
KINDS = ("vm", "tag", "network")
"""Of peers that are named: `vm:db`, `tag:web`, `network:lab`."""
_PORTS = re.compile(r"(\d{1,5})(?:-(\d{1,5}))?")
_NAME: TypeAdapter[str] = TypeAdapter(Name)


def port_range(text: str) -> tuple[int, int]:
    """`80` or `8000-8100` → (first, last). Raises `ValueError`."""
    match = _PORTS.fullmatch(text.strip())
    first, last = (int(match[1]), int(match[2] or match[1])) if match else (0, 0)
    if not 1 <= first <= last <= 65535:
        raise ValueError(f"{text!r} is neither a port from 1 to 65535 nor a range like 8000-8100")
    return first, last


class FirewallRule(Model):
    """One rule. Of those for a direction the first that fits counts."""

    direction: Direction = Field(description="in: what others open to the guest; out: what the guest opens")
    action: Action
    protocol: Literal["any", "tcp", "udp", "icmp"] = "any"
    ports: tuple[str, ...] = Field(
        default=(), max_length=50, description="Of TCP or UDP, the receiver's: 80, or 8000-8100; all when empty"
    )
    peer: str = Field(
        default="any",
        description="Who is at the other end: any, an address or subnet, vm:NAME, tag:NAME, network:NAME, or host: the "
        "host's own addresses in the network",
    )
    note: str = Field(default="", max_length=1000, description="Why it is there, for people")

    @field_validator("ports")
    @classmethod
    def _ranges(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        ranges = sorted(map(port_range, value))
        for (_, last), (first, _) in itertools.pairwise(ranges):
            if first <= last:
                raise ValueError(f"port {first} is named twice")
        return tuple(text.strip() for text in value)

    @field_validator("peer")
    @classmethod
    def _somebody(cls, value: str) -> str:
        kind, colon, name = value.partition(":")
        if value in ("any", "host"):
            return value
        if colon and kind in KINDS:
            try:
                return f"{kind}:{_NAME.validate_python(name)}"
            except ValidationError:
                raise ValueError(f"{name!r} in {value!r} is not a name") from None
        try:
            return str(ipaddress.ip_network(value)).removesuffix("/32").removesuffix("/128")
        except ValueError as error:
            why = f" ({error})" if "host bits" in str(error) else ""
            raise ValueError(
                f"{value!r} is neither an address nor a subnet{why}, nor any, host, vm:NAME, tag:NAME or network:NAME"
            ) from None

    @model_validator(mode="after")
    def _ports_of_what_has_some(self) -> FirewallRule:
        if self.ports and self.protocol not in ("tcp", "udp"):
            raise ValueError(f"ports are those of tcp or udp, and this rule is for {self.protocol}")
        return self


class FirewallSpec(Model):
    """All of it. Without any of this, what the network's mode allows passes."""

    inbound: Action = Field(default="allow", description="What comes in that no rule fits")
    outbound: Action = Field(default="allow", description="What goes out that no rule fits")
    rules: tuple[FirewallRule, ...] = Field(default=(), max_length=MOST_RULES)


class AddRule(Model):
    """One more rule, behind the others or at a place among them."""

    do: Literal["add"] = "add"
    rule: FirewallRule
    at: int | None = Field(default=None, ge=1, description="The number it gets; the last when absent")


class RemoveRule(Model):
    """A rule away."""

    do: Literal["remove"] = "remove"
    number: int = Field(ge=1, description="As `inn firewall ls` shows it")


class SetDefault(Model):
    """What counts where no rule fits."""

    do: Literal["default"] = "default"
    direction: Direction
    action: Action


class SetTags(Model):
    """Tags that the VM gets and loses."""

    do: Literal["tags"] = "tags"
    add: tuple[Name, ...] = Field(default=(), max_length=50)
    remove: tuple[Name, ...] = Field(default=(), max_length=50)


FirewallChange = Annotated[AddRule | RemoveRule | SetDefault | SetTags, Field(discriminator="do")]
