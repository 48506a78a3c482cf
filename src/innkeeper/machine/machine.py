"""The owner of one live QEMU: one task that turns its events into the VM's state."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import structlog

from innkeeper.base.clock import now
from innkeeper.base.errors import (
    AgentUnavailable,
    NetworkFailed,
    NotFound,
    QemuFailed,
    QemuGone,
    QmpFailed,
    StoreFailed,
)
from innkeeper.base.home import Home
from innkeeper.base.nofollow import open_file
from innkeeper.base.units import MIB
from innkeeper.machine.reaction import HELD, NO_SPACE, Reaction, Status, react
from innkeeper.network import macvtap, sriov
from innkeeper.qemu import cgroup, guest_memory, migration, waiter
from innkeeper.qemu.agent import Agent
from innkeeper.qemu.monitor import Monitor
from innkeeper.qemu.process import LOG, Process, last_words
from innkeeper.qemu.waiter import Waiter
from innkeeper.store.contract import Store, Value, update
from innkeeper.store.events import EventLog

log = structlog.get_logger()

SOCKETS = ("qmp.sock", "agent.sock", "serial.sock", waiter.NAME)
POWERED_OFF = b"qemu_system_shutdown_request"
"""Trace event of QEMU when a guest powers off (softmmu/trace-events); a restart has another."""
STATS_EVERY = 10
"""Seconds between two balloon statistics that the guest sends."""


QUESTIONS = ("query-uuid", "query-status", "query-chardev")
"""What a QEMU is asked first."""
MOST_SCREEN = 64 * MIB
"""Bytes of a picture of the screen, at most."""
RECONNECT = 5.0
"""Seconds that a QEMU that does not answer gets to do so, and between two attempts."""
SEEN = 5.0
"""Seconds in which the event that belongs to an answer arrives."""
CONNECTION_LOST = 1.0
"""Seconds after the end of the QMP connection that QEMU has for its own end."""


async def clean(home: Home, vm_id: str) -> None:
    """Remove what a QEMU leaves behind on the host."""
    for name in SOCKETS:
        (home.vm(vm_id) / name).unlink(missing_ok=True)
    try:
        await macvtap.leave_only(vm_id, (), home.networks)
        await sriov.leave_only(vm_id, (), home.networks)
    except NetworkFailed as error:  # the next daemon does
        log.error("what its cards were on cannot be put back", vm=vm_id, error=str(error))
    await cgroup.remove(home, vm_id)


class Machine:
    """Owns the QEMU of one VM from its spawn or adoption to its end. Only this task writes the VM's live state."""

    def __init__(self, vm_id: str, name: str, home: Home, store: Store, events: EventLog, process: Process) -> None:
        self.id, self.name = vm_id, name
        self.process = process
        self.status = Status()
        self.disc = False
        self.held = False
        """Nobody but who holds it lets the guest run."""
        self._home, self._store, self._events = home, store, events
        self._monitor: Monitor | None = None
        self._agent: Agent | None = None
        self._agent_lock = asyncio.Lock()
        self.waiter: Waiter | None = None
        """The connection to the process that waits in a captured guest, until that has been told who it is."""
        self._changed = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self._quiet = False
        self._uuid = ""
        self.stood_still = 0.0
        """Seconds between the last STOP and RESUME, by QEMU's clock."""
        self.stopped_at = 0.0
        """When that STOP was (Unix time)."""
        self.recorded = asyncio.Event()
        """The state that QEMU was found in is in the store."""
        self.over: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    @property
    def folder(self) -> Path:
        return self._home.vm(self.id)

    @property
    def monitor(self) -> Monitor:
        """The QMP connection; `QemuGone` when there is none."""
        if self._monitor is None:
            raise QemuGone(f"the QEMU of {self.name} has ended or does not answer")
        return self._monitor

    # --- beginning ---

    async def attach(self, uuid: str, *, disc: bool, seconds: float = 10.0) -> None:
        """Connect to the QEMU, make sure that it is this VM's, read its state and begin to own it.

        Raises `QmpFailed`; a QEMU that ends in between makes that known at once.
        """
        self._uuid, self.disc = uuid, disc
        await self._connect(seconds)
        self._task = asyncio.create_task(self._own(), name=f"machine {self.name}")

    def own_without_monitor(self, uuid: str, state: str, *, disc: bool) -> None:
        """Own a QEMU that does not answer: its end will be seen, it can be killed, and it may yet answer. `state` is
        the one it was known to be in."""
        self._uuid, self.disc = uuid, disc
        if state in ("running", "paused", "stopping"):
            self.status = Status(state=state)  # type: ignore[arg-type]
        self._task = asyncio.create_task(self._own(), name=f"machine {self.name}")

    async def _connect(self, seconds: float) -> None:
        connecting = asyncio.ensure_future(Monitor.connect(self.folder, seconds))
        waiting: set[asyncio.Future[Any]] = {connecting, self.process.ended}
        try:
            await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
        finally:
            if not connecting.done():
                connecting.cancel()
        if not connecting.done():
            raise QmpFailed(f"{self.process.ended.result()} before it answered")
        monitor = connecting.result()
        try:
            told, *state = await asyncio.gather(*(monitor.execute(each, seconds=seconds) for each in QUESTIONS))
            if told["UUID"] != self._uuid:
                raise QmpFailed(f"the QEMU in {self.folder} is another machine's ({told['UUID']})")
            self._monitor = monitor
            self._take_state(*state)
        except BaseException:
            self._monitor = None
            await monitor.close()
            raise

    async def _read_state(self) -> None:
        self._take_state(*[await self.monitor.execute(each) for each in QUESTIONS[1:]])

    def _take_state(self, status: dict[str, Any], ports: list[dict[str, Any]]) -> None:
        found = status["status"]
        agent = any(port["label"] == "agent" and port["frontend-open"] for port in ports)
        state, reason, ending = {
            "running": ("running", "", ""),
            "paused": ("paused", "", ""),
            "io-error": ("paused", NO_SPACE, ""),
            "guest-panicked": ("paused", "the guest's kernel panicked", ""),
            "shutdown": ("stopping", "", "the guest shut down"),
        }.get(found, ("starting", "", ""))
        self.status = Status(state=state, reason=reason, ending=ending, agent=agent)  # type: ignore[arg-type]

    # --- the owner ---

    async def _own(self) -> None:
        try:
            while not self.process.ended.done():
                if self._monitor is not None:
                    await self._attend(self._monitor)
                    # The connection ends a moment before the process does; if it does not, QEMU may answer anew.
                    await asyncio.wait({self.process.ended}, timeout=CONNECTION_LOST)
                    if not self.process.ended.done():
                        log.warning("the QMP connection was lost", vm=self.name)
                        await self._close()
                else:
                    with suppress(QmpFailed):
                        await self._connect(RECONNECT)
                    if self._monitor is None:
                        await asyncio.wait({self.process.ended}, timeout=RECONNECT)
        finally:
            if self.process.ended.done():
                await self._end()
            else:
                await self._close()

    async def _attend(self, monitor: Monitor) -> None:
        """Record the state QEMU was found in, then follow its events until the connection ends."""
        if self.status.state != "starting":
            await self._save()
        self.recorded.set()
        if self.status.ending:
            reason = "guest-reset" if self.disc and not self._powered_off() else "guest-shutdown"
            await self._effects(react(Status(state="running"), "SHUTDOWN", {"reason": reason}, disc=self.disc))
        async for event in monitor.events():
            with suppress(QmpFailed):
                data = event.get("data", {})
                at = event["timestamp"]["seconds"] + event["timestamp"]["microseconds"] / 1e6
                if event["event"] == "RESUME":
                    self.stood_still = at - self.stopped_at
                if event["event"] == "STOP":
                    self.stopped_at = at
                    data = {} if self.status.pausing else await monitor.execute("query-status")
                await self._effects(react(self.status, event["event"], data, disc=self.disc))

    def _powered_off(self) -> bool:
        """Whether a guest that was held at its restart, for its disc, powered off instead: QEMU's state is the same."""
        with suppress(OSError):
            return POWERED_OFF in (self.folder / LOG).read_bytes()
        return False

    async def _effects(self, reaction: Reaction) -> None:
        changed = (self.status.state, self.status.reason) != (reaction.status.state, reaction.status.reason)
        if self.status.agent and not reaction.status.agent:
            await self._drop_agent()
        self.status = reaction.status
        if changed:
            await self._save()
        self._changed.set()
        self._changed = asyncio.Event()
        for news in reaction.news:
            await self._tell(news.kind, news.text, news.level)
        for effect in reaction.effects:
            if effect == "quit":
                with suppress(QmpFailed):
                    await self.monitor.execute("quit")
            elif effect == "eject-and-reset":
                await self._eject()
                await self.monitor.execute("system_reset")
                await self.monitor.execute("cont")

    async def _eject(self) -> None:
        """Take the disc out for good: now, and for every later start."""
        await self.monitor.execute("eject", {"id": "cd0", "force": True})
        await self.monitor.execute("set-action", {"reboot": "reset"})
        self.disc = False
        with suppress(NotFound, StoreFailed):
            await update(self._store, f"vm/{self.id}", lambda vm: vm | {"disc": False})

    async def _end(self) -> None:
        how = self.process.ended.result()
        await self._close()
        if not self._quiet:
            await clean(self._home, self.id)
            if self.status.ending:
                self.status = Status(state="stopping", reason=self.status.ending)
                await self._save(final="stopped")
                await self._tell("vm.stopped", f"stopped: {self.status.reason}")
            else:
                self.status = Status(state="stopping", reason=how)
                await self._save(final="crashed")
                await self._tell("vm.crashed", f"crashed: {how}", "error")
        if not self.over.done():
            self.over.set_result(None)
        self._changed.set()

    async def _close(self) -> None:
        await self._drop_agent()
        self.drop_waiter()
        monitor, self._monitor = self._monitor, None
        if monitor is not None:
            await monitor.close()

    async def _save(self, final: str | None = None) -> None:
        """Record the state. A store that cannot be written never harms the guest: it is tried until it works. Only a
        `final` one has to outlive the host's power."""
        state, reason = final or self.status.state, self.status.reason
        stamp = now()

        def change(vm: Value) -> Value | None:
            if vm["state"] == "deleting" or (vm["state"], vm["reason"]) == (state, reason):
                return None
            return vm | {"state": state, "reason": reason, "since": stamp}

        while True:
            try:
                with suppress(NotFound):
                    await update(self._store, f"vm/{self.id}", change, synced=bool(final))
                    if final:
                        await self._store.transact({f"live/{self.id}": None})
                return
            except StoreFailed as error:
                log.error("the state of a VM cannot be recorded; trying again", vm=self.name, error=str(error))
                await asyncio.sleep(1)

    async def _tell(self, kind: str, text: str, level: Any = "info") -> None:
        target = {"kind": "vm", "id": self.id, "name": self.name}
        await self._events.append(kind, f"{self.name} {text}", target=target, level=level)

    # --- what operations ask of it ---

    async def run(self) -> None:
        """Let the vCPUs go."""
        if self.disc:  # hold the guest at its restart, so that the disc is out before the firmware looks for it
            await self.monitor.execute("set-action", {"reboot": "shutdown"})
            with suppress(QmpFailed):  # a QEMU without tracing: a power-off that nobody saw counts as a restart
                await self.monitor.execute("trace-event-set-state", {"name": POWERED_OFF.decode(), "enable": True})
        await self._and_seen("cont", "running")

    async def poll_statistics(self) -> None:
        """Have the guest's balloon driver tell how much memory it uses, from now on."""
        with suppress(QmpFailed):
            path = "/machine/peripheral/balloon0"
            await self.monitor.execute(
                "qom-set", {"path": path, "property": "guest-stats-polling-interval", "value": STATS_EVERY}
            )

    async def pause(self) -> None:
        """Stop the vCPUs."""
        await self._and_seen("stop", "paused")

    async def hold(self) -> None:
        """Stop the vCPUs for a moment, without a word, until `let_go`; all it wrote is in the files then."""
        self.held = True
        if self.status.state == "running":
            self.status = replace(self.status, pausing=HELD)
            await self._and_seen("stop", "paused")

    async def agent_back(self, seconds: float) -> bool:
        """Wait until the guest's agent has its port open; False if that takes longer."""
        return await self._until(lambda status: status.agent, seconds)

    async def _until(self, wanted: Callable[[Status], bool], seconds: float) -> bool:
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                while not wanted(self.status):
                    await self._changed.wait()
        return wanted(self.status)

    async def let_go(self, *, run: bool) -> None:
        """The end of `hold`; `run` for a guest that ran before."""
        if run and self.status.state == "paused":
            await self.run()
        if self.status.pausing == HELD:
            self.status = replace(self.status, pausing="")
        self.held = False

    async def _and_seen(self, command: str, wanted: str) -> None:
        """Execute a command and wait until its event has arrived and is recorded: who asks next sees the new state."""
        changed = self._changed
        await self.monitor.execute(command)
        if self.status.state != wanted:
            with suppress(TimeoutError):
                async with asyncio.timeout(SEEN):
                    await changed.wait()

    async def capture(self, path: Path) -> None:
        """Stop the guest for good and write the state of its devices; its RAM is in the file `ram` then.

        The agent's connection stays open till the end: forks begin with an agent that is listening.
        """
        await self.monitor.execute("stop")
        await migration.save(self.monitor, path)

    async def dial_waiter(self) -> Waiter:
        """The connection to what waits in a captured guest, kept until it is used. Raises `AgentUnavailable`."""
        if self.waiter is None:
            self.waiter = await Waiter.dial(self.folder)
        return self.waiter

    def drop_waiter(self) -> None:
        """The end of that."""
        waiting, self.waiter = self.waiter, None
        if waiting is not None:
            waiting.close()

    async def go_on_from(self, state: bytes, *, saved: bool, agent: bool, waiter: bool) -> None:
        """Put captured devices into a QEMU that was started with the RAM they belong to (`saved`: qemu/migration.py).
        `run` is what comes next.

        The agent and what waits are connected before, as they were when the guest was captured, if they were there.
        """
        if agent:
            connection = Agent(self.folder, "agent.sock")
            await connection.dial()
            self._agent, self.status = connection, replace(self.status, agent=True)
        if waiter:
            await self.dial_waiter()
        await migration.load(self.monitor, state, saved=saved)

    async def copy_memory(self, size: int, progress: guest_memory.Progress) -> guest_memory.Copy:
        """What its `size` bytes of RAM and its screen hold, prepared while the guest goes on; `save_state` fixes the
        moment, and `finish` makes it whole. Raises `QemuFailed`."""
        copy = guest_memory.Copy(self.process.pid.number, await guest_memory.regions(self.monitor, size))
        try:
            await copy.prepare(progress)
        except BaseException:
            await copy.close()
            raise
        return copy

    async def save_state(self, copy: guest_memory.Copy, devices: migration.Devices) -> None:
        """Of a guest that is held: fix the copy of its memory, and save the state of its devices. Nobody talks to its
        agent meanwhile: that would get into its memory. Raises `QemuFailed`, `QmpFailed`."""
        async with self._agent_lock:
            agent = self._agent
            if agent is not None:
                agent.may_ask.clear()
            try:
                await copy.fix()
                await devices.save()
            finally:
                if agent is not None:
                    agent.may_ask.set()

    async def load_memory(self, saved: int, parts: Sequence[int], progress: guest_memory.Progress) -> None:
        """Put a saved execution into a QEMU that was started to wait for it: a file with as many bytes of RAM, screen
        and devices as `parts` says. `run` is what comes next. Raises `QemuFailed`."""
        memory, screen, devices = parts
        try:
            (ram, *_) = await guest_memory.regions(self.monitor, memory)
            await guest_memory.put(self.process.pid.number, ram, saved, 0, progress)
            await migration.load(self.monitor, os.pread(saved, devices, memory + screen))
            await self.load_screen(saved, parts)
            await self._read_state()
            await self._save()
        except QmpFailed as error:
            await asyncio.wait({self.process.ended}, timeout=CONNECTION_LOST)
            raise QemuFailed(
                f"the saved memory of {self.name} cannot be gone on from: {error.detail}\n{last_words(self.folder)}",
                hint="--disks-only boots from the snapshot's disks",
            ) from None

    async def load_screen(self, saved: int, parts: Sequence[int]) -> None:
        """What was to be seen on it; the guest draws only what changes."""
        memory, screen, _ = parts
        for region in (await guest_memory.regions(self.monitor, memory))[1:]:
            if region.size == screen:
                await guest_memory.put(self.process.pid.number, region, saved, memory)

    async def power_down(self) -> None:
        """Ask the guest to shut down, by ACPI and, where the agent listens, by the agent."""
        await self.monitor.execute("system_powerdown")
        if self.status.agent:
            with suppress(Exception):
                async with self.agent() as agent:
                    await agent.shutdown("powerdown")

    async def quit(self) -> None:
        """End QEMU now, as pulling the plug would; its image files are flushed and closed."""
        try:
            await self.monitor.execute("quit", seconds=10)
            patience = 20.0
        except QmpFailed:  # it is on its way out already, or does not answer
            self.status = replace(self.status, ending=self.status.ending or "by force")
            patience = 2.0
        await asyncio.wait({self.process.ended}, timeout=patience)
        if not self.process.ended.done():
            self.status = Status(state="stopping", ending="killed, since it did not end by itself")
            self.process.kill()
        await asyncio.shield(self.over)

    async def discard(self) -> None:
        """Kill a QEMU that never ran its guest, without a word: the operation that made it starts or undoes it."""
        self._quiet = True
        await self.process.end()
        if self._task is not None:
            await asyncio.wait({self._task})
        await clean(self._home, self.id)

    async def release(self) -> None:
        """The daemon leaves; QEMU goes on."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait({self._task})
        await self._close()

    @asynccontextmanager
    async def agent(self) -> AsyncIterator[Agent]:
        """The connection to the guest agent, made at first use and shared. Raises `AgentUnavailable`."""
        if not self.status.agent:
            raise AgentUnavailable(f"the guest agent of {self.name} does not answer: the guest has not opened its port")
        async with self._agent_lock:
            agent = self._agent or Agent(self.folder, "agent.sock")
            if not agent.synced:
                self._agent = None
                await agent.connect()
                self._agent = agent
        try:
            yield agent
        except AgentUnavailable:
            await self._drop_agent()  # the next user connects anew
            raise

    async def _drop_agent(self) -> None:
        agent, self._agent = self._agent, None
        if agent is not None:
            with suppress(Exception):
                await agent.close()

    async def screenshot(self) -> bytes:
        """The screen as PNG."""
        await self.monitor.execute("screendump", {"filename": "screen.png", "format": "png"})
        path = self.folder / "screen.png"
        try:
            with open_file(path, MOST_SCREEN) as picture:
                return picture.read()
        finally:
            path.unlink(missing_ok=True)
