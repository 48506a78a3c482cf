"""What QEMU makes of the plan: spawned for real, stopped before the first instruction, and asked over QMP."""

from __future__ import annotations

import asyncio
import os
import re
import shutil
import signal
import socket
import struct
import subprocess
import tempfile
from collections.abc import AsyncIterator, Awaitable
from contextlib import asynccontextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from golden.hostile import hostile_serials, hostile_strings
from golden.specs import CASES, NASTY, VM_ID, Case, chains

from innkeeper.base.errors import InvalidInput, QmpFailed
from innkeeper.base.home import Home, absolute
from innkeeper.host.facts import Firmware, Uefi
from innkeeper.host.firmware import firmware
from innkeeper.machine.machine import Machine
from innkeeper.machine.reaction import DISK_ERROR, NO_SPACE
from innkeeper.plan.command import Files, command
from innkeeper.plan.identity import Identity
from innkeeper.plan.options import Option, Plan
from innkeeper.qemu.monitor import Monitor
from innkeeper.qemu.process import Process, last_words, spawn
from innkeeper.spec.vm import VMSpec
from innkeeper.storage.formats.qcow2 import write_empty, write_overlay
from innkeeper.store.events import EventLog
from innkeeper.store.memory import MemoryStore

QEMU = Path("/usr/bin/qemu-system-x86_64")
pytestmark = [pytest.mark.guest, pytest.mark.skipif(not QEMU.exists(), reason=f"{QEMU} is not there")]
RUNNABLE = [case for case in CASES if case.host.get("accelerator") != "kvm"]
ROOT = os.geteuid() == 0


@pytest.fixture
def home():
    # QEMU's own user must be able to pass through, which pytest's private tmp_path does not allow.
    with tempfile.TemporaryDirectory(prefix="inn-meaning-") as folder:
        Path(folder).chmod(0o711)
        made = Home(Path(folder), Path(folder) / "run", Path(folder))
        for below in (made.images, made.vms):
            below.mkdir(mode=0o711)
        yield made


class Real:
    """A case on this machine: real files, free ports, memory that is there."""

    def __init__(self, case: Case, home: Home) -> None:
        self.case, self.home = case, home
        self.folder = home.vm(VM_ID)
        self.image_dir = str(home.images) + case.image_dir
        spec = case.vmspec().model_dump(mode="json")
        spec["memory"] = min(spec["memory"], 2 << 30)
        for nic in spec["nics"]:
            for forward in nic["publish"]:
                forward["host"] = free_port()
        if spec["iso"]:
            spec["iso"] = str(home.data) + spec["iso"]
        self.spec = VMSpec.model_validate(spec)
        identity = case.identity()
        self.identity: Identity = identity.model_copy(
            update={"ssh_port": free_port() if identity.ssh_port else None, "uid": identity.uid if ROOT else None}
        )
        self.facts = case.facts()

    def prepare(self) -> Plan:
        self.folder.mkdir(mode=0o700)
        image = self._image()
        for index, disk in enumerate(self.spec.disks):
            path = self.folder / f"disk{index}-top.qcow2"
            if index == 0 and self.case.image == "disk":
                write_overlay(path, Path("/any"), "qcow2", disk.size or 1 << 30, durable=False)
            else:
                write_empty(path, disk.size or 1 << 30, durable=False)
        if self.case.seed:
            (self.folder / "seed.iso").write_bytes(bytes(65536))
        if self.case.ignition:
            (self.folder / "ignition.json").write_text("{}")
        if self.spec.iso:
            Path(self.spec.iso).parent.mkdir(parents=True, exist_ok=True)
            Path(self.spec.iso).write_bytes(bytes(65536))
        if self.spec.firmware == "uefi":
            self._uefi()
        if self.identity.uid is not None:
            for path in (*self.folder.iterdir(), self.folder):
                os.chown(path, self.identity.uid, self.identity.uid)
        return command(
            self.spec, self.identity, self.facts, image,
            Files(
                chains(self.spec, f"{self.image_dir}/disk.qcow2" if self.case.image == "disk" else None),
                self.image_dir if image else "", "seed.iso" if self.case.seed else "", self.case.disc,
                self.case.ignition,
            ),
        )  # fmt: skip

    def _image(self):
        from golden.specs import image

        if self.case.image == "none":
            return None
        made = image(self.case.image)
        reachable(Path(self.image_dir), self.home.data)
        if made.kind == "disk":
            write_empty(Path(self.image_dir) / made.files["disk"], made.virtual_size, mode=0o644, durable=False)
        else:
            for role, content in (("kernel", linux()), ("initrd", bytes(4096))):
                path = Path(self.image_dir) / made.files[role]
                path.write_bytes(content)
                path.chmod(0o644)
        return made

    def _uefi(self) -> None:
        found = firmware().uefi
        if found is None:
            pytest.skip("no UEFI firmware for guests (apt install ovmf)")
        wanted = self.facts.firmware.uefi
        assert wanted is not None
        shutil.copyfile(found.vars, self.folder / "nvram.fd")
        if wanted.format != found.format:
            code = self.home.data / "code"
            for source, target in ((found.code, code), (found.vars, self.folder / "nvram.fd")):
                subprocess.run(["qemu-img", "convert", "-O", wanted.format, source, target], check=True)
            code.chmod(0o644)
            found = Uefi(code=str(code), vars=found.vars, format=wanted.format)
        self.facts = self.facts.model_copy(update={"firmware": Firmware(uefi=found)})


def reachable(folder: Path, top: Path) -> None:
    """Make `folder`, so that every user can pass through to it."""
    for part in reversed([folder, *folder.parents]):
        if part != top and part.is_relative_to(top) and not part.exists():
            part.mkdir(mode=0o711)


def linux() -> bytes:
    """As much of a kernel as QEMU looks at: the real-mode header (Linux: Documentation/arch/x86/boot.rst)."""
    image = bytearray(16384)
    image[0x1F1] = 4
    struct.pack_into("<H", image, 0x1FE, 0xAA55)
    image[0x202:0x206] = b"HdrS"
    struct.pack_into("<H", image, 0x206, 0x020C)
    image[0x211] = 1
    struct.pack_into("<I", image, 0x22C, 0x7FFFFFFF)
    struct.pack_into("<I", image, 0x238, 2047)
    return bytes(image)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@asynccontextmanager
async def running(plan: Plan, home: Home) -> AsyncIterator[tuple[Process, Monitor]]:
    process = spawn(plan, home, VM_ID)
    folder = home.vm(VM_ID)
    try:
        connecting = asyncio.ensure_future(Monitor.connect(folder, 60))
        await asyncio.wait({connecting, process.ended}, return_when=asyncio.FIRST_COMPLETED)
        assert not process.ended.done(), f"{process.ended.result()}: {last_words(folder)}"
        monitor = await connecting
        try:
            yield process, monitor
        finally:
            await monitor.close()
    finally:
        if not process.ended.done():
            await process.end()


# --- plan and QMP, side by side ---


def values(plan: Plan, flag: str) -> list[dict[str, Any]]:
    return [dict(o.value) for o in plan.options if o.flag == flag and isinstance(o.value, dict)]


async def compare(plan: Plan, spec: VMSpec, identity: Identity, monitor: Monitor) -> int:
    """Everything that was said, as QEMU understood it; and nothing else is there. Returns how many values agreed."""
    ask, compared = monitor.execute, 0

    def same(told: Any, planned: Any, what: str) -> None:
        nonlocal compared
        compared += 1
        assert told == planned, f"{what}: QEMU has {told!r}, the plan {planned!r}"

    async def prop(path: str, name: str) -> Any:
        return await ask("qom-get", {"path": path, "property": name})

    same((await ask("query-status"))["status"], "prelaunch", "status")
    same((await ask("query-name"))["name"], spec.name, "name")
    same((await ask("query-uuid"))["UUID"], identity.uuid, "uuid")
    same(len(await ask("query-cpus-fast")), spec.cpus, "cpus")
    same((await ask("query-memory-size-summary"))["base-memory"], spec.memory, "memory")
    same((await ask("query-kvm"))["enabled"], False, "kvm")
    same(await prop("/machine", "type"), f"{identity.machine_type}-machine", "machine")
    same(await prop("/machine", "memory-backend"), "/objects/ram", "memory backend")
    for name in ("dump-guest-core", "hpet", "usb"):
        same(await prop("/machine", name), False, name)
    same(await prop("/machine", "vmport"), "off", "vmport")
    words = {o.flag: o.value for o in plan.options if isinstance(o.value, str)}
    for flag in ("-kernel", "-initrd", "-append"):
        same(await prop("/machine", flag[1:]), words.get(flag, ""), flag)

    devices = {d["id"]: d for d in values(plan, "-device")}
    same({c["name"] for c in await children(monitor, "/machine/peripheral")}, set(devices), "devices")
    same(await children(monitor, "/machine/peripheral-anon"), [], "devices without a name")
    for name, device in devices.items():
        path = f"/machine/peripheral/{name}"
        same(await prop(path, "type"), device["driver"], name)
        if "bus" in device:
            same((await prop(path, "parent_bus")).rpartition("/")[2], device["bus"], f"{name} bus")
        if "addr" in device:
            slot, _, function = device["addr"].partition(".")
            same(await prop(path, "addr"), int(slot, 16) * 8 + int(function or 0), f"{name} addr")
        for key in device.keys() - {"driver", "id", "bus", "addr"}:
            linked = f"/objects/{device[key]}" if key in ("iothread", "rng") else device[key]
            same(await prop(path, key), linked, f"{name} {key}")

    objects = {o["id"]: o for o in values(plan, "-object")}
    same({c["name"] for c in await children(monitor, "/objects")}, set(objects), "objects")
    for name, planned in objects.items():
        same(await prop(f"/objects/{name}", "type"), planned["qom-type"], name)
        for key in planned.keys() - {"qom-type", "id"}:
            same(await prop(f"/objects/{name}", key), planned[key], f"{name} {key}")

    nodes = {n["node-name"]: n for n in await ask("query-named-block-nodes")}
    blockdevs = {b["node-name"]: b for b in values(plan, "-blockdev")}
    files = sorted(n["file"] for n in nodes.values() if n["drv"] == "file")
    same(files, sorted(b["file"]["filename"] for b in blockdevs.values()), "files")
    same({n for n in nodes if not n.startswith("#")}, set(blockdevs), "block nodes")
    same({n["drv"] for name, n in nodes.items() if name.startswith("#")}, {"file"} if blockdevs else set(), "protocols")
    for name, planned in blockdevs.items():
        same((nodes[name]["drv"], nodes[name]["ro"]), (planned["driver"], planned.get("read-only", False)), name)
        same(nodes[name]["backing_file_depth"], 1 if planned.get("backing") else 0, f"{name} chain")
    attached = {b["qdev"]: b["inserted"]["node-name"] for b in await ask("query-block") if "inserted" in b}
    drives = {d["id"]: d["drive"] for d in devices.values() if "drive" in d}
    for name, node in drives.items():
        (found,) = [n for qdev, n in attached.items() if f"/{name}/" in f"/{qdev}/"]
        same(found, node, f"{name} drive")

    ports = {c["label"]: c["filename"] for c in await ask("query-chardev")}
    same(set(ports), {"qmp", "serial", "agent"}, "chardevs")
    same(
        {name: file for name, file in ports.items() if name != "qmp"},
        {name: f"disconnected:unix:{name}.sock,server=on" for name in ("serial", "agent")}, "sockets",
    )  # fmt: skip
    table = await ask("human-monitor-command", {"command-line": "info usernet"})
    rules = sorted(
        f"{m[1].lower()}:{m[2].replace('*', '0.0.0.0')}:{m[3]}-:{m[4]}"
        for m in re.finditer(r"(TCP|UDP)\[HOST_FORWARD\]\s+\d+\s+(\S+)\s+(\d+)\s+\S+\s+(\d+)", table)
    )
    same(rules, sorted(f["str"] for n in values(plan, "-netdev") for f in n["hostfwd"]), "port forwards")
    return compared


async def children(monitor: Monitor, path: str) -> list[dict[str, str]]:
    return [c for c in await monitor.execute("qom-list", {"path": path}) if c["type"].startswith("child<")]


def compare_process(plan: Plan, process: Process, folder: Path) -> None:
    proc = Path(f"/proc/{process.pid.number}")
    words = [word.decode() for word in (proc / "cmdline").read_bytes().split(b"\0")[:-1]]
    assert words[: len(plan.argv())] == plan.argv()
    assert len(words) == len(plan.argv()) + 2 * len(plan.fdsets)
    status = dict(line.split(":\t", 1) for line in (proc / "status").read_text().splitlines())
    assert status["Seccomp"].strip() == "2", "the sandbox is on"
    if plan.uid is not None:
        assert status["Uid"].split() == status["Gid"].split() == [str(plan.uid)] * 4
        assert status["Groups"].split() == [str(group) for group in plan.groups]
    assert (proc / "cwd").resolve() == folder
    opened = {str(fd.resolve()) for fd in (proc / "fd").iterdir()}
    assert all(path in opened for path in plan.fdsets)


@pytest.mark.parametrize("case", RUNNABLE, ids=lambda case: case.name)
async def test_qemu_understands_what_was_planned(case, home):
    real = Real(case, home)
    plan = real.prepare()
    async with running(plan, home) as (process, monitor):
        assert await compare(plan, real.spec, real.identity, monitor) > 50
        compare_process(plan, process, real.folder)


# --- hostile text (acceptance 8, on the real QEMU) ---


async def full_spawns(count: int, home: Home, capsys) -> None:
    """Each with a hostile serial on 24 disks, a hostile image folder, ISO, note, user-data and variable."""
    serials = iter(hostile_serials(24 * count, seed=1))
    texts = iter(hostile_strings(20 * count, seed=2))
    tried = compared = 0
    for number in range(count):
        disks = [
            {
                "size": "1M" if index else "1G",
                "serial": next(serials),
                "bus": "virtio-scsi" if index % 4 else "virtio-blk",
            }
            for index in range(24)
        ]
        folder, iso = (f"/{next(usable(texts))}" for _ in range(2))
        base = Path(tempfile.mkdtemp(dir=home.data))
        base.chmod(0o711)
        here = Home(base, base / "run", base)
        for below in (here.images, here.vms):
            below.mkdir(mode=0o711)
        guest_texts = [next(texts).replace("\ud800", "").replace("\0", "").replace("\n", "") for _ in range(3)]
        first_boot = {"user_data": guest_texts[0], "env": {"A": guest_texts[1]}}
        spec = {"disks": disks, "iso": iso, "note": guest_texts[2], "first_boot": first_boot, "memory": "64M"}
        real = Real(Case("hostile", spec, image="disk", image_dir=folder, disc=True), here)
        plan = real.prepare()
        async with running(plan, here) as (process, monitor):
            compared += await compare(plan, real.spec, real.identity, monitor)
            if number % 10 == 0:
                compare_process(plan, process, real.folder)
        tried += 24 + 2 + 3
        shutil.rmtree(base)
    with capsys.disabled():
        print(f" [{tried} hostile strings in {count} spawned QEMUs, {compared} values compared]", end="")


def usable(texts):
    """Those that are absolute paths which this file system can hold."""
    for text in texts:
        with suppress(InvalidInput):
            path = absolute(f"/{text}")
            if path != Path("/") and all(len(os.fsencode(part)) < 200 for part in path.parts) and len(str(path)) < 700:
                yield str(path).lstrip("/")


async def test_hostile_text_on_the_command_line(home, capsys):
    await full_spawns(12, home, capsys)


@pytest.mark.slow
@pytest.mark.timeout(1200)
async def test_ten_thousand_hostile_strings_on_the_command_line(home, capsys):
    await full_spawns(10_000 // 29 + 1, home, capsys)


async def test_hostile_folders_and_serials_in_one_process(home, capsys):
    """The plan's own options, through QMP: the same parser of options behind them, hundreds of each in seconds."""
    base = Real(
        Case("base", {"disks": [{"size": "1M", "bus": "virtio-scsi"}], "nics": []}, image="kernel", seed=False), home
    )
    plan = base.prepare()
    source = home.data / "disk.qcow2"
    write_empty(source, 1 << 20, mode=0o644, durable=False)
    paths, serials = usable(iter(hostile_strings(2_000, seed=3))), hostile_serials(500, seed=4)
    tried = 0
    async with running(plan, home) as (_, monitor):
        for number, serial in enumerate(serials):
            hostile = Case("h", {"disks": [{"size": "1M", "bus": "virtio-scsi"}, {"size": "1M", "bus": "virtio-scsi"}]})
            folder = str(home.images / next(paths))
            spec = hostile.vmspec().model_dump(mode="json")
            spec["disks"][1]["serial"] = serial
            made = hostile.plan(spec=VMSpec.model_validate(spec), image_dir=folder)
            reachable(Path(folder), home.data)
            target = Path(folder) / "disk.qcow2"
            if not target.exists():
                os.link(source, target)
            node = next(b for b in values(made, "-blockdev") if b["node-name"] == "disk0-image-0")
            disk = next(d for d in values(made, "-device") if d["id"] == "virtio-disk1")
            await monitor.execute("blockdev-add", node | {"node-name": f"node{number}"})
            own = {"id": f"plugged{number}", "drive": f"node{number}", "bootindex": number + 9}
            await monitor.execute("device_add", disk | own)
            nodes = await monitor.execute("query-named-block-nodes", {"flat": True})
            assert str(target) in [n["file"] for n in nodes if n["drv"] == "file"]
            path = f"/machine/peripheral/plugged{number}"
            assert await monitor.execute("qom-get", {"path": path, "property": "serial"}) == serial
            await monitor.execute("device_del", {"id": f"plugged{number}"})
            with suppress(QmpFailed):  # a device lets go of its node a moment after it is gone
                await monitor.execute("blockdev-del", {"node-name": f"node{number - 9}"})
            tried += 2
        assert (await monitor.execute("query-status"))["status"] == "prelaunch"
    with capsys.disabled():
        print(f" [{tried} hostile strings in one QEMU]", end="")


async def test_a_path_that_json_cannot_carry_is_no_other_path(home):
    """What `absolute` refuses, QEMU would refuse too: never open something else."""
    for bad in ("\ufffe", "\ufdd0", "\U0001ffff"):
        with pytest.raises(InvalidInput):
            absolute(f"/{bad}")
        real = Real(Case("bad", {"nics": []}, seed=False), home)
        shutil.rmtree(real.folder, ignore_errors=True)
        shutil.rmtree(real.image_dir, ignore_errors=True)
        real.image_dir += bad
        process = spawn(real.prepare(), home, VM_ID)
        assert "status 1" in await asyncio.wait_for(process.ended, 30)
        assert "invalid UTF-8" in last_words(real.folder) or "JSON" in last_words(real.folder)


# --- events, as this QEMU sends them ---


async def test_the_events_that_reactions_read_are_in_this_qemus_schema(home):
    fields = {
        "STOP": set(), "RESUME": set(), "RESET": {"guest", "reason"}, "SHUTDOWN": {"guest", "reason"},
        "GUEST_PANICKED": {"action"}, "VSERPORT_CHANGE": {"id", "open"},
        "BLOCK_IO_ERROR": {"device", "node-name", "operation", "action", "nospace", "reason"},
    }  # fmt: skip
    plan = Real(Case("plain", {"nics": []}, image="kernel", seed=False), home).prepare()
    async with running(plan, home) as (_, monitor):
        schema = {entry["name"]: entry for entry in await monitor.execute("query-qmp-schema")}
    for event, wanted in fields.items():
        assert schema[event]["meta-type"] == "event"
        members = schema[schema[event]["arg-type"]].get("members", [])
        assert wanted <= {member["name"] for member in members}, event


@asynccontextmanager
async def machine_of(plan: Plan, home: Home, uuid: str, disc: bool = False) -> AsyncIterator[tuple[Machine, EventLog]]:
    store = MemoryStore()
    events = EventLog(store)
    await store.transact({f"vm/{VM_ID}": {"state": "starting", "reason": "", "since": "", "disc": disc}})
    process = spawn(plan, home, VM_ID)
    try:
        machine = Machine(VM_ID, "web-1", home, store, events, process)
        await machine.attach(uuid, disc=disc, seconds=30)
        yield machine, events
    finally:
        if not process.ended.done():
            await process.end()
        await asyncio.wait_for(machine.over, 10)


async def state(machine: Machine, wanted: str) -> None:
    await eventually(lambda: machine.status.state == wanted)


async def eventually(condition) -> None:
    for _ in range(6000):
        outcome = condition()
        if await outcome if isinstance(outcome, Awaitable) else outcome:
            return
        await asyncio.sleep(0.01)
    raise AssertionError("it never came")


@pytest.mark.parametrize(("errno", "reason"), [(28, NO_SPACE), (5, DISK_ERROR)])
async def test_a_disk_error_pauses_with_its_reason(home, errno, reason):
    """SeaBIOS reads the first disk; blkdebug makes that fail. Going on fails again, and says so again."""
    real = Real(Case("faulty", {"nics": [], "memory": "64M"}, image="none", seed=False), home)
    plan = real.prepare()
    options = []
    for option in plan.options:
        if isinstance(option.value, dict) and option.value.get("id") == "virtio-disk0":
            fault = {"event": "none", "iotype": "read", "errno": errno}
            debug = {"driver": "blkdebug", "node-name": "faulty", "image": "disk0-top", "inject-error": [fault]}
            options += [Option("-blockdev", debug), Option("-device", option.value | {"drive": "faulty"})]
        else:
            options.append(option)
    async with machine_of(replace(plan, options=tuple(options)), home, real.identity.uuid) as (machine, events):
        for _ in range(2):
            await machine.run()
            await state(machine, "running")
            await state(machine, "paused")
            assert machine.status.reason == reason
        told = [(e["kind"], e["level"]) for e in await events.list()]
        assert told == [("vm.paused", "error"), ("vm.resumed", "info"), ("vm.paused", "error")]


async def test_pause_resume_and_the_plug(home):
    real = Real(Case("plain", {"nics": [], "disks": [], "memory": "64M"}, image="kernel", seed=False), home)
    async with machine_of(real.prepare(), home, real.identity.uuid) as (machine, events):
        await machine.run()
        await state(machine, "running")
        await machine.pause()
        await state(machine, "paused")
        assert machine.status.reason == ""
        await machine.run()
        await state(machine, "running")
        await machine.quit()
        assert machine.over.done()
        told = [e["kind"] for e in await events.list()]
        assert told == ["vm.paused", "vm.resumed", "vm.stopped"]


async def test_a_signal_is_an_end_and_a_kill_is_a_crash(home):
    for number, kind in ((signal.SIGTERM, "vm.stopped"), (signal.SIGKILL, "vm.crashed")):
        real = Real(Case("plain", {"nics": [], "disks": [], "memory": "64M"}, image="kernel", seed=False), home)
        shutil.rmtree(real.folder, ignore_errors=True)
        async with machine_of(real.prepare(), home, real.identity.uuid) as (machine, events):
            await machine.run()
            await state(machine, "running")
            os.kill(machine.process.pid.number, number)
            await asyncio.wait_for(asyncio.shield(machine.over), 30)
            assert [e["kind"] for e in await events.list()] == [kind]


async def is_running(machine: Machine) -> bool:
    return bool((await machine.monitor.execute("query-status"))["running"])


async def test_a_restart_ejects_the_disc_and_goes_on(home):
    """Ctrl-Alt-Del in SeaBIOS: the guest's own reset, as an installer does it at its end."""
    spec = {"nics": [], "iso": f"/{NASTY}.iso", "memory": "64M"}
    real = Real(Case("disc", spec, image="none", seed=False, disc=True), home)
    async with machine_of(real.prepare(), home, real.identity.uuid, disc=True) as (machine, events):
        await machine.run()
        await state(machine, "running")
        async with asyncio.timeout(60):
            while not await events.list():
                await machine.monitor.execute("human-monitor-command", {"command-line": "sendkey ctrl-alt-delete"})
                await asyncio.sleep(0.3)
        await eventually(lambda: is_running(machine))
        assert [e["kind"] for e in await events.list()] == ["vm.ejected"], "a restart is no pause"
        assert machine.status.state == "running" and not machine.disc
        (drive,) = [b for b in await machine.monitor.execute("query-block") if "cd0" in b.get("qdev", "")]
        assert "inserted" not in drive
        # The next restart is the guest's own affair.
        await machine.monitor.execute("human-monitor-command", {"command-line": "sendkey ctrl-alt-delete"})
        await asyncio.sleep(1)
        assert machine.status.state == "running" and len(await events.list()) == 1
