"""For each verb: what must be there before, how to ask for it, and what must be true after it was done or failed."""

from __future__ import annotations

import hashlib
import http.server
import re
import socket
import threading
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from house import HALT, UPLINK, House, scratch
from namespaces import run as run_in

from innkeeper.client import Innkeeper
from innkeeper.client.operation import Operation
from innkeeper.plan.chain import file_name

NAME = "patient"


@dataclass(frozen=True)
class Scenario:
    """`whole` and `before` look at the result; both raise AssertionError. `before` is what a failure must leave."""

    act: Callable[[Innkeeper], Operation]
    whole: Callable[[House], None]
    before: Callable[[House], None]
    prepare: Callable[[House], object] = lambda house: None
    lost: str = ""
    """Code of the error with which it may fail where a daemon died."""


@cache
def port(which: int = 0) -> int:
    """A host port that nobody has."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def spec(name: str = NAME, **more: Any) -> dict[str, Any]:
    """A machine that costs nothing: its firmware finds an empty disk and halts."""
    nic = {"mode": "user", "publish": [{"host": port(), "guest": 80}]} if name == NAME else {"mode": "user"}
    return {"name": name, "image": None, "cpus": 1, "memory": "32M", "disks": [{"size": "1M"}], "nics": [nic]} | more


def make(house: House) -> None:
    house.inn.create(spec(), start=False).wait()


def make_on_interface(house: House) -> None:
    house.inn.create(spec(nics=[{"mode": "macvtap", "parent": UPLINK}]), start=False).wait()


def run(house: House) -> None:
    house.inn.create(spec(), ready=False).wait()


def pause(house: House) -> None:
    run(house)
    house.inn.vm(NAME).pause()


def act(action: str, **options: Any) -> Callable[[Innkeeper], Operation]:
    return lambda inn: inn.vm(NAME).act(action, **options)


def state(*wanted: str) -> Callable[[House], None]:
    def look(house: House) -> None:
        found = house.inn.vm(NAME).state
        assert found in wanted, f"{found}: {house.inn.vm(NAME).info['reason']}"

    return look


def gone(house: House) -> None:
    assert NAME not in [vm["name"] for vm in house.inn.vms()]


def memory(mebibytes: int) -> Callable[[House], None]:
    def look(house: House) -> None:
        assert house.inn.vm(NAME).info["memory"] == mebibytes << 20

    return look


def update(inn: Innkeeper) -> Operation:
    nics = [{"mode": "none"}, {"mode": "user", "publish": [{"host": port(1), "guest": 80}]}]
    document = {"kind": "vm", "state": "stopped", **spec(memory="48M", nics=nics)}
    (operation,) = inn.apply([document])["operations"]
    return inn.operation(operation)


# --- cards and ports ---


def publish(inn: Innkeeper) -> Operation:
    return inn.vm(NAME).publish(f"{port(2)}:80", address="127.0.0.1")


def published(*hosts: int) -> Callable[[House], None]:
    """In the documents, and in the QEMU that runs."""

    def look(house: House) -> None:
        vm = house.inn.vm(NAME).info
        assert [forward["host"] for forward in vm["forwards"]] == list(hosts)
        for host in {port(), port(2)}:
            with socket.socket() as client:
                assert (client.connect_ex(("127.0.0.1", host)) == 0) == (host in hosts), host

    return look


def add_card(inn: Innkeeper) -> Operation:
    return inn.vm(NAME).nic_add(mode="none", model="e1000e")


def pull_out(inn: Innkeeper) -> Operation:
    return inn.vm(NAME).nic_set(0, link="down")


def link(state: str) -> Callable[[House], None]:
    def look(house: House) -> None:
        assert [card["link"] for card in house.inn.vm(NAME).nics] == [state]

    return look


def cards(*models: str) -> Callable[[House], None]:
    def look(house: House) -> None:
        assert [card["model"] for card in house.inn.vm(NAME).nics] == list(models)

    return look


# --- networks ---


def have_network(house: House) -> None:
    house.inn.network_create(NAME).wait()


def have_bridged(house: House) -> None:
    create_bridged(house.inn).wait()


def create_bridged(inn: Innkeeper) -> Operation:
    return inn.network_create(NAME, mode="bridged", parent=UPLINK)


def in_a_network(house: House) -> None:
    have_network(house)
    house.inn.create(spec(nics=[{"mode": "network", "network": NAME}]), start=False).wait()


def let_nothing_in(inn: Innkeeper) -> Operation:
    return inn.vm(NAME).firewall.default("in", "deny")


def lets_in(action: str) -> Callable[[House], None]:
    """In the document, and in the host's firewall."""

    def look(house: House) -> None:
        assert house.inn.vm(NAME).firewall.overview()["inbound"] == action
        assert house.namespace is not None
        listed = run_in(house.namespace, "nft", "list", "table", "bridge", "innkeeper")
        assert ('comment "default in"' in listed) == (action == "deny")

    return look


def has_network(house: House) -> None:
    assert house.inn.network(NAME)["state"] == "active"  # that the host has it is checked for every network


def may_be_half_deleted(house: House) -> None:
    assert house.inn.network(NAME)["state"] in ("active", "deleting")


def has_no_network(house: House) -> None:
    assert house.inn.networks() == []


# --- images ---


@cache
def disk_image() -> Path:
    """A raw image of 1 MiB, as somebody's file."""
    path = scratch() / "disk.raw"
    path.write_bytes(HALT.ljust(510, b"\0") + b"\x55\xaa" + b"data" * 1024 + bytes((1 << 20) - 512 - 4096))
    return path


@cache
def web_server() -> str:
    """The URL of that file."""

    class Handler(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *args: Any) -> None:
            super().__init__(*args, directory=str(disk_image().parent))

        def log_message(self, *args: Any) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return f"http://127.0.0.1:{server.server_port}/disk.raw"


def import_(inn: Innkeeper) -> Operation:
    return inn.image_import(disk_image(), name=NAME, format="raw")


def pull(inn: Innkeeper) -> Operation:
    digest = hashlib.sha256(disk_image().read_bytes()).hexdigest()
    return inn.image_pull(web_server(), sha256=digest, name=NAME, format="raw")


def listed(house: House) -> None:
    assert house.inn.image(NAME)["stored_size"] > 0  # that its bytes are whole is checked for every image


def not_listed(house: House) -> None:
    assert NAME not in [image["name"] for image in house.inn.images()]


def build(replace: bool = False) -> Callable[[Innkeeper], Operation]:
    return lambda inn: inn.image_build("tiny", name=NAME, replace=replace)


def have_image(house: House) -> None:
    import_(house.inn).wait()


def have_used_image(house: House) -> None:
    have_image(house)
    house.inn.create(spec(image=NAME), start=False).wait()


def replaced(house: House) -> None:
    assert house.inn.image(NAME)["source"] == {"recipe": "tiny"}
    assert house.inn.image(NAME)["users"] == []
    # An image that a VM stands on is kept, under another name; one that nobody needs is gone.
    others = [image["name"] for image in house.inn.images() if image["name"] != NAME]
    assert [u for name in others for u in house.inn.image(name)["users"]] == [vm["name"] for vm in house.inn.vms()]


def not_replaced(house: House) -> None:
    (image,) = house.inn.images()
    assert image["name"] == NAME and "file" in image["source"]


# --- forks ---

WARM, FORK = f"{NAME}-warm", "fork"


def warm(inn: Innkeeper) -> Operation:
    """Of a guest without an agent: its boot sector halts."""
    return inn.warm(NAME, spec("warming", image=NAME, nics=[]))


def have_warm(house: House) -> None:
    have_image(house)
    warm(house.inn).wait()


def warmed(house: House) -> None:
    assert house.inn.image(WARM)["kind"] == "warm" and house.inn.image(NAME)["users"] == [WARM]
    assert not house.inn.vms()


def not_warmed(house: House) -> None:
    assert [image["name"] for image in house.inn.images()] == [NAME] and not house.inn.vms()


# --- snapshots ---

DISKS = [{"size": "1M"}, {"size": "1M"}]
LAYER = re.compile(r"disk\d+-[0-9a-f]{12}\.qcow2")


def make_two_disks(house: House) -> None:
    house.inn.create(spec(disks=DISKS), start=False).wait()


def run_uefi(house: House) -> None:
    """Two disks, and UEFI variables that are part of a snapshot."""
    house.inn.create(spec(disks=DISKS, firmware="uefi", memory="64M"), ready=False).wait()


def take(**options: Any) -> Callable[[Innkeeper], Operation]:
    return lambda inn: inn.vm(NAME).snapshots.create("taken", **options)


def snapshots(house: House) -> list[str]:
    return sorted(one["name"] for one in house.inn.vm(NAME).snapshots.list() if one["state"] == "whole")


def chains(house: House) -> None:
    """Whoever runs has exactly those layers open that the store says."""
    vm = house.inn.vm(NAME).info
    documents = house.documents()
    wanted = set()
    for top in documents[f"vm/{vm['id']}"]["disks"]:
        while top is not None:
            layer = documents[f"layer/{top}"]
            wanted.add(file_name(layer))
            top = layer["parent"]
    for pid in house.qemus():
        names = {link.readlink().name for link in Path(f"/proc/{pid.number}/fd").iterdir()}
        assert {name for name in names if LAYER.fullmatch(name)} == wanted
    assert vm["state"] != "paused", "nobody let it go on"


def fork_vm(inn: Innkeeper) -> Operation:
    return inn.forks(NAME, [FORK])[0]


def forked(house: House) -> None:
    assert [house.inn.vm(name).state for name in (NAME, FORK)] == ["running"] * 2
    assert not snapshots(house)


def not_forked(house: House) -> None:
    assert house.inn.vm(NAME).state == "running" and FORK not in [vm["name"] for vm in house.inn.vms()]


def taken(house: House) -> None:
    assert snapshots(house) == ["taken"]
    assert house.inn.vm(NAME).snapshots.overview()["present"]["at"] == "taken"
    chains(house)


def not_taken(house: House) -> None:
    assert snapshots(house) == []
    chains(house)


def have_snapshots(prepare: Callable[[House], object], memory: bool = False) -> Callable[[House], None]:
    """Three, and the present; the first with memory if so wished."""

    def do(house: House) -> None:
        prepare(house)
        for name in ("first", "second", "third"):
            house.inn.vm(NAME).snapshots.create(name, memory=memory and name == "first").wait()

    return do


def measure(inn: Innkeeper) -> Operation:
    return inn.vm(NAME).snapshots.measure("second")


def measured(house: House) -> None:
    assert house.latest("snapshot-measure").state == "failed" or house.latest("snapshot-measure").result == {
        "snapshot": "second", "disks": [None] * 2,  # nothing has been written to them
    }  # fmt: skip
    not_removed(house)


def remove(inn: Innkeeper) -> Operation:
    return inn.vm(NAME).snapshots.delete("second")


def removed(house: House) -> None:
    assert snapshots(house) == ["first", "third"]
    assert len(list(house.home.vms.glob("*/disk*.qcow2"))) == 2 * 3
    chains(house)


def not_removed(house: House) -> None:
    assert set(snapshots(house)) >= {"first", "third"}
    assert "second" in [one["name"] for one in house.inn.vm(NAME).snapshots.list()]
    chains(house)


def remove_last(inn: Innkeeper) -> Operation:
    """The present itself takes part in the merge."""
    return inn.vm(NAME).snapshots.delete("third")


def last_removed(house: House) -> None:
    assert snapshots(house) == ["first", "second"]
    assert len(list(house.home.vms.glob("*/disk*.qcow2"))) == 2 * 3
    chains(house)


def last_not_removed(house: House) -> None:
    assert "third" in [one["name"] for one in house.inn.vm(NAME).snapshots.list()]
    chains(house)


def restore(**options: Any) -> Callable[[Innkeeper], Operation]:
    return lambda inn: inn.vm(NAME).snapshots.restore("first", **options)


def restored(*names: str, wanted: str = "stopped") -> Callable[[House], None]:
    def look(house: House) -> None:
        assert snapshots(house) == [*names, "first", "second", "third"]
        assert house.inn.vm(NAME).snapshots.overview()["present"]["at"] == "first"
        assert house.inn.vm(NAME).state == wanted
        chains(house)

    return look


def not_restored(house: House) -> None:
    assert snapshots(house) == ["first", "second", "third"]
    assert house.inn.vm(NAME).snapshots.overview()["present"]["at"] == "third"
    chains(house)


# --- clones ---

CLONE = "another"


def clone(**options: Any) -> Callable[[Innkeeper], Operation]:
    return lambda inn: inn.vm(NAME).clone(CLONE, **options)


def layers_of(house: House, name: str) -> list[list[dict[str, Any]]]:
    """The layers of each disk of a VM, the top one first."""
    documents = house.documents()
    found = []
    for at in documents[f"vm/{house.inn.vm(name).info['id']}"]["disks"]:
        found.append([])
        while at is not None:
            found[-1].append(documents[f"layer/{at}"])
            at = found[-1][-1]["parent"]
    return found


def cloned(source_layers: int, clone_layers: int) -> Callable[[House], None]:
    """The source is as it was, and the clone is whole. `clone_layers`: of its own."""

    def look(house: House) -> None:
        source, made = house.inn.vm(NAME).info, house.inn.vm(CLONE).info
        assert made["state"] == "stopped" and made["cloned_from"] == NAME
        assert made["machine"]["uuid"] != source["machine"]["uuid"] and made["forwards"] == []
        if house.latest("vm-clone").state == "failed":  # what was not merged then is merged now
            house.inn.vm(NAME).snapshots.prune().wait()
        assert [len(disk) for disk in layers_of(house, NAME)] == [source_layers] * 2
        for ours, theirs in zip(layers_of(house, CLONE), layers_of(house, NAME), strict=True):
            own = [layer for layer in ours if layer["vm"] == made["id"]]
            assert len(own) == clone_layers
            if source["state"] == "stopped" and own == ours:  # nobody has written to either since
                assert [_bytes(house, layer) for layer in ours] == [_bytes(house, layer) for layer in theirs]
        uefi = [(house.home.vm(vm["id"]) / "nvram.fd").exists() for vm in (source, made)]
        assert uefi[0] == uefi[1]
        chains(house)

    return look


def _bytes(house: House, layer: dict[str, Any]) -> bytes:
    return (house.home.vm(layer["vm"]) / file_name(layer)).read_bytes()


def not_cloned(layers: int) -> Callable[[House], None]:
    def look(house: House) -> None:
        assert [vm["name"] for vm in house.inn.vms()] == [NAME]
        assert [len(disk) for disk in layers_of(house, NAME)] == [layers] * 2
        chains(house)

    return look


def have_linked_clone(house: House) -> None:
    run_uefi(house)
    clone(linked=True)(house.inn).wait()


def unlinked(house: House) -> None:
    """The source runs, and has no layer that was there for the clone's sake."""
    assert [vm["name"] for vm in house.inn.vms()] == [NAME]
    assert [len(disk) for disk in layers_of(house, NAME)] == [1] * 2
    chains(house)


def still_linked(house: House) -> None:
    assert house.inn.vm(CLONE).state in ("stopped", "deleting")
    chains(house)


def have_clone(house: House) -> None:
    """The clone is the one that is called `NAME`."""
    house.inn.create(spec("source"), start=False).wait()
    house.inn.vm("source").clone(NAME).wait()


def itself(house: House) -> None:
    state("running")(house)
    due = house.documents()[f"vm/{house.inn.vm(NAME).info['id']}"]["identity_due"]
    assert due is False or house.latest("vm-start").state == "failed"


# --- templates ---

SEALED = f"{NAME}-golden"


def have_used_disks(house: House) -> None:
    have_image(house)
    house.inn.create(spec(image=NAME, disks=DISKS), start=False).wait()


def seal(inn: Innkeeper) -> Operation:
    """Nobody looks into it: there is no image here to do that with."""
    return inn.template_create(NAME, SEALED, accept=True)


def sealed(house: House) -> None:
    template = house.inn.image(SEALED)
    assert template["name"] == f"{SEALED}:1" and template["template"]["disks"] == [1 << 20] * 2
    assert len(template["files"]) == 2 * 4  # of each disk all layers
    assert house.inn.image(NAME)["users"] == [NAME, f"{SEALED}:1"]


def not_sealed(house: House) -> None:
    assert [image["name"] for image in house.inn.images()] == [NAME]
    assert snapshots(house) == ["first", "second", "third"]


SCENARIOS: dict[str, Scenario] = {
    "image-build": Scenario(build(), listed, not_listed),
    "image-build, replacing": Scenario(build(replace=True), replaced, not_replaced, have_image),
    "image-build, replacing one in use": Scenario(build(replace=True), replaced, not_replaced, have_used_image),
    "image-import": Scenario(import_, listed, not_listed),
    "image-pull": Scenario(pull, listed, not_listed),
    "image-delete": Scenario(lambda inn: inn.image_delete(NAME), not_listed, listed, have_image),
    "image-verify": Scenario(lambda inn: inn.image_verify(NAME), listed, listed, have_image),
    "template-create": Scenario(seal, sealed, not_sealed, have_snapshots(have_used_disks)),
    "template-warm": Scenario(warm, warmed, not_warmed, have_image),
    "vm-fork": Scenario(lambda inn: inn.forks(WARM, [NAME])[0], state("running"), gone, have_warm),
    "vm-fork, of a VM": Scenario(fork_vm, forked, not_forked, run_uefi, lost="action-refused"),
    "network-create": Scenario(lambda inn: inn.network_create(NAME), has_network, has_no_network),
    "network-create, bridged": Scenario(create_bridged, has_network, has_no_network),
    "network-delete": Scenario(lambda inn: inn.network_delete(NAME), has_no_network, may_be_half_deleted, have_network),
    "network-delete, bridged": Scenario(
        lambda inn: inn.network_delete(NAME), has_no_network, may_be_half_deleted, have_bridged
    ),
    "vm-create": Scenario(lambda inn: inn.create(spec(), start=False), state("stopped"), gone),
    "vm-launch": Scenario(lambda inn: inn.create(spec(), ready=False), state("running"), gone),
    "vm-clone": Scenario(clone(), cloned(1, 1), not_cloned(1), run_uefi),
    "vm-clone, linked": Scenario(clone(linked=True), cloned(2, 1), not_cloned(1), run_uefi),
    "vm-clone, stopped": Scenario(clone(), cloned(4, 4), not_cloned(4), have_snapshots(make_two_disks)),
    "vm-clone, stopped and linked": Scenario(clone(linked=True), cloned(2, 1), not_cloned(1), make_two_disks),
    "vm-start": Scenario(act("start"), state("running"), state("stopped"), make),
    "vm-start, on an interface": Scenario(act("start"), state("running"), state("stopped"), make_on_interface),
    "vm-start, a clone": Scenario(act("start"), itself, state("stopped"), have_clone),
    "vm-stop": Scenario(act("stop", force=True), state("stopped"), state("running", "stopped"), run),
    "vm-restart": Scenario(act("restart", force=True), state("running"), state("running", "stopped"), run),
    "vm-pause": Scenario(act("pause"), state("paused"), state("running"), run),
    "vm-resume": Scenario(act("resume"), state("running"), state("paused", "running"), pause),
    "vm-update": Scenario(update, memory(48), memory(32), make),
    "vm-nics": Scenario(publish, published(port(), port(2)), published(port()), run),
    "vm-nics, of one that is stopped": Scenario(add_card, cards("virtio", "e1000e"), cards("virtio"), make),
    "vm-firewall, in a network": Scenario(let_nothing_in, lets_in("deny"), lets_in("allow"), in_a_network),
    "vm-nics, set": Scenario(pull_out, link("down"), link("up"), run),
    "vm-delete": Scenario(act("delete"), gone, state("stopped", "deleting"), make),
    "vm-delete, a linked clone": Scenario(
        lambda inn: inn.vm(CLONE).act("delete"), unlinked, still_linked, have_linked_clone
    ),
    "snapshot-create": Scenario(take(), taken, not_taken, run_uefi),
    "snapshot-create, stopped": Scenario(take(), taken, not_taken, make_two_disks),
    "snapshot-create, with memory": Scenario(take(memory=True), taken, not_taken, run_uefi),
    "snapshot-delete": Scenario(remove, removed, not_removed, have_snapshots(run_uefi)),
    "snapshot-delete, the last": Scenario(remove_last, last_removed, last_not_removed, have_snapshots(run_uefi)),
    "snapshot-delete, stopped": Scenario(remove, removed, not_removed, have_snapshots(make_two_disks)),
    "snapshot-measure": Scenario(measure, measured, not_removed, have_snapshots(run_uefi)),
    "snapshot-restore": Scenario(restore(), restored("auto-1"), not_restored, have_snapshots(make_two_disks)),
    "snapshot-restore, nothing kept": Scenario(
        restore(keep=False, start=True), restored(wanted="running"), not_restored, have_snapshots(run_uefi)
    ),
    "snapshot-restore, with memory": Scenario(
        restore(force=True), restored("auto-1", wanted="running"), not_restored, have_snapshots(run_uefi, memory=True)
    ),
}
