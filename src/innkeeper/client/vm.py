"""One VM, by name."""

from __future__ import annotations

import base64
import io
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any, BinaryIO, NamedTuple

from innkeeper.client.errors import ApiError, DaemonUnreachable
from innkeeper.client.firewall import Firewall
from innkeeper.client.operation import Operation, Progress
from innkeeper.client.snapshots import Snapshots
from innkeeper.client.wishes import parse_publish

if TYPE_CHECKING:
    from innkeeper.client.api import Innkeeper

STDIN_INLINE = 1024 * 1024
"""Bytes of stdin that travel inside the exec request; more goes to a temporary file in the guest first."""


EVERYWHERE = "::"
"""All IPv4 addresses of the host: where a port is published unless told otherwise."""


class Result(NamedTuple):
    """What a command in the guest printed, and its exit status (128 + n when signal n ended it)."""

    stdout: bytes
    stderr: bytes
    status: int


class VM:
    """A handle: nothing is asked until a property or method is used, and then the answer is fresh."""

    def __init__(self, innkeeper: Innkeeper, name: str) -> None:
        self._innkeeper = innkeeper
        self.name = name

    def __repr__(self) -> str:
        return f"<VM {self.name}>"

    def _path(self, rest: str = "") -> str:
        return f"/vms/{self._innkeeper.part(self.name)}{rest}"

    @property
    def info(self) -> dict[str, Any]:
        """The VM's document as it is now."""
        document: dict[str, Any] = self._innkeeper.call("GET", self._path())
        return document

    @property
    def state(self) -> str:
        """`creating`, `stopped`, `starting`, `running`, `paused`, `stopping`, `crashed` or `deleting`."""
        return str(self.info["state"])

    # --- lifecycle; each waits for its end unless `wait=False`, and raises ApiError when it fails ---

    def act(self, action: str, *, force: bool = False, timeout: float | None = None) -> Operation:
        """Begin `start`, `stop`, `restart`, `pause` or `resume`, or `delete`. `timeout`: seconds the guest gets."""
        if action == "delete":
            return self._innkeeper.operate("DELETE", self._path(), query={"force": force})
        body = {"force": force, "timeout": timeout}
        return self._innkeeper.operate("POST", self._path(f"/actions/{action}"), document=body)

    def __enter__(self) -> VM:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """A VM in a `with` is gone at its end, whatever happened."""
        self.delete(force=True)

    def start(self, *, wait: bool = True, on_progress: Progress | None = None) -> Operation:
        """Boot it; ends when the guest is ready."""
        return _ended(self.act("start"), wait, on_progress)

    def stop(
        self,
        *,
        force: bool = False,
        timeout: float | None = None,
        wait: bool = True,
        on_progress: Progress | None = None,
    ) -> Operation:
        """Ask the guest to shut down, and give it `timeout` seconds; `force` cuts the power at once."""
        return _ended(self.act("stop", force=force, timeout=timeout), wait, on_progress)

    def restart(self, *, force: bool = False, wait: bool = True, on_progress: Progress | None = None) -> Operation:
        """Stop and start."""
        return _ended(self.act("restart", force=force), wait, on_progress)

    def pause(self, *, wait: bool = True) -> Operation:
        """Stop its vCPUs; memory stays."""
        return _ended(self.act("pause"), wait)

    def resume(self, *, wait: bool = True) -> Operation:
        """Let its vCPUs run again."""
        return _ended(self.act("resume"), wait)

    def delete(self, *, force: bool = False, wait: bool = True, on_progress: Progress | None = None) -> Operation:
        """Remove it with its disks; `force` even while it runs."""
        return _ended(self.act("delete", force=force), wait, on_progress)

    def clone(
        self, name: str, *, linked: bool = False, keep_identity: bool = False, quiesce: bool = False
    ) -> Operation:
        """Begin to make a VM of its own with this one's disks, which may run: copies, or with `linked` layers on top of
        them. `quiesce` has the guest freeze its file systems for the moment."""
        body = {"name": name, "linked": linked, "keep_identity": keep_identity, "quiesce": quiesce}
        return self._innkeeper.operate("POST", self._path("/clone"), document=body)

    # --- its network cards, and the ports that lead to them ---

    @property
    def nics(self) -> list[dict[str, Any]]:
        """Its cards, each with its number, MAC and addresses."""
        documents: list[dict[str, Any]] = self._innkeeper.call("GET", self._path("/nics"))
        return documents

    def publish(
        self, mapping: str, *, address: str = EVERYWHERE, nic: int | None = None, note: str = "", by: str = ""
    ) -> Operation:
        """Have a host port lead into the guest, `8080:80` or `5353:53/udp`, at once if it runs. `address` is the
        host's that listens: all of IPv4 and IPv6 by default. Raises `InvalidInput`."""
        forward = {"address": address, "note": note} | parse_publish(mapping)
        return self._rewire({"do": "publish", "forward": forward, "nic": nic}, by)

    def unpublish(self, port: int, protocol: str = "tcp") -> Operation:
        """Have a host port lead nowhere again; what came through it into a network ends."""
        return self._rewire({"do": "unpublish", "host": port, "protocol": protocol})

    def nic_add(
        self,
        *,
        network: str | None = None,
        mode: str = "user",
        model: str = "virtio",
        mac: str | None = None,
        address: str | None = None,
        limit: str | int | None = None,
        macvtap: str | None = None,
        macvtap_mode: str | None = None,
        sriov: str | None = None,
        vlan: int | None = None,
    ) -> Operation:
        """Plug in one more card, at once if it runs: into a network, onto an interface of the host (`macvtap`), as a
        virtual function of one (`sriov`), or with a NAT of its own: QEMU's (`mode` user) or that of passt. `address`:
        in the network, IPv4; `limit`: in a network, `100mbit` or bits per second."""
        backend = "passt" if mode == "passt" else "qemu"
        mode = "user" if mode == "passt" else mode
        mode = "network" if network else "macvtap" if macvtap else "sriov" if sriov else mode
        nic: dict[str, Any] = {"mode": mode, "network": network, "model": model, "mac": mac, "address": address}
        nic["limit"] = limit
        nic |= {"parent": macvtap or sriov, "macvtap_mode": macvtap_mode, "vlan": vlan, "backend": backend}
        return self._rewire({"do": "add", "nic": nic})

    def nic_set(
        self,
        index: int,
        *,
        network: str | None = None,
        address: str | None = None,
        limit: str | int | None = None,
        link: str | None = None,
        model: str | None = None,
        mac: str | None = None,
    ) -> Operation:
        """Change a card, at once if it runs: its network (where it gets another address), its limit (`100mbit`, `none`
        for no more), its link (`up`, `down`). Another model or MAC is for a stopped VM."""
        wish = {"network": network, "address": address, "limit": limit, "link": link, "model": model, "mac": mac}
        return self._rewire({"do": "set", "index": index, **wish})

    def nic_remove(self, index: int) -> Operation:
        """Take a card away, once the guest has let go of it."""
        return self._rewire({"do": "remove", "index": index})

    def _rewire(self, change: dict[str, Any], by: str = "") -> Operation:
        return self._innkeeper.operate("POST", self._path("/nics"), document={"change": change, "by": by})

    @property
    def firewall(self) -> Firewall:
        """What its cards in networks let in and out, and its tags."""
        return Firewall(self._innkeeper, self.name)

    @property
    def snapshots(self) -> Snapshots:
        """Its snapshots."""
        return Snapshots(self._innkeeper, self.name)

    def network_check(self, host: str, port: int, *, protocol: str = "tcp") -> dict[str, Any]:
        """Have the guest connect to a target, and follow it: {vm, reached, hops: [{name, passed, text, evidence}]}.
        The last hop is where the way ends. Takes seconds where nobody answers."""
        body = {"host": host, "port": port, "protocol": protocol}
        found: dict[str, Any] = self._innkeeper.call("POST", self._path("/network-check"), document=body, timeout=60)
        return found

    # --- inside the guest, through its agent ---

    def exec_stream(
        self,
        argv: Sequence[str],
        *,
        stdin: bytes | BinaryIO | None = None,
        env: Mapping[str, str] | None = None,
        cwd: str | None = None,
        timeout: float | None = None,
    ) -> Iterator[tuple[str, Any]]:
        """Run a command; yields ("stdout", bytes) and ("stderr", bytes) as they come, then one ("exit", status) or
        ("signal", number). Raises `ApiError` when the agent cannot run it."""
        body: dict[str, Any] = {
            "argv": list(argv),
            "env": dict(env or {}),
            "cwd": cwd,
            "stdin": None,
            "stdin_path": None,
            "timeout": timeout,
        }
        source = io.BytesIO(stdin) if isinstance(stdin, bytes) else stdin
        first = source.read(STDIN_INLINE + 1) if source else b""
        if source and len(first) > STDIN_INLINE:
            body["stdin_path"] = f"/tmp/.innkeeper-stdin-{os.urandom(8).hex()}"
            self._put(body["stdin_path"], _blocks(first, source), None, 0o600)
        elif source:
            body["stdin"] = base64.b64encode(first).decode()
        try:
            yield from self._run(body)
        finally:
            if body["stdin_path"]:
                for _ in self._run({"argv": ["rm", "-f", body["stdin_path"]]}):
                    pass

    def _run(self, body: dict[str, Any]) -> Iterator[tuple[str, Any]]:
        with self._innkeeper.request("POST", self._path("/exec"), document=body, timeout=None) as response:
            for line in filter(None, response.lines()):
                for kind, value in json.loads(line).items():
                    if kind == "error":
                        raise ApiError(value)
                    if kind in ("exit", "signal"):
                        yield kind, int(value)
                        return
                    yield kind, base64.b64decode(value)
        raise DaemonUnreachable(
            "the connection ended before the command did", hint="see `inn daemon status`; the command may go on"
        )

    def exec(
        self,
        argv: Sequence[str],
        *,
        stdin: bytes | BinaryIO | None = None,
        env: Mapping[str, str] | None = None,
        cwd: str | None = None,
        timeout: float | None = None,
    ) -> Result:
        """Run a command and return all it printed. `timeout` is in seconds, after which it is killed."""
        output: dict[str, list[bytes]] = {"stdout": [], "stderr": []}
        status = 0
        for kind, value in self.exec_stream(argv, stdin=stdin, env=env, cwd=cwd, timeout=timeout):
            if kind in output:
                output[kind].append(value)
            else:
                status = value + (128 if kind == "signal" else 0)
        return Result(b"".join(output["stdout"]), b"".join(output["stderr"]), status)

    def read_file(self, path: str) -> bytes:
        """The bytes of a file in the guest."""
        return b"".join(self.read_stream(path))

    def read_stream(self, path: str) -> Iterator[bytes]:
        """The same in blocks, for a file that is larger than one wants in memory."""
        response = self._innkeeper.request("GET", self._path("/files"), query={"path": path}, timeout=None)
        return response.blocks()

    def write_file(
        self, path: str, data: bytes | Iterable[bytes], *, mode: int = 0o644, length: int | None = None
    ) -> None:
        """Write a file in the guest, whole or not at all; `data` as bytes or in blocks, `length` their sum if known."""
        self._put(path, data, length, mode)

    def _put(self, path: str, data: bytes | Iterable[bytes], length: int | None, mode: int) -> None:
        query = {"path": path, "mode": f"{mode:04o}"}
        self._innkeeper.call("PUT", self._path("/files"), query=query, body=data, length=length, timeout=None)

    # --- what it shows ---

    def screenshot(self) -> bytes:
        """A PNG of its screen."""
        return self._innkeeper.request("GET", self._path("/screenshot")).read()

    def logs(self, *, follow: bool = False, tail: int | None = None) -> Iterator[bytes]:
        """What its serial console printed, in blocks; all of it, or the last `tail` lines. `follow` goes on as more
        comes, until the VM is deleted."""
        query = {"follow": follow, "tail": tail}
        timeout = None if follow else 90.0
        return self._innkeeper.request("GET", self._path("/logs"), query=query, timeout=timeout).blocks()

    def console(self) -> Any:
        """The serial console as an open `websockets.sync.client.ClientConnection`; binary messages both ways."""
        from websockets.sync.client import unix_connect

        link = self._innkeeper.connect()
        link.settimeout(None)
        uri = f"ws://innkeeper/v1{self._path('/console')}"
        return unix_connect(sock=link, uri=uri, compression=None, max_size=None)

    def ssh(self) -> dict[str, Any]:
        """How to reach its SSH server: address, port, user, host_key, alias. Raises `ApiError` if it has none."""
        document: dict[str, Any] = self._innkeeper.call("GET", self._path("/ssh"))
        return document

    @property
    def has_ssh(self) -> bool:
        """Whether `ssh` would answer: the image has an SSH server that Innkeeper knows of, and a port leads to it."""
        try:
            return bool(self.ssh())
        except ApiError as error:
            if error.code == "unsupported":
                return False
            raise

    def export(self) -> dict[str, Any]:
        """Its manifest, as `Innkeeper.apply` takes it; without secrets."""
        document: dict[str, Any] = self._innkeeper.call("GET", self._path("/export"))
        return document


def _ended(operation: Operation, wait: bool, on_progress: Progress | None = None) -> Operation:
    return operation.wait(on_progress) if wait else operation


def _blocks(first: bytes, source: BinaryIO) -> Iterator[bytes]:
    yield first
    while block := source.read(256 * 1024):
        yield block
