"""The host with its images and VMs: where everything in the SDK begins."""

from __future__ import annotations

import getpass
import json
import os
import socket
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

from innkeeper.base.home import Home
from innkeeper.client import transport
from innkeeper.client.errors import DaemonUnreachable, SocketForbidden
from innkeeper.client.operation import Operation, Progress
from innkeeper.client.pool import Pool
from innkeeper.client.vm import VM
from innkeeper.client.wishes import vm_spec

SYSTEM_SOCKET = "/run/innkeeper/api.sock"
"""Where the daemon of the whole machine listens (base/home.py for root)."""


def find_socket(environ: Any = None) -> str:
    """The socket to ask: the one of `INNKEEPER_HOME`, else this user's own daemon if it ever ran, else the system's if
    that exists, else this user's own."""
    environ = os.environ if environ is None else environ
    own = str(Home.find(environ).socket)
    if environ.get("INNKEEPER_HOME") or os.path.lexists(own):
        return own
    return SYSTEM_SOCKET if os.path.lexists(SYSTEM_SOCKET) else own


class Innkeeper:
    """A client of one daemon. Stateless and safe to share between threads: each call is one connection.

    >>> inn = Innkeeper()
    >>> vm = inn.launch("debian-12", name="web", memory="2G", publish=["8080:80"])
    >>> vm.exec(["hostname"]).stdout
    b'web\\n'

    `path` is the socket's, by default the one `find_socket` finds. `when_unreachable` is called with the error when
    nobody answers; if it returns, the request is tried once more (so `inn` starts its daemon).
    """

    def __init__(
        self,
        path: str | os.PathLike[str] | None = None,
        *,
        when_unreachable: Callable[[DaemonUnreachable], object] | None = None,
    ) -> None:
        self.socket = os.fspath(path) if path else find_socket()
        self._when_unreachable = when_unreachable

    # --- the machinery ---

    def request(self, method: str, path: str, **options: Any) -> transport.Response:
        """One request to `/v1` + `path`, its body not yet read; options as of `transport.request`."""
        return transport.request(self.connect(), method, "/v1" + path, **options)

    def connect(self) -> socket.socket:
        """A fresh connection to the daemon, which `when_unreachable` may have to start first."""
        try:
            return transport.connect(self.socket)
        except SocketForbidden:
            raise
        except DaemonUnreachable as error:
            if not self._when_unreachable:
                raise
            self._when_unreachable(error)
            return transport.connect(self.socket)

    def call(self, method: str, path: str, **options: Any) -> Any:
        """One request, its answer as JSON data."""
        with self.request(method, path, **options) as response:
            return response.json()

    def operate(self, method: str, path: str, **options: Any) -> Operation:
        """One request that the daemon answers with an operation."""
        return Operation(self, self.call(method, path, **options))

    @staticmethod
    def part(name: str) -> str:
        """A name as one part of a path."""
        return quote(name, safe="") or "%20"

    # --- the host ---

    def version(self) -> dict[str, Any]:
        """Of the daemon: version, pid, when it started, its data folder."""
        document: dict[str, Any] = self.call("GET", "/version")
        return document

    def host(self) -> dict[str, Any]:
        """Facts of the host, the accelerator and why, what is free."""
        document: dict[str, Any] = self.call("GET", "/host")
        return document

    def events(
        self, *, follow: bool = False, after: int | None = None, tail: int | None = None
    ) -> Iterator[dict[str, Any]]:
        """What happened, oldest first; `follow` goes on for ever."""
        query = {"follow": follow, "after": after, "tail": tail}
        if not follow:
            yield from self.call("GET", "/events", query=query)
            return
        with self.request("GET", "/events", query=query, timeout=None) as response:
            for line in response.lines():
                if line.startswith(b"data:"):
                    yield json.loads(line[5:])

    # --- images ---

    def images(self) -> list[dict[str, Any]]:
        """All images."""
        documents: list[dict[str, Any]] = self.call("GET", "/images")
        return documents

    def image(self, name: str) -> dict[str, Any]:
        """One image, with the names of the VMs that use it."""
        document: dict[str, Any] = self.call("GET", f"/images/{self.part(name)}")
        return document

    def recipes(self) -> list[dict[str, Any]]:
        """What `image_build` can build."""
        documents: list[dict[str, Any]] = self.call("GET", "/recipes")
        return documents

    def image_build(self, recipe: str, *, name: str | None = None, replace: bool = False) -> Operation:
        """Build a golden image from a recipe."""
        body = {"recipe": recipe, "name": name, "replace": replace}
        return self.operate("POST", "/images/build", document=body)

    def image_import(self, path: str | os.PathLike[str], *, name: str, format: str | None = None) -> Operation:
        """Copy a disk image file of this host into the pool."""
        body = {"path": str(Path(path).absolute()), "name": name, "format": format}
        return self.operate("POST", "/images/import", document=body)

    def image_pull(self, url: str, *, sha256: str, name: str, format: str | None = None) -> Operation:
        """Download a disk image; its SHA-256 is checked before anything reads it."""
        body = {"url": url, "sha256": sha256, "name": name, "format": format}
        return self.operate("POST", "/images/pull", document=body)

    def image_delete(self, name: str) -> Operation:
        """Remove an image that no VM uses."""
        return self.operate("DELETE", f"/images/{self.part(name)}")

    def template_create(
        self,
        vm: str,
        name: str,
        *,
        version: str | None = None,
        accept: bool = False,
        clean: bool = False,
        note: str = "",
        by: str | None = None,
    ) -> Operation:
        """Seal the disks of a stopped VM as a template, an image `name:version`; the next number by default. Fails with
        what is found that must not be in it, unless `accept`; `clean` removes what every machine makes anew."""
        who = by if by is not None else f"{getpass.getuser()}@{socket.gethostname()}"
        body = {
            "vm": vm, "name": name, "version": version, "accept": accept, "clean": clean, "note": note, "by": who,
        }  # fmt: skip
        return self.operate("POST", "/templates", document=body)

    def image_verify(self, name: str) -> Operation:
        """Prove that an image's files are what they were when it was made."""
        return self.operate("POST", f"/images/{self.part(name)}/verify")

    def image_history(self, name: str) -> dict[str, Any]:
        """{"line": [the image, what it stands on, …], "versions": [of a template, the newest first]}."""
        document: dict[str, Any] = self.call("GET", f"/images/{self.part(name)}/history")
        return document

    # --- networks ---

    def networks(self) -> list[dict[str, Any]]:
        """All networks, with the cards that are in them."""
        documents: list[dict[str, Any]] = self.call("GET", "/networks")
        return documents

    def network(self, name: str) -> dict[str, Any]:
        """One network, with the cards that are in it."""
        document: dict[str, Any] = self.call("GET", f"/networks/{self.part(name)}")
        return document

    def ports(self) -> list[dict[str, Any]]:
        """Every host port that leads into a VM, by port."""
        documents: list[dict[str, Any]] = self.call("GET", "/ports")
        return documents

    def network_create(
        self,
        name: str,
        *,
        mode: str = "nat",
        parent: str | None = None,
        subnet: str | None = None,
        ipv6: bool = True,
        dns_domain: str | None = None,
        mtu: int | None = None,
        note: str = "",
    ) -> Operation:
        """Make a network: `mode` nat, host-only, internal or bridged, which needs a `parent` like eth0 or br0; `subnet`
        like 10.77.0.0/24 or a free one; `dns_domain` inn by default; `mtu` in bytes."""
        body: dict[str, Any] = {"name": name, "mode": mode, "parent": parent, "subnet": subnet, "note": note}
        body |= {} if mtu is None else {"mtu": mtu}
        body |= {} if ipv6 else {"ipv6": "none"}
        body |= {"dns_domain": dns_domain} if dns_domain else {}
        return self.operate("POST", "/networks", document=body)

    def network_doctor(self, name: str | None = None, *, fix: bool = False) -> list[dict[str, Any]]:
        """What is wrong with the host's network for one network of it or all, the worst first: {code, level, networks,
        what, evidence, consequence, fix, fixable, fixed}. With `fix` what is safe to put right is."""
        if fix:
            found: list[dict[str, Any]] = self.call("POST", "/network-doctor", document={"network": name})
        else:
            found = self.call("GET", "/network-doctor", query={"network": name})
        return found

    def network_delete(self, name: str) -> Operation:
        """Remove a network that no VM is in."""
        return self.operate("DELETE", f"/networks/{self.part(name)}")

    # --- VMs ---

    def vms(self, *, memory_used: bool = False) -> list[dict[str, Any]]:
        """The documents of all VMs. `memory_used`: with what each takes of the host's memory, {private, shared} in
        bytes."""
        documents: list[dict[str, Any]] = self.call("GET", "/vms?memory_used=true" if memory_used else "/vms")
        return documents

    def vm(self, name: str) -> VM:
        """A handle on the VM of this name or id; nothing is asked yet."""
        return VM(self, name)

    def create(self, spec: dict[str, Any], *, start: bool = True, ready: bool = True, force: bool = False) -> Operation:
        """Begin to make a VM from a spec, and to start it. With `ready` the operation ends once the guest is up,
        without once QEMU runs; `force` overcommits memory."""
        body = {"spec": spec, "start": start, "wait": ready, "force": force}
        return self.operate("POST", "/vms", document=body)

    def launch(
        self,
        image: str | None,
        *,
        name: str,
        start: bool = True,
        force: bool = False,
        on_progress: Progress | None = None,
        **wish: Any,
    ) -> VM:
        """Make a VM, start it and wait until the guest is up; options as of `vm_spec`. Raises `ApiError`."""
        self.create(vm_spec(name, image, **wish), start=start, force=force).wait(on_progress)
        return self.vm(name)

    def warm(
        self,
        image: str,
        spec: dict[str, Any],
        *,
        name: str | None = None,
        until: str | None = None,
        refresh: bool = False,
        timeout: float | None = None,
    ) -> Operation:
        """Boot an image as `spec` says, wait until it is ready (and the shell command `until` ends well in it), and
        capture it as a warm image, which can be forked."""
        body = {"image": image, "spec": spec, "name": name, "until": until, "refresh": refresh, "timeout": timeout}
        return self.operate("POST", "/images/warm", document=body)

    def forks(
        self,
        source: str,
        names: Iterable[str],
        *,
        snapshot: str | None = None,
        network: str | None = None,
        ttl: float | None = None,
        force: bool = False,
    ) -> list[Operation]:
        """Begin to fork a warm image, or a VM that runs, once for each name; all of them go on from one moment: now,
        or that of a `snapshot` of the VM. `network`: where their first card is plugged in. `ttl` in seconds."""
        body: dict[str, Any] = {"source": source, "names": list(names), "snapshot": snapshot, "network": network}
        body |= {"ttl": ttl, "force": force}
        answer: dict[str, Any] = self.call("POST", "/forks", document=body)
        return [self.operation(id) for id in answer["operations"]]

    def fork(
        self,
        source: str,
        *,
        name: str | None = None,
        snapshot: str | None = None,
        network: str | None = None,
        ttl: float | None = None,
        force: bool = False,
    ) -> VM:
        """A running copy of a warm image, or of a VM that runs, when it is a machine of its own. In a `with` it is gone
        at the end:

        >>> with inn.fork("debian-12-warm") as vm:
        ...     vm.exec(["uname", "-n"]).stdout
        """
        chosen = name or f"fork-{os.urandom(5).hex()}"
        self.forks(source, [chosen], snapshot=snapshot, network=network, ttl=ttl, force=force)[0].wait()
        return self.vm(chosen)

    def pool(self, image: str, *, ready: int = 4) -> Pool:
        """Forks of a warm image that are made ahead."""
        return Pool(self, image, ready)

    def apply(self, documents: Iterable[dict[str, Any]], *, dry_run: bool = False) -> dict[str, Any]:
        """Bring about what manifests say: {"changes": […], "operations": [ids]}. The operations have begun, not ended:
        `operation(id).wait()`."""
        body = {"documents": list(documents), "dry_run": dry_run}
        document: dict[str, Any] = self.call("POST", "/apply", document=body)
        return document

    # --- operations ---

    def operations(self, *, state: str | None = None, target: str | None = None) -> list[Operation]:
        """Newest first."""
        query = {"state": state, "target": target}
        return [Operation(self, document) for document in self.call("GET", "/operations", query=query)]

    def operation(self, id: str) -> Operation:
        """The operation with this id."""
        return Operation(self, self.call("GET", f"/operations/{self.part(id)}"))
