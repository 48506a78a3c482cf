"""Reading through a chain of layers: random 4 KiB reads of allocated clusters through 16 layers, and through one.

    .venv/bin/python bench/chain.py [RUNS]

The disk has 512 MiB of data; of the 16 layers each holds a sixteenth of the clusters, in no order. First as a guest
reads it, from its disk; then without one: the layers are opened with the options that a VM's QEMU gets
(plan/devices.py), by `qemu-img bench`. A step of a prime number of blocks comes by all of them in no order that a disk
or a cache could foresee. All is in the host's page cache, so that what is measured is the layers and not its disk.
"""

from __future__ import annotations

import json
import random
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

from common import median, running_daemon, say

from innkeeper.client import Innkeeper
from innkeeper.client.vm import VM
from innkeeper.plan.chain import Layer
from innkeeper.plan.devices import volume
from innkeeper.storage.formats.qcow2 import write_overlay

RUNS = int(sys.argv[1]) if len(sys.argv) > 1 else 10
SIZE, CLUSTER, DEPTH = 512 << 20, 64 << 10, 16
READS, GUEST_READS, STEP = 100_000, 5_000, 4096 * 7919


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


WRITE = f"""
open(my $disk, "+<", "/dev/vda") or die; srand 1;
my @all = (0 .. {SIZE // CLUSTER} - 1);
for my $n (reverse 1 .. $#all) {{ my $m = int rand($n + 1); @all[$n, $m] = @all[$m, $n] }}
my $share = @all / $ARGV[1];
for my $each (splice @all, $ARGV[0] * $share, $share) {{
  sysseek $disk, $each * {CLUSTER}, 0; syswrite $disk, chr($each % 251 + 1) x {CLUSTER} or die;
}}
"""
READ = f"""
sub now {{ open my $up, "<", "/proc/uptime"; (split " ", <$up>)[0] }}
open(my $disk, "<", "/dev/vda") or die; my ($at, $begun) = (0, now());
for (1 .. {GUEST_READS}) {{
  sysseek $disk, $at, 0; sysread $disk, my $read, 4096 or die; $at = ($at + {STEP}) % {SIZE};
}}
print {GUEST_READS} / (now() - $begun);
"""
"""For the guest's Perl: write one of so many shares of the clusters, in no order; read."""


def filled(inn: Innkeeper, name: str, depth: int) -> VM:
    """A running VM whose disk has its data in so many layers."""
    vm = inn.launch("tiny", name=name, memory="256M", disk=f"{SIZE >> 20}M")
    for number in range(depth):
        if number:
            vm.snapshots.create().wait()
        ran = vm.exec(["sh", "-c", 'perl -e "$0" "$@" && sync', WRITE, str(number), str(depth)])
        assert ran.status == 0, ran
    return vm


def guest_reads_per_second(vm: VM) -> float:
    ran = vm.exec(["sh", "-c", 'echo 3 >/proc/sys/vm/drop_caches; perl -e "$0"', READ])
    assert ran.status == 0, ran
    return float(ran.stdout)


def in_guests() -> list[tuple[float, float]]:
    with running_daemon("tiny") as daemon:
        print(f"accelerator: {daemon.inn.host()['accelerator']['name']}")
        many, one = filled(daemon.inn, "many", DEPTH), filled(daemon.inn, "one", 1)
        return in_turn(lambda: guest_reads_per_second(many), lambda: guest_reads_per_second(one))


def in_turn(ours: Callable[[], float], peer: Callable[[], float]) -> list[tuple[float, float]]:
    """Pairs, every second of them the other way round."""
    pairs = []
    for number in range(RUNS):
        if number % 2:
            pairs.append((ours(), peer()))
        else:
            pairs.append((peer(), ours())[::-1])
    return pairs


def tell(what: str, measured: list[tuple[float, float]]) -> None:
    ours, peer = (median([each[index] for each in measured]) for index in (0, 1))
    what = f"4 KiB reads through {DEPTH} layers, {what}"
    say(what, f"{ours:,.0f}/s", f"one: {peer:,.0f}/s", ours / peer, "at least 0.9")


def main() -> None:
    tell("by a guest", in_guests())
    with tempfile.TemporaryDirectory(prefix="inn-bench-") as name:
        one, many = chain(Path(name), 1), chain(Path(name), DEPTH)
        reads_per_second(one), reads_per_second(many)
        measured = in_turn(lambda: reads_per_second(many), lambda: reads_per_second(one))
    tell("by qemu-img alone", measured)


main()
