"""What a QEMU binary can do: asked over QMP of a QEMU without a machine, never guessed from its version.

`FEATURES` is the table: a feature's name, and what must be there for it. To need something new, add a line.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import shutil
import socket
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import structlog
from pydantic import ValidationError
from qemu.qmp import QMPClient, QMPError

from innkeeper.base.errors import QemuFailed, Unsupported
from innkeeper.base.home import Home
from innkeeper.host.facts import QemuFacts
from innkeeper.host.users import errand_uid
from innkeeper.qemu.errand import errand

log = structlog.get_logger()

DEADLINE = 10.0
"""Seconds; QEMU needs 0.3."""

FEATURES: Mapping[str, str] = {
    # `name`: the QMP command or event; `command.argument`; `command.argument=value` of an enum or a union's branch;
    # `object:type`, `device:driver`, `device:driver.property`, `option:name` or `option:name.parameter`
    "background-snapshot": "migrate-set-capabilities.capabilities.capability=background-snapshot",
    "blockdev-io_uring": "blockdev-add.driver=file.aio=io_uring",
    "blockdev-reopen": "blockdev-reopen",
    "blockdev-snapshot-load": "snapshot-load",
    "calc-dirty-rate": "calc-dirty-rate",
    "cpr-transfer": "migrate-set-parameters.mode=cpr-transfer",
    "dirty-limit": "set-vcpu-dirty-limit",
    "display-reload": "display-reload",
    "iothread-vq-mapping": "device:virtio-blk-pci.iothread-vq-mapping",
    "mapped-ram": "migrate-set-capabilities.capabilities.capability=mapped-ram",
    "memfd": "object:memory-backend-memfd",
    "memory-failure-event": "MEMORY_FAILURE",
    "multifd": "migrate-set-capabilities.capabilities.capability=multifd",
    "nbd-export": "block-export-add.type=nbd",
    "netdev-dgram": "netdev_add.type=dgram",
    "netdev-passt": "netdev_add.type=passt",
    "netdev-stream": "netdev_add.type=stream",
    "netdev-user": "netdev_add.type=user",
    "netdev-vhost-vdpa": "netdev_add.type=vhost-vdpa",
    "postcopy": "migrate-set-capabilities.capabilities.capability=postcopy-ram",
    "postcopy-preempt": "migrate-set-capabilities.capabilities.capability=postcopy-preempt",
    "query-stats": "query-stats",
    "run-with-user": "option:run-with.user",
    "sandbox": "option:sandbox",
    "screendump-png": "screendump.format=png",
    "spice": "query-spice",
    "switchover-ack": "migrate-set-capabilities.capabilities.capability=switchover-ack",
    "tls": "object:tls-creds-x509",
    "validate-uuid": "migrate-set-capabilities.capabilities.capability=validate-uuid",
    "vhost-user-blk-export": "block-export-add.type=vhost-user-blk",
    "virtio-balloon-reporting": "device:virtio-balloon-pci.free-page-reporting",
    "virtio-mem": "device:virtio-mem-pci",
    "vmgenid": "device:vmgenid",
    "vnc": "query-vnc",
    "vsock": "device:vhost-vsock-pci",
    "x-ignore-shared": "migrate-set-capabilities.capabilities.capability=x-ignore-shared",
    "zero-copy-send": "migrate-set-capabilities.capabilities.capability=zero-copy-send",
}

TCG_CPUS = ("Westmere-v1", "Nehalem-v1", "Penryn-v1", "qemu64-v1")
"""Best first, from x86-64-v2 with AES down. Not Haswell (x86-64-v3): TCG of 7.2 lacks its PCID, INVPCID and x2APIC,
and if a later QEMU has them, the same name would give another CPU."""


def find_qemu() -> Path | None:
    """The QEMU of this host, or None."""
    found = shutil.which("qemu-system-x86_64") or shutil.which("/usr/libexec/qemu-kvm")
    return Path(found) if found else None


async def capabilities(binary: Path | None, home: Home) -> QemuFacts | None:
    """Facts about `binary`, None for None; kept in the data folder as long as the file stays the same.

    Raises `QemuFailed` where it does not run or answer, `Unsupported` where it has no q35 machine.
    """
    if binary is None:
        return None
    info = binary.stat()
    # the table is part of the key, or a new feature would look absent until QEMU is upgraded
    key = [str(binary), info.st_mtime_ns, info.st_size, dict(FEATURES), list(TCG_CPUS)]
    cache = home.data / "qemu.json"
    with suppress(OSError, ValueError, KeyError, TypeError, ValidationError):
        kept = json.loads(cache.read_bytes())
        if kept["key"] == key:
            return QemuFacts.model_validate(kept["facts"])
    facts = await _ask(binary)
    keep(cache, {"key": key, "facts": facts.model_dump(mode="json")})
    return facts


def keep(path: Path, document: object) -> None:
    """Write a cache file atomically. What cannot be kept is asked again next time: never an error (DESIGN 5.7)."""
    staged = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(mode=0o711 if os.geteuid() == 0 else 0o700, parents=True, exist_ok=True)
        staged.write_text(json.dumps(document))
        staged.replace(path)
    except OSError as error:
        staged.unlink(missing_ok=True)
        log.warning("cache not written", path=str(path), reason=str(error))


async def _ask(binary: Path) -> QemuFacts:
    ours, theirs = socket.socketpair()
    uid = errand_uid()
    arguments = [
        str(binary),
        *("-nodefaults", "-no-user-config", "-display", "none", "-machine", "none", "-accel", "tcg"),
        *("-chardev", f"socket,id=qmp,fd={theirs.fileno()}", "-mon", "chardev=qmp,mode=control"),
    ]
    client = QMPClient("capabilities")
    try:
        async with (
            asyncio.timeout(DEADLINE),
            errand(arguments, pass_fds=[theirs.fileno()], account=(uid, ()) if uid else None) as process,
        ):
            theirs.close()
            try:
                await client.connect(ours)
                return await _facts(binary, client)
            except (QMPError, EOFError) as error:
                with suppress(ProcessLookupError):
                    process.kill()
                assert process.stderr
                said = (await process.stderr.read()).decode(errors="replace").strip()
                raise QemuFailed(f"{binary} does not answer: {said or error}") from error
            finally:
                with suppress(QMPError, EOFError, OSError):
                    await client.disconnect()
    except TimeoutError as error:
        raise QemuFailed(f"{binary} did not answer within {DEADLINE:.0f} s") from error
    except OSError as error:
        raise QemuFailed(f"{binary} cannot be started: {error}", hint="reinstall QEMU") from error
    finally:
        ours.close()
        theirs.close()


async def _facts(binary: Path, client: QMPClient) -> QemuFacts:
    version = await _execute(client, "query-version")
    machines = _versioned_q35(await _execute(client, "query-machines"))
    if not machines:
        raise Unsupported(f"{binary} has no q35 machine", hint="install qemu-system-x86")
    cpus = {each["name"]: each for each in await _execute(client, "query-cpu-definitions")}
    schema = Schema(await _execute(client, "query-qmp-schema"))
    options = set()
    for each in await _execute(client, "query-command-line-options"):
        options.add(each["option"])
        options.update(f"{each['option']}.{parameter['name']}" for parameter in each["parameters"])
    objects = await _types(client, "user-creatable")
    devices = await _types(client, "device")
    features = set()
    for name, need in FEATURES.items():
        kind, _, rest = need.rpartition(":")
        if kind == "option":
            there = rest in options
        elif kind == "object":
            there = rest in objects
        elif kind == "device":
            driver, _, wanted = rest.partition(".")
            there = driver in devices and (not wanted or wanted in await _properties(client, driver))
        else:
            there = schema.has(need)
        if there:
            features.add(name)
    number = version["qemu"]
    return QemuFacts(
        path=str(binary),
        version=f"{number['major']}.{number['minor']}.{number['micro']}",
        package=version["package"],
        machine=machines[0],
        machines=tuple(machines),
        tcg_cpu=next(
            (name for name in TCG_CPUS if name in cpus and not cpus[name].get("unavailable-features")), "qemu64"
        ),
        features=frozenset(features),
        devices=frozenset(devices),
    )


async def _execute(client: QMPClient, command: str, arguments: dict[str, object] | None = None) -> Any:
    return await client.execute(command, arguments)


async def _types(client: QMPClient, implements: str) -> set[str]:
    found = await _execute(client, "qom-list-types", {"implements": implements, "abstract": False})
    return {each["name"] for each in found}


async def _properties(client: QMPClient, driver: str) -> set[str]:
    return {each["name"] for each in await _execute(client, "device-list-properties", {"typename": driver})}


def _versioned_q35(machines: list[dict[str, Any]]) -> list[str]:
    """Newest first. Numbers here are ordered, not compared with anything: 7.2, 7.1, … 4.0.1, 4.0."""
    names = [each["name"] for each in machines if re.fullmatch(r"pc-q35-[\d.]+", each["name"])]
    names += [each["name"] for each in machines if re.fullmatch(r"pc-q35-rhel[\d.]+", each["name"])]
    return sorted(names, key=lambda name: [int(part) for part in re.findall(r"\d+", name)[1:]], reverse=True)


class Schema:
    """The answer to `query-qmp-schema`, to be asked whether something is in it (QEMU's qapi-code-gen text,
    "Client JSON Protocol introspection"). Type names in it mean nothing; structure does."""

    def __init__(self, entities: list[dict[str, Any]]) -> None:
        self._by_name = {each["name"]: each for each in entities}

    def has(self, path: str) -> bool:
        """Whether `command`, `command.member` or `command.member=value` exists; members nest: `a.b=c.d`."""
        steps = path.split(".")
        root = self._by_name.get(steps[0])
        if root is None or root["meta-type"] not in ("command", "event"):
            return False
        kinds = [root["arg-type"]]
        for step in steps[1:]:
            member, _, value = step.partition("=")
            # the members of an array's elements are meant where the type is an array of them
            objects = [each for kind in kinds for each in self._spread(kind)]
            found = [kind for each in objects for kind in self._member(each, member, value)]
            if not found:
                return False
            kinds = found
        return True

    def _spread(self, kind: str) -> Iterator[dict[str, Any]]:
        entity = self._by_name[kind]
        if entity["meta-type"] == "array":
            yield from self._spread(entity["element-type"])
        elif entity["meta-type"] == "alternate":
            for each in entity["members"]:
                yield from self._spread(each["type"])
        else:
            yield entity

    def _member(self, entity: dict[str, Any], name: str, value: str) -> Iterator[str]:
        """The types to go on with: the member's own, or with a union's tag, the branch of that value."""
        for member in entity.get("members", []) if entity["meta-type"] == "object" else []:
            if member["name"] != name:
                continue
            if not value:
                yield member["type"]
                continue
            for enum in self._spread(member["type"]):
                if enum["meta-type"] == "enum" and value in enum["values"]:
                    branches = [v["type"] for v in entity.get("variants", []) if v["case"] == value]
                    is_tag = entity.get("tag") == name and branches
                    yield branches[0] if is_tag else member["type"]
