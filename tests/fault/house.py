"""A daemon that dies and comes back, and what must hold whatever happened to it."""

from __future__ import annotations

import asyncio
import atexit
import json
import os
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

from blake3 import blake3
from conftest import CACHE, Daemon, _folder
from forking import ForkServer
from namespaces import programs, run

from innkeeper.client.errors import ApiError, DaemonUnreachable
from innkeeper.client.operation import Operation
from innkeeper.operations.image_verify import digest as _digest
from innkeeper.plan.chain import file_name
from innkeeper.plan.network import macvtap_name, network_of
from innkeeper.qemu import cgroup
from innkeeper.qemu.process import Pid

IN_BETWEEN = {"creating", "starting", "stopping", "deleting"}
UPLINK, FAR_END, UPLINK_ADDRESS = "eth0", "far-end", "192.0.2.1"
"""Of the namespace in which networks are made: its way out."""
SETTLE = 20
"""Seconds after which what has not come to rest counts as stuck."""


@cache
def fork_server() -> ForkServer:
    """The one of this test process."""
    server = ForkServer()
    atexit.register(server.close)
    return server


def scratch() -> Path:
    """A folder that goes with this process."""
    folder = Path(tempfile.mkdtemp(prefix="inn-test-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


@cache
def small_build() -> Path:
    """What a build makes, in small: the harness is about the steps around the build."""
    folder = scratch()
    files = {"kernel": "kernel", "initrd": "initrd"}
    for name in files.values():
        (folder / name).write_bytes(name.encode() * 1000)
    record = {
        "kind": "kernel", "files": files, "format": "", "cmdline": "", "virtual_size": 0, "user": "root", "agent": True,
        "cloud_init": False, "source": {"recipe": "tiny"},
        "digests": {name: blake3((folder / name).read_bytes()).hexdigest() for name in files.values()},
    }  # fmt: skip
    (folder / "image.json").write_text(json.dumps(record))
    return folder


HALT = b"\xfa\xf4\xeb\xfd"
"""cli; hlt; and again: a guest that takes no CPU from the one beside it."""


@cache
def halting_firmware() -> Path:
    """A configuration folder with UEFI firmware that halts at once: the harness is about the steps around it, and the
    real one works for seconds in each guest until it has found that there is nothing to boot."""
    folder = scratch()
    folder.chmod(0o711)  # QEMU's own user must be able to pass through
    code, variables = folder / "code.fd", folder / "vars.fd"
    code.write_bytes(HALT.ljust(16, b"\xff").rjust(3 << 20, b"\xff"))  # the CPU starts 16 bytes before its end
    variables.write_bytes(b"\xff" * (128 << 10))
    mapping = {
        "device": "flash",
        "executable": {"filename": str(code), "format": "raw"},
        "nvram-template": {"filename": str(variables), "format": "raw"},
    }
    target = {"architecture": "x86_64", "machines": ["pc-q35-*"]}
    descriptor = {"interface-types": ["uefi"], "mapping": mapping, "targets": [target], "features": []}
    for path in (code, variables):
        path.chmod(0o644)
    (folder / "qemu/firmware").mkdir(parents=True)
    (folder / "qemu/firmware/00-halts.json").write_text(json.dumps(descriptor))
    return folder


class House(Daemon):
    """A daemon from the fork server."""

    def __init__(self, real_builds: bool = False, pool: Path | None = None, namespace: str | None = None) -> None:
        self.namespace = namespace
        CACHE.mkdir(mode=0o711, exist_ok=True)
        super().__init__(_folder(), pool)
        self.environment = {} if real_builds else {"TEST_BUILT_IMAGE": str(small_build())}

    def start(self, fault: str = "", wait: bool = True) -> House:
        self.know_the_host()
        env = self.environment | {
            "INNKEEPER_HOME": str(self.home.data),
            "INNKEEPER_POOL": str(self.home.pool),
            "INNKEEPER_FAULT": fault,
            "XDG_CONFIG_HOME": str(halting_firmware()),
            "TEST_SSH_PORTS": str(20000 + os.getpid() % 200 * 50),  # every home counts from the same number
            "TEST_NAMESPACE": self.namespace or "",
        }
        self.process = fork_server().fork(env, self.home.daemon_log)  # type: ignore[assignment]
        if wait:
            self.wait()
        return self

    @property
    def dead(self) -> bool:
        assert self.process is not None
        return self.process.poll() is not None

    def end(self) -> None:
        """SIGKILL, if it still lives."""
        if not self.dead:
            self.kill()

    def settle(self) -> None:
        """Wait until no operation is open."""
        deadline = time.monotonic() + SETTLE
        while left := [o for o in self.inn.operations() if not o.ended]:
            assert time.monotonic() < deadline, f"stuck: {[o.document for o in left]}\n{self.log()[-3000:]}"
            left[0].poll(1)

    def latest(self, kind: str) -> Operation:
        """The newest operation of a kind."""
        return next(o for o in self.inn.operations() if o.kind == kind)

    def empty(self) -> None:
        """Delete everything; nothing but history may be left."""
        for vm in self.inn.vms():
            self.inn.vm(vm["name"]).delete(force=True)
        for image in sorted(self.inn.images(), key=lambda image: not image["base"]):  # those that stand on others
            if image["name"] != "tiny":
                self.inn.image_delete(image["name"]).wait()
        for network in self.inn.networks():
            self.inn.network_delete(network["name"]).wait()
        self.check()
        left = {key for key in self.documents() if not key.startswith(("event/", "operation/"))}
        assert left <= {"image/tiny00000000", "name/image/tiny"}, left

    # --- what must hold ---

    def check(self, deleting: bool = False) -> None:
        """All that must hold when no operation is under way, at the latest a moment after the last one's end.
        `deleting`: a VM or a network may be half-deleted, for the next attempt to finish."""
        deadline = time.monotonic() + 3
        while problems := list(self._problems(deleting)):
            assert time.monotonic() < deadline, "\n".join(problems) + f"\n--- log:\n{self.log()[-3000:]}"
            time.sleep(0.02)

    def _problems(self, deleting: bool) -> Iterator[str]:
        documents = self.documents()

        def under(prefix: str) -> dict[str, dict[str, Any]]:
            return {key.removeprefix(prefix): value for key, value in documents.items() if key.startswith(prefix)}

        vms, images, networks = under("vm/"), under("image/"), under("network/")
        for operation in under("operation/").values():
            if not operation["ended"]:
                yield f"operation {operation['kind']} is {operation['state']} for ever"
        for what in (*vms.values(), *images.values(), *networks.values()):
            if what["operation"]:
                yield f"{what['name']} is held by {what['operation']}"
        for vm in vms.values():
            if vm["state"] in IN_BETWEEN - ({"deleting"} if deleting else set()):
                yield f"{vm['name']} is {vm['state']} for ever"
        yield from self._processes(vms, under("live/"))
        if tools := self.tools(set(under("operation/"))):
            yield f"tools are left: {tools}"
        if self.namespace:
            macvtaps = {macvtap_name(vm, 0) for vm in under("live/") if vms[vm]["spec"]["nics"][0]["mode"] == "macvtap"}
            if {name.name for name in Path("/dev").glob("innm-*")} & macvtaps:
                yield "a device node is left"
            subnets = documents.get("subnets/ipv4", {})
            yield from self._networks(self.namespace, networks, macvtaps, subnets, deleting)
        yield from self._claims(vms, images, documents)
        yield from self._folders(vms, images, under("layer/"))
        yield from self._snapshots(vms, under("snapshot/"), under("layer/"))

    def _processes(self, vms: dict[str, Any], live: dict[str, Any]) -> Iterator[str]:
        running = {id for id, vm in vms.items() if vm["state"] in ("running", "paused")}
        qemus = self.qemus()
        if Counter(qemus.values()) != Counter(running):
            yield f"QEMU runs for {sorted(qemus.values())}, and running or paused are {sorted(running)}"
        if {(pid, id) for pid, id in qemus.items()} != {(Pid(v["pid"], v["started"]), id) for id, v in live.items()}:
            yield f"QEMU's pids are {qemus}, recorded are {live}"
        for vm in self.inn.vms():
            if vm["pid"] not in ({pid.number for pid, id in qemus.items() if id == vm["id"]} or {None}):
                yield f"{vm['name']} has pid {vm['pid']}, and there are {qemus}"
        groups = asyncio.run(cgroup.list_ours(self.home))
        if groups - running:
            yield f"cgroups of {groups - running} are left"
        for id, vm in vms.items():
            sockets = {path.name for path in self.home.vm(id).glob("*.sock")}
            if sockets and id not in running:
                yield f"sockets of {vm['name']} ({vm['state']}) are left: {sockets}"

    def tools(self, operations: set[str]) -> list[str]:
        """Command lines of tools that one of these operations started."""
        found = []
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit():
                try:
                    environment = (entry / "environ").read_bytes().split(b"\0")
                    if any(
                        pair.removeprefix(b"INNKEEPER_JOB=").decode(errors="replace") in operations
                        for pair in environment
                    ):
                        found.append((entry / "cmdline").read_bytes().replace(b"\0", b" ").decode())
                except OSError:
                    continue
        return found

    def _claims(self, vms: dict[str, Any], images: dict[str, Any], documents: dict[str, Any]) -> Iterator[str]:
        expected = {}
        for id, vm in vms.items():
            expected |= {f"name/vm/{vm['name']}": id, f"slot/{vm['identity']['slot']}": id}
            ports = [(f["protocol"], f["host"]) for nic in vm["spec"]["nics"] for f in nic["publish"]]
            ports += [("tcp", vm["identity"]["ssh_port"])] if vm["identity"]["ssh_port"] else []
            expected |= {f"port/{protocol}/{port}": id for protocol, port in ports}
        expected |= {f"name/image/{image['name']}": id for id, image in images.items()}
        networks = [value for key, value in documents.items() if key.startswith("network/")]
        expected |= {f"name/network/{network['name']}": network["id"] for network in networks}
        snapshots = [value for key, value in documents.items() if key.startswith("snapshot/")]
        expected |= {f"name/snapshot/{s['vm']}/{s['name']}": s["id"] for s in snapshots}
        found = {key: value["id"] for key, value in documents.items() if key.startswith(("name/", "slot/", "port/"))}
        if found != expected:
            over, lost = found.items() - expected.items(), expected.items() - found.items()
            yield f"claims differ: left over {over}, lost {lost}"
        secrets = {key.removeprefix("secret/vm/") for key in documents if key.startswith("secret/")}
        if secrets != set(vms):
            yield f"secrets of {secrets ^ set(vms)} have no VM, or the other way round"

    def _networks(
        self, host: str, networks: dict[str, Any], macvtaps: set[str], subnets: dict[str, Any], deleting: bool
    ) -> Iterator[str]:
        if subnets != {id: network["subnet"] for id, network in networks.items()}:
            yield f"claimed are the subnets {subnets}"
        if deleting and any(network["state"] == "deleting" for network in networks.values()):
            return  # of what it had on the host, any part may be gone
        known = {network_of(network) for network in networks.values()}
        links = {link["ifname"]: link for link in json.loads(run(host, "ip", "-j", "addr"))}
        if links.keys() != {"lo", UPLINK, FAR_END, *macvtaps, *(network.bridge for network in known)}:
            yield f"the host has {set(links)}, and the networks are {set(networks)}, the macvtaps {macvtaps}"
        taken_in = [network.bridge for network in known if network.parent]
        has_the_address = [name for name, link in links.items() if UPLINK_ADDRESS in str(link["addr_info"])]
        if has_the_address != (taken_in or [UPLINK]) or [links[UPLINK].get("master")] != (taken_in or [None]):
            yield f"the host's own address is on {has_the_address}, and the bridges over it are {taken_in}"
        if not any(route["dst"] == "default" for route in json.loads(run(host, "ip", "-j", "route"))):
            yield "the host's way out is gone"
        tables = json.loads(run(host, "nft", "-j", "list", "tables"))["nftables"][1:]
        if len(tables) != (2 if networks else 0) + len(macvtaps):
            yield f"the host has the tables {tables}, and the networks are {set(networks)}"
        with_subnet = [network for network in known if network.subnet]
        if run(host, "cat", "/proc/sys/net/ipv4/ip_forward") != ("1\n" if with_subnet else "0\n"):
            yield "forwarding is not what it should be"
        resolvers = [name for name in programs(host).values() if name == "dnsmasq"]
        if len(resolvers) != len(with_subnet):
            yield f"there are {len(resolvers)} dnsmasq and {len(with_subnet)} networks with addresses of ours"
        for network in networks.values():
            if network["state"] != "active":
                yield f"network {network['name']} is {network['state']} for ever"

    def _folders(self, vms: dict[str, Any], images: dict[str, Any], layers: dict[str, Any]) -> Iterator[str]:
        for folder, wanted in ((self.home.vms, set(vms)), (self.home.images, set(images)), (self.home.work, set())):
            there = {path.name for path in folder.iterdir()}
            if (there ^ wanted) - {id for id, vm in vms.items() if vm["state"] == "deleting"}:
                yield f"{folder} has {there}, and the documents say {wanted}"
        for id, image in images.items():
            for name, digest in image["digests"].items():
                path = self.home.image(id) / name
                if image["name"] != "tiny" and (not path.exists() or _digest(path) != digest):
                    yield f"image {image['name']} is listed and its {name} is not whole"
        for id, vm in vms.items():
            wanted = {file_name(layer) for layer in layers.values() if layer["vm"] == id}
            there = {path.name for path in self.home.vm(id).glob("disk*")}
            if vm["state"] != "deleting" and (wanted != there or not set(vm["disks"]) <= layers.keys()):
                yield f"{vm['name']} should have {wanted} and has {there}"
        if strays := {layer["vm"] for layer in layers.values()} - vms.keys():
            yield f"there are layers of {strays}, which are gone"

    def _snapshots(self, vms: dict[str, Any], snapshots: dict[str, Any], layers: dict[str, Any]) -> Iterator[str]:
        for snapshot in snapshots.values():
            if snapshot["vm"] not in vms:
                yield f"snapshot {snapshot['name']} has no VM"
            elif snapshot["state"] == "whole" and not set(snapshot["disks"]) <= layers.keys():
                yield f"snapshot {snapshot['name']} has lost a layer"
            if snapshot["parent"] is not None and snapshot["parent"] not in snapshots:
                yield f"snapshot {snapshot['name']} stands on one that is gone"
        for id, vm in vms.items():
            if vm["at"] is not None and vm["at"] not in snapshots:
                yield f"{vm['name']} stands on a snapshot that is gone"
            for disk, top in enumerate(vm["disks"]):
                below: str | None = top
                while below is not None and below in layers:
                    if layers[below]["disk"] != disk:
                        yield f"{vm['name']}: layer {below} belongs to another disk"
                    below = layers[below]["parent"]
                if below is not None:
                    yield f"{vm['name']}: layer {below} is gone, and others stand on it"
            if vm["state"] != "deleting":
                there = {path.name for path in self.home.vm(id).glob("[nm][ve]*-*")}
                wanted = {f"nvram-{s['id']}.fd" for s in snapshots.values() if s["vm"] == id and s["nvram"]}
                wanted |= {
                    f"memory-{s['id']}"
                    for s in snapshots.values()
                    if s["vm"] == id and s["memory"] and not s["passing"]
                }
                if there != wanted:
                    yield f"{vm['name']} should have {wanted} and has {there}"


def attempt(house: House, act: Any) -> Operation | None:
    """Do it, whatever comes of it; None when the daemon died."""
    try:
        return act(house.inn).wait_quietly()
    except (DaemonUnreachable, OSError):
        return None
    except ApiError:
        if house.dead:
            return None
        raise
