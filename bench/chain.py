"""Reading through a chain of layers: random 4 KiB reads of allocated clusters through 16 overlays, and through one.

    .venv/bin/python bench/chain.py [RUNS]

The disk has 512 MiB of data; of the 16 overlays each holds a sixteenth of the clusters, in no order. The layers are
opened with the options that a VM's QEMU gets (plan/devices.py), by `qemu-img bench`, whose step of a prime number of
blocks comes by all of them in no order that a disk or a cache could foresee. All is in the page cache, so that what is
measured is the layers and not the disk.
"""

from __future__ import annotations

import json
import random
import re
import subprocess
import sys
import tempfile
from itertools import pairwise
from pathlib import Path

from common import median, say

from innkeeper.plan.chain import Layer
from innkeeper.plan.devices import volume
from innkeeper.storage.formats.qcow2 import write_overlay

RUNS = int(sys.argv[1]) if len(sys.argv) > 1 else 10
SIZE, CLUSTER, DEPTH = 512 << 20, 64 << 10, 16
READS, STEP = 100_000, 4096 * 7919


def chain(folder: Path, depth: int) -> list[Layer]:
    """An empty base of `SIZE` bytes and `depth` overlays, which hold all clusters between them."""
    layers = [folder / f"{depth}-{number}.qcow2" for number in range(depth + 1)]
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", layers[0], str(SIZE)], check=True)
    clusters = list(range(SIZE // CLUSTER))
    random.Random(1).shuffle(clusters)
    share = -(-len(clusters) // depth)
    for number, (below, layer) in enumerate(pairwise(layers)):
        write_overlay(layer, below, "qcow2", SIZE)
        mine = clusters[number * share :][:share]
        commands = [
            word for each in mine for word in ("-c", f"write -q -P {each % 251 + 1} {each * CLUSTER} {CLUSTER}")
        ]
        for begin in range(0, len(commands), 2000):
            subprocess.run(["qemu-io", "-f", "qcow2", *commands[begin : begin + 2000], layer], check=True)
    return [Layer(path=str(layer), node=f"layer-{number}", own=True) for number, layer in enumerate(layers)]


def reads_per_second(layers: list[Layer]) -> float:
    node: dict[str, object] | None = None
    for layer in layers:
        node = volume(layer, None, read_only=layer is not layers[-1]) | {"backing": node}
        if layer is layers[0]:
            del node["backing"]
    command = [
        "qemu-img",
        "bench",
        "-c",
        str(READS),
        "-d",
        "1",
        "-s",
        "4096",
        "-S",
        str(STEP),
        "json:" + json.dumps(node),
    ]
    said = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    found = re.search(r"completed in ([\d.]+) seconds", said)
    assert found, said
    return READS / float(found[1])


def main() -> None:
    with tempfile.TemporaryDirectory(prefix="inn-bench-") as name:
        one, many = chain(Path(name), 1), chain(Path(name), DEPTH)
        reads_per_second(one), reads_per_second(many)
        measured = [(reads_per_second(many), reads_per_second(one)) for _ in range(RUNS)]
    ours, peer = (median([each[index] for each in measured]) for index in (0, 1))
    say(f"4 KiB reads through {DEPTH} overlays", f"{ours:,.0f}/s", f"one: {peer:,.0f}/s", ours / peer, "at least 0.9")


main()
