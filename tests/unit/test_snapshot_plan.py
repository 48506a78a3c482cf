"""Which layers of a VM can go: the rule, tried on random trees by following it to its end."""

from __future__ import annotations

import random

import pytest

from innkeeper.plan.snapshot import Drop, Join, lineage, machine_then, unneeded


def layer(name: str, parent: str | None, vm: str = "v") -> dict:
    return {"id": name, "vm": vm, "disk": 0, "parent": parent, "image": None}


def snapshot(name: str, state: str = "whole") -> dict:
    return {"id": f"s-{name}", "disks": [name], "state": state}


def tree(*edges: str) -> dict[str, dict]:
    """`a`, `a>b` (b stands on a), …"""
    pairs = [edge.split(">") if ">" in edge else [None, edge] for edge in edges]
    return {name: layer(name, parent) for parent, name in pairs}


@pytest.mark.parametrize(
    ("layers", "tops", "snapshots", "wanted"),
    [
        (tree("a"), ["a"], [], None),
        (tree("a", "a>b"), ["b"], [snapshot("a")], None),
        (tree("a", "a>b"), ["b"], [], Join("a", "b")),
        (tree("a", "a>b"), ["b"], [snapshot("a", "deleting")], Join("a", "b")),
        (tree("a", "a>b", "b>c"), ["c"], [snapshot("a")], Join("b", "c")),
        (tree("a", "a>b", "a>c"), ["c"], [snapshot("b")], None),  # several stand on a
        (tree("a", "a>b", "a>c"), ["c"], [], Drop("b")),
        (tree("a", "b"), ["b"], [], Drop("a")),
        (tree("a", "a>b") | {"x": layer("x", "a", vm="w")}, ["b"], [], None),
        (tree("a", "b") | {"x": layer("x", "a", vm="w")}, ["b"], [], None),  # another VM stands on it
        (tree("a", "a>b", "b>c") | {"x": layer("x", "b", vm="w")}, ["c"], [], None),  # and on what is below
        (tree("a", "a>b", "b>c", "c>d") | {"x": layer("x", "a", vm="w")}, ["d"], [], Join("b", "c")),
    ],
)
def test_the_next_layer_that_can_go(layers, tops, snapshots, wanted):
    assert unneeded({"id": "v", "disks": tops}, layers, snapshots) == wanted


@pytest.mark.parametrize("seed", range(40))
def test_followed_to_its_end_what_is_needed_reads_the_same(seed):
    """Each layer holds a few blocks; a disk reads each block from the topmost layer that has it."""
    chance = random.Random(seed)
    layers = {"l0": layer("l0", None)}
    for number in range(1, 20):
        layers[f"l{number}"] = layer(f"l{number}", chance.choice(list(layers)))
    data = {name: {chance.randrange(8): f"{name}" for _ in range(3)} for name in layers}
    leaves = [name for name in layers if not any(other["parent"] == name for other in layers.values())]
    vm = {"id": "v", "disks": [chance.choice(leaves)]}
    kept = [snapshot(name) for name in chance.sample(sorted(set(layers) - set(vm["disks"])), 5)]

    def read(top: str) -> dict[int, str]:
        blocks: dict[int, str] = {}
        for name in lineage(layers, top):
            blocks = data[name] | blocks
        return blocks

    before = [read(s["disks"][0]) for s in kept], read(vm["disks"][0])
    while (action := unneeded(vm, layers, kept)) is not None:
        if isinstance(action, Drop):
            del layers[action.layer]
        elif chance.random() < 0.5:  # up
            data[action.upper] = data[action.lower] | data[action.upper]
            layers[action.upper]["parent"] = layers[action.lower]["parent"]
            del layers[action.lower]
        else:  # down
            data[action.lower] |= data[action.upper]
            for other in layers.values():
                if other["parent"] == action.upper:
                    other["parent"] = action.lower
            for what in (vm, *kept):
                what["disks"] = [action.lower if d == action.upper else d for d in what["disks"]]
            del layers[action.upper]
        assert ([read(s["disks"][0]) for s in kept], read(vm["disks"][0])) == before
    assert len(layers) <= 2 * len(kept) + 1


def test_the_machine_of_a_saved_memory_keeps_what_the_guest_does_not_see():
    def nic(mode, *ports, limit=None):
        return {"mode": mode, "model": "virtio", "mac": None, "limit": limit, "publish": list(ports)}

    pinned = {"machine_type": "pc-q35-7.2", "accelerator": "tcg", "cpu_model": "Westmere-v1"}
    then = {
        "spec": {"name": "old", "note": "", "first_boot": {}, "cpus": 1, "memory": 1 << 28, "firmware": "bios",
                 "nics": [nic("user", 1), nic("none"), nic("user", 2)]},
        "identity": pinned | {"macs": ["a", "b", "c"], "uuid": "u", "ssh_port": 7},
    }  # fmt: skip
    now = {
        "spec": then["spec"] | {"name": "new", "note": "mine", "cpus": 4, "nics": [nic("user", 8), nic("user", 9)]},
        "identity": pinned | {"macs": ["a", "x"], "uuid": "u", "ssh_port": 9},
    }
    fields, words = machine_then(now, then)
    assert fields["spec"] == then["spec"] | {
        "name": "new", "note": "mine", "nics": [nic("user", 8), nic("none"), nic("user")],
    }  # fmt: skip
    assert fields["identity"] == pinned | {"macs": ["a", "b", "c"], "uuid": "u", "ssh_port": 9, "cards": None}
    assert words == ["vCPUs (4 → 1)", "NICs", "MAC addresses"]
    assert machine_then(then, then)[1] == []
    then["spec"]["nics"], now["spec"]["nics"] = [nic("network", limit=1)], [nic("network", limit=2)]
    assert machine_then(now, then)[0]["spec"]["nics"] == [nic("network", limit=2)]
