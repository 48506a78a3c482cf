"""The firewall rules and tags of one VM."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from innkeeper.client.operation import Operation

if TYPE_CHECKING:
    from innkeeper.client.api import Innkeeper


class Firewall:
    """What `vm.firewall` is. Each change returns an operation that has begun; `wait` waits for its end.

    >>> vm.firewall.allow("in", "tcp", ["22"], peer="host").wait()
    >>> vm.firewall.default("in", "deny").wait()
    """

    def __init__(self, innkeeper: Innkeeper, vm: str) -> None:
        self._innkeeper = innkeeper
        self._path = f"/vms/{innkeeper.part(vm)}/firewall"

    def overview(self) -> dict[str, Any]:
        """{inbound, outbound, tags, rules: [{number, direction, action, protocol, ports, peer, note, packets, bytes}],
        defaults}."""
        document: dict[str, Any] = self._innkeeper.call("GET", self._path)
        return document

    def log(self) -> list[dict[str, Any]]:
        """What was denied within a day, the latest first: {direction, protocol, peer, name, port, packets, last,
        rule}."""
        documents: list[dict[str, Any]] = self._innkeeper.call("GET", f"{self._path}/log")
        return documents

    def allow(
        self,
        direction: str,
        protocol: str = "any",
        ports: Iterable[str] = (),
        *,
        peer: str = "any",
        at: int | None = None,
        note: str = "",
    ) -> Operation:
        """Let something in or out. `ports` like `80` and `8000-8100`; `peer` an address, a subnet, `vm:NAME`,
        `tag:NAME`, `network:NAME` or `host`; `at` is the number that the rule gets, the last by default."""
        return self.add("allow", direction, protocol, ports, peer=peer, at=at, note=note)

    def deny(
        self,
        direction: str,
        protocol: str = "any",
        ports: Iterable[str] = (),
        *,
        peer: str = "any",
        at: int | None = None,
        note: str = "",
    ) -> Operation:
        """Keep something in or out."""
        return self.add("deny", direction, protocol, ports, peer=peer, at=at, note=note)

    def add(
        self, action: str, direction: str, protocol: str, ports: Iterable[str], *, peer: str, at: int | None, note: str
    ) -> Operation:
        """`allow` or `deny`, by its name."""
        rule = {"direction": direction, "action": action, "protocol": protocol, "ports": list(ports), "peer": peer}
        return self._change({"do": "add", "rule": rule | {"note": note}, "at": at})

    def remove(self, number: int) -> Operation:
        """A rule away; those behind it move up."""
        return self._change({"do": "remove", "number": number})

    def default(self, direction: str, action: str) -> Operation:
        """What counts where no rule fits."""
        return self._change({"do": "default", "direction": direction, "action": action})

    def tag(self, *, add: Iterable[str] = (), remove: Iterable[str] = ()) -> Operation:
        """Tags that the VM gets and loses."""
        return self._change({"do": "tags", "add": list(add), "remove": list(remove)})

    def _change(self, change: dict[str, Any]) -> Operation:
        return self._innkeeper.operate("POST", self._path, document={"change": change})
