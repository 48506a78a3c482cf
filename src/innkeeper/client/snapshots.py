"""Snapshots of one VM: short-lived ways back, beside the disks that they protect. None of them is a backup."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from innkeeper.client.operation import Operation

if TYPE_CHECKING:
    from innkeeper.client.api import Innkeeper

DEFAULT_TTL = 3 * 86400.0
"""Seconds that a snapshot lives unless told otherwise."""


class Snapshots:
    """What `vm.snapshots` is. Each verb returns an operation that has begun; `wait` waits for its end.

    >>> vm.snapshots.create("before-upgrade").wait()
    >>> vm.snapshots.restore("before-upgrade", start=True).wait()
    """

    def __init__(self, innkeeper: Innkeeper, vm: str) -> None:
        self._innkeeper = innkeeper
        self._vm = f"/vms/{innkeeper.part(vm)}"

    def _path(self, name: str, rest: str = "") -> str:
        return f"{self._vm}/snapshots/{self._innkeeper.part(name)}{rest}"

    def overview(self) -> dict[str, Any]:
        """{"snapshots": […], "present": {at, layers, most_layers, stored_size}}; sizes in bytes."""
        document: dict[str, Any] = self._innkeeper.call("GET", f"{self._vm}/snapshots")
        return document

    def list(self) -> list[dict[str, Any]]:
        """The snapshots, the oldest first."""
        documents: list[dict[str, Any]] = self.overview()["snapshots"]
        return documents

    def get(self, name: str) -> dict[str, Any]:
        """One snapshot, with the spec that the VM had. Raises `ApiError` where there is none."""
        document: dict[str, Any] = self._innkeeper.call("GET", self._path(name))
        return document

    def create(
        self,
        name: str | None = None,
        *,
        note: str = "",
        ttl: float | None = DEFAULT_TTL,
        quiesce: bool = False,
        memory: bool = False,
    ) -> Operation:
        """Take one. `ttl` in seconds, None for never; `quiesce` has the guest freeze its file systems; with `memory` a
        restore goes on with what the guest was doing."""
        body = {"name": name, "note": note, "ttl": ttl, "quiesce": quiesce, "memory": memory}
        return self._innkeeper.operate("POST", f"{self._vm}/snapshots", document=body)

    def restore(
        self,
        name: str,
        *,
        keep: bool = True,
        start: bool = False,
        force: bool = False,
        disks_only: bool = False,
        paused: bool = False,
    ) -> Operation:
        """Go back; the present is kept as an automatic snapshot unless `keep` is False. `start` it then, `force` it to
        stop first. Where memory is part of it the guest goes on, `paused` if so wished, unless `disks_only`."""
        body = {"keep": keep, "start": start, "force": force, "disks_only": disks_only, "paused": paused}
        return self._innkeeper.operate("POST", self._path(name, "/restore"), document=body)

    def delete(self, name: str) -> Operation:
        """Remove it and merge its layers; the VM may run."""
        return self._innkeeper.operate("DELETE", self._path(name))

    def measure(self, name: str) -> Operation:
        """What its layers cost who reads through them. `result["disks"]`: of each disk {layers, through, alone}, the
        seconds of a random read of 4 KiB through all its layers and from the lowest alone; None for an empty one."""
        return self._innkeeper.operate("POST", self._path(name, "/measure"))

    def prune(self, *, automatic: bool = False) -> Operation:
        """Remove what has expired, with `automatic` also what restores kept, and merge layers that nobody needs."""
        return self._innkeeper.operate("POST", f"{self._vm}/prune", document={"automatic": automatic})
