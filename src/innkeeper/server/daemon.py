"""innkeeperd: brings one host's engine up, serves the API on a UNIX socket, and leaves the guests running when it goes.

Order at start: lock, store, host facts, adopt running guests, clear leftovers, go on with interrupted operations,
serve. Order at the end: stop serving, interrupt operations (they go on at the next start), let go of guests, close the
store.
"""

from __future__ import annotations

import asyncio
import fcntl
import gc
import grp
import os
import shutil
import signal
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import structlog
import uvicorn

from innkeeper.base.clock import now
from innkeeper.base.errors import InnkeeperError, StoreFailed
from innkeeper.base.home import Home
from innkeeper.machine.machines import Machines
from innkeeper.machine.states import LIVE
from innkeeper.operations import networks, outer_addresses
from innkeeper.operations.engine import Engine
from innkeeper.operations.expiry import expire
from innkeeper.operations.fault import Faults
from innkeeper.operations.verbs import VERBS
from innkeeper.operations.world import World
from innkeeper.qemu.capabilities import capabilities, find_qemu
from innkeeper.qemu.probe import probe
from innkeeper.server.app import create_app
from innkeeper.server.context import Context
from innkeeper.server.metadata import Metadata
from innkeeper.storage import cage
from innkeeper.store.contract import update
from innkeeper.store.events import EventLog
from innkeeper.store.sqlite import SQLiteStore

log = structlog.get_logger()

GROUP = "innkeeper"
"""Members of this group may use the system's daemon; they are as powerful as root, as with every such socket."""
GRACE = 3
"""Seconds that open answers (followed logs, consoles) get when the daemon leaves."""


def main() -> int:
    """Entry point of `innkeeperd`. Exit status 0 after SIGTERM, 1 when it could not start."""
    structlog.configure(
        processors=[
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso"),
            structlog.processors.format_exc_info,
            structlog.processors.KeyValueRenderer(key_order=["timestamp", "level", "event"]),
        ],
        logger_factory=lambda *_: _Stderr(),
    )
    home = Home.find()
    try:
        asyncio.run(serve(home))
    except InnkeeperError as error:
        print(f"innkeeperd: {error.detail}", file=sys.stderr)
        if error.hint:
            print(f"  → {error.hint}", file=sys.stderr)
        return 1
    return 0


class _Stderr(structlog.PrintLogger):
    """A log that cannot be written, on a full disk say, must not break off what was being logged."""

    def __init__(self) -> None:
        super().__init__(sys.stderr)

    def msg(self, message: str) -> None:
        with suppress(OSError, ValueError):
            super().msg(message)

    log = debug = info = warn = warning = msg
    fatal = failure = err = error = critical = exception = msg


async def serve(home: Home) -> None:
    """Run until SIGTERM or SIGINT."""
    lock = _prepare(home)
    store = SQLiteStore(home.store)
    try:
        context = await _bring_up(home, store)
        gc.freeze()  # what was imported is never garbage, and a collection that goes through it takes 80 ms
        listener = _listen(home)
        server = _server(context)
        stop = asyncio.ensure_future(_signalled())
        serving = asyncio.ensure_future(server.serve([listener]))
        expiring = asyncio.ensure_future(expire(context.world, context.engine))
        healing = asyncio.ensure_future(networks.keep(context.world))
        learning = asyncio.ensure_future(outer_addresses.learn(context.world))
        _tell_systemd("READY=1")
        log.info("ready", socket=str(home.socket), accelerator=context.world.verdict.name)
        await asyncio.wait({stop, serving}, return_when=asyncio.FIRST_COMPLETED)
        _tell_systemd("STOPPING=1")
        server.should_exit = True
        await serving
        expiring.cancel()
        healing.cancel()
        learning.cancel()
        await context.engine.stop()
        await context.world.machines.release()
        context.world.fabric.release()
        with suppress(OSError):
            home.socket.unlink()
        log.info("left; guests go on")
    finally:
        await store.close()
        os.close(lock)


def _prepare(home: Home) -> int:
    """The folders and the lock: one daemon per data folder."""
    os.umask(0o077)
    shared = 0o711 if os.geteuid() == 0 else 0o700
    for folder in (home.data, home.pool, home.images, home.vms, home.work):
        folder.mkdir(mode=0o711, parents=True, exist_ok=True)
        if folder.stat().st_uid == os.geteuid():
            folder.chmod(0o700 if folder == home.work else shared)
    home.run.mkdir(mode=0o755, parents=True, exist_ok=True)
    home.run.chmod(0o755)
    lock = os.open(home.lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(lock)
        raise StoreFailed(f"another innkeeperd already serves {home.data}", hint="inn daemon status") from None
    return lock


async def _bring_up(home: Home, store: SQLiteStore) -> Context:
    qemu = await capabilities(find_qemu(), home)
    verdict = await probe(qemu, home)
    events = EventLog(store)
    machines = Machines(home, store, events)
    world = World(home, store, events, machines, verdict, qemu)
    engine = Engine(world, VERBS, Faults.from_environment())
    await machines.adopt()
    world.fabric.metadata = Metadata(world).answer
    try:
        await networks.begin(world)
    except InnkeeperError as error:
        log.error("the networks are not as they should be; trying again", error=str(error))
    await _sweep(world)
    await engine.recover()
    await _settle(world, engine)
    machines.begin_care()
    return Context(world, engine)


async def _sweep(world: World) -> None:
    """Clear what killed operations left: tools that still run, folders that no document speaks of."""
    open_operations = {d.value["id"] for d in await world.store.list("operation/") if not d.value["ended"]}
    for pid in cage.sweep(open_operations):
        log.warning("ended a tool of an interrupted operation", pid=pid)
    known: dict[Path, set[str]] = {
        world.home.work: open_operations,
        world.home.vms: {d.value["id"] for d in await world.store.list("vm/")},
        world.home.images: {d.value["id"] for d in await world.store.list("image/")}
        | {str(d.value["data"].get("image")) for d in await world.store.list("operation/") if not d.value["ended"]},
    }
    for folder, names in known.items():
        for entry in folder.iterdir():
            if entry.name not in names and entry.is_dir():
                log.warning("removing a folder that nothing speaks of", folder=str(entry))
                await asyncio.to_thread(shutil.rmtree, entry, ignore_errors=True)


async def _settle(world: World, engine: Engine) -> None:
    """VMs and networks between two states that no operation goes on with, since an undo or a deletion failed for good
    before."""
    for document in await world.store.list("network/"):
        network = document.value
        if network["state"] in ("creating", "deleting") and not network["operation"]:
            target = {"kind": "network", "id": network["id"], "name": network["name"]}
            await engine.submit("network-delete", target, {}, hold=document.key)
    for vm in await world.vms():
        machine, state = world.machines.get(vm["id"]), vm["state"]
        if vm["operation"]:
            continue
        if state in ("creating", "deleting"):
            target = {"kind": "vm", "id": vm["id"], "name": vm["name"]}
            await engine.submit("vm-delete", target, {}, hold=f"vm/{vm['id']}")
        elif state == "starting" or (state in LIVE and machine is None):
            await world.machines.discard(vm["id"])
            stopped = {"state": "stopped", "reason": "its last operation came to nothing", "since": now()}
            await update(world.store, f"vm/{vm['id']}", lambda vm, stopped=stopped: vm | stopped)  # type: ignore[misc]


def _listen(home: Home) -> socket.socket:
    """Bound by ourselves: uvicorn would open the socket to everybody (mode 0666)."""
    home.socket.unlink(missing_ok=True)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    folder = os.open(home.run, os.O_PATH | os.O_DIRECTORY)
    try:
        listener.bind(f"/proc/self/fd/{folder}/{home.socket.name}")
    finally:
        os.close(folder)
    home.socket.chmod(0o660)
    if os.geteuid() == 0:
        with suppress(KeyError):
            os.chown(home.socket, 0, grp.getgrnam(GROUP).gr_gid)
    return listener


def _server(context: Context) -> uvicorn.Server:
    config = uvicorn.Config(
        create_app(context),
        log_config=None,
        access_log=False,
        lifespan="off",
        timeout_graceful_shutdown=GRACE,
        ws="websockets-sansio",
        http="h11",
        server_header=False,
    )
    return _Server(config)


class _Server(uvicorn.Server):
    """Signals are the daemon's to handle."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


async def _signalled() -> None:
    loop, asked = asyncio.get_running_loop(), asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, asked.set)
    await asked.wait()


def _tell_systemd(state: str) -> None:
    """sd_notify(3)."""
    address = os.environ.get("NOTIFY_SOCKET")
    if not address:
        return
    with suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notify:
        notify.sendto(state.encode(), "\0" + address[1:] if address.startswith("@") else address)


if __name__ == "__main__":
    sys.exit(main())
