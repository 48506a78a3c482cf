"""Layers of a disk in a QEMU that has them open: an overlay put on top of each, and two of them made one.

Nodes have the names of plan/chain.py. Jobs stay listed until `dismiss`, so whoever comes next learns how they ended.
QEMU: docs/interop/live-block-operations.rst, qapi/block-core.json, qapi/job.json.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from innkeeper.base.errors import QmpFailed
from innkeeper.plan.chain import Layer
from innkeeper.plan.devices import volume
from innkeeper.qemu.monitor import Monitor

POLL = 0.02
"""Seconds between the first two looks at a job; the time grows up to `POLL_MOST`."""
POLL_MOST = 0.5
PATIENCE = 120.0
"""Seconds that a command gets which waits for the guest's disks: a transaction drains what is in flight."""

Progress = Callable[[float | None], None]


async def tops(monitor: Monitor) -> set[str]:
    """The nodes that the guest's disks are attached to."""
    found = await monitor.execute("query-block")
    return {disk["inserted"]["node-name"] for disk in found if "inserted" in disk}


async def nodes(monitor: Monitor) -> set[str]:
    """All nodes that have a name."""
    return {node["node-name"] for node in await monitor.execute("query-named-block-nodes", {"flat": True})}


async def put_on_top(monitor: Monitor, pairs: Sequence[tuple[str, Layer]]) -> None:
    """Have each disk, by its top node, write to a new, empty layer from one point in time on, which `open_above` has
    opened. Raises `QmpFailed`; then no disk has changed, and `let_go` removes what was opened for it."""
    actions = [{"type": "blockdev-snapshot", "data": {"node": top, "overlay": overlay.node}} for top, overlay in pairs]
    await monitor.execute("transaction", {"actions": actions}, seconds=PATIENCE)


async def open_above(monitor: Monitor, pairs: Sequence[tuple[str, Layer]]) -> None:
    """Open the new layers, whenever. Raises `QmpFailed`."""
    there = await nodes(monitor)
    for _, overlay in pairs:
        if overlay.node not in there:
            await monitor.execute("blockdev-add", dict(volume(overlay, None, read_only=False)))


async def let_go(monitor: Monitor, names: Collection[str]) -> None:
    """Close nodes that nothing stands on, where they are open. Raises `QmpFailed` for one that is in use."""
    for name in sorted(await nodes(monitor) & set(names)):
        await monitor.execute("blockdev-del", {"node-name": name}, seconds=PATIENCE)


@dataclass(frozen=True)
class Merge:
    """Two neighbours of a chain that become one, nodes all. `down`: what `upper` holds is copied into `lower`, which
    stays; else what `lower` holds and `upper` does not is copied into `upper`, which stays and stands on `below`.

    Whatever happens before it has ended, the chain reads the same: `upper` is whole, and stands on a `lower` that got
    nothing but what `upper` covers.
    """

    job: str
    top: str
    upper: str
    lower: str
    below: str | None
    down: bool
    backing: str
    """Host path of what the layer above the merged ones then stands on, for the file's header; may be empty."""

    @property
    def active(self) -> bool:
        """The guest writes to the layer that goes."""
        return self.down and self.upper == self.top


async def begin(monitor: Monitor, merge: Merge) -> None:
    """Start the job, unless it is there already."""
    if await look(monitor, merge.job) is not None:
        return
    common: dict[str, Any] = {"job-id": merge.job, "auto-dismiss": False}
    if merge.down:
        arguments = common | {"device": merge.top, "top-node": merge.upper, "base-node": merge.lower}
        if not merge.active and merge.backing:
            arguments["backing-file"] = merge.backing
        await monitor.execute("block-commit", arguments, seconds=PATIENCE)
        return
    arguments = common | {"device": merge.upper}
    if merge.below is not None:
        arguments["base-node"] = merge.below
        if merge.backing:
            arguments["backing-file"] = merge.backing
    await monitor.execute("block-stream", arguments, seconds=PATIENCE)


async def look(monitor: Monitor, job: str) -> dict[str, Any] | None:
    """The job as QEMU tells of it (qapi/job.json, JobInfo); None for none."""
    return next((each for each in await monitor.execute("query-jobs") if each["id"] == job), None)


async def follow(monitor: Monitor, job: str, until: Collection[str], report: Progress | None = None) -> dict[str, Any]:
    """The job once it has one of these statuses, or has ended ("concluded"). Raises `QmpFailed` when it is not there,
    or when it ended with an error, which is dismissed then."""
    pause = POLL
    while True:
        found = await look(monitor, job)
        if found is None:
            raise QmpFailed(f"QEMU has no job {job}")
        if found["status"] == "concluded" and found.get("error"):
            await dismiss(monitor, job)
            raise QmpFailed(f"the layers of a disk were not merged: {found['error']}", job=job)
        if found["status"] in until or found["status"] == "concluded":
            return found
        if report is not None and (total := found["total-progress"]):
            report(min(1.0, found["current-progress"] / total))
        await asyncio.sleep(pause)
        pause = min(POLL_MOST, pause * 1.5)


async def conclude(
    monitor: Monitor, merge: Merge, hold: Callable[[], Awaitable[None]], report: Progress | None = None
) -> None:
    """Wait until the two are one, and what they hold is on the host's disk.

    `hold` stops the guest where it writes to the layer that goes: from the moment on that QEMU writes to the other one
    until somebody has recorded that, nothing may be written (a QEMU that died in between would leave two layers, and
    nobody could tell which is newer).
    """
    found = await follow(monitor, merge.job, ("ready",), report)
    if merge.active and found["status"] != "concluded":
        await hold()
        await monitor.execute("job-complete", {"id": merge.job})
        await follow(monitor, merge.job, ())
    await flush(monitor, merge.lower if merge.down else merge.upper)


async def abandon(monitor: Monitor, job: str) -> Literal["none", "done", "cancelled"]:
    """End a job that nobody wants any more; "done" if it was quicker. It is dismissed if it was cancelled."""
    found = await look(monitor, job)
    if found is None:
        return "none"
    if found["status"] != "concluded":
        await monitor.execute("job-cancel", {"id": job})
    try:
        await follow(monitor, job, ())
    except QmpFailed:
        if await look(monitor, job) is not None:
            raise
        return "cancelled"
    return "done"


async def dismiss(monitor: Monitor, job: str) -> None:
    """Forget a job that has ended."""
    if await look(monitor, job) is not None:
        await monitor.execute("job-dismiss", {"id": job})


async def flush(monitor: Monitor, node: str) -> None:
    """Have what QEMU keeps in memory of a node (data, qcow2 tables) on the host's disk. There is no command for it but
    the human one. Raises `QmpFailed`."""
    said = await monitor.execute("human-monitor-command", {"command-line": f'qemu-io {node} "flush"'}, seconds=PATIENCE)
    if said.strip():
        raise QmpFailed(f"{node} was not flushed: {said.strip()}")
