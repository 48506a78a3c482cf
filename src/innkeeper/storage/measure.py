"""What the depth of a chain of layers costs: random reads through all of them, and the same reads from one alone.

Of the lowest layer that holds anything, 4 KiB blocks at random are read through all that lies above it, then from that
layer by itself, in turn. So both read the same bytes of the same file, by then from the host's page cache: what is
left between them is the looks that QEMU takes in the layers in between. Nobody may write to the layers meanwhile.
"""

from __future__ import annotations

import json
import random
import re
from dataclasses import dataclass, replace
from statistics import quantiles
from typing import Any

from innkeeper.base.errors import ToolFailed
from innkeeper.plan.chain import Chain, Layer
from innkeeper.plan.devices import volume
from innkeeper.storage.cage import Limits, run_tool

BLOCK = 4096
BLOCKS, READS, ROUNDS = 1000, 2000, 5
"""Different blocks that are read; reads in one go; how often each is measured. About a second in all."""
_RATE = re.compile(r"([\d.]+) ops/sec\)")
"""Of one read, at the end of what qemu-io says of it (qemu-io-cmds.c, print_report)."""
LIMITS = Limits(seconds=30, processes=4096, file_size=0)


@dataclass(frozen=True)
class ReadCost:
    """`layers` that were read through, and seconds for one read: through all of them, and from the lowest `alone`."""

    layers: int
    through: float
    alone: float


async def read_cost(chain: Chain, *, user: int | None, job: str) -> ReadCost | None:
    """Of a chain of frozen qcow2 layers, base first, paths absolute, which `user` may read (None: whoever we are). None
    where there is nothing to read. Raises `ToolFailed`, `ToolTimeout`, `ToolMissing`."""
    for lowest in range(len(chain)):
        blocks = await _blocks(chain[lowest], user, job)
        if blocks:
            break
    else:
        return None
    script = "".join(f"read {random.choice(blocks)} {BLOCK}\n" for _ in range(READS)).encode()
    nodes = _node(chain[lowest:]), _node(chain[lowest : lowest + 1])
    seconds: tuple[list[float], list[float]] = ([], [])
    for _ in range(ROUNDS):
        for node, found in zip(nodes, seconds, strict=True):
            found += await _run(node, script, user, job)
    through, alone = (quantiles(found, n=10)[0] for found in seconds)  # slower ones have waited for something else
    return ReadCost(len(chain) - lowest, through, alone)


async def _run(node: str, script: bytes, user: int | None, job: str) -> list[float]:
    """Seconds that each read took, as qemu-io says."""
    found: list[float] = []

    def note(line: str) -> None:
        if match := _RATE.search(line):
            found.append(1 / float(match[1]))

    said = await run_tool(["qemu-io", "-r", node], stdin=script, limits=LIMITS, user=user, job=job, on_line=note)
    if len(found) != READS:
        raise ToolFailed(f"a layer cannot be read: {said.strip()[-500:]}", program="qemu-io")
    return found


async def _blocks(layer: Layer, user: int | None, job: str) -> list[int]:
    """Offsets of blocks that a layer holds itself, at random: `BLOCKS` of them; none if it holds nothing."""
    extents: list[tuple[int, int]] = []

    def note(line: str) -> None:
        try:
            extent = json.loads(line.strip().strip("[],"))
        except ValueError:
            return  # the last line, which has nothing but a bracket
        if extent["data"] and extent["length"] >= BLOCK:
            extents.append((extent["start"], extent["length"]))

    await run_tool(
        ["qemu-img", "map", "--output=json", _node((layer,))], limits=LIMITS, user=user, job=job, on_line=note
    )
    if not extents:
        return []
    chosen = random.choices(extents, weights=[length for _, length in extents], k=BLOCKS)
    return [start + random.randrange(length // BLOCK) * BLOCK for start, length in chosen]


def _node(chain: Chain) -> str:
    """As a VM's QEMU opens them, read-only; the lowest stands on nothing."""
    node: dict[str, Any] | None = None
    for layer in chain:
        node = {**volume(replace(layer, own=False), None, read_only=True), "backing": node}
    return "json:" + json.dumps(node)
