"""All live machines of this host: start, adopt, look after."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from contextlib import suppress
from typing import Any

import structlog

from innkeeper.base.clock import now
from innkeeper.base.errors import InnkeeperError, NetworkFailed, QemuFailed, QmpFailed, StoreFailed
from innkeeper.base.home import Home
from innkeeper.base.units import MIB
from innkeeper.machine.machine import Machine, clean
from innkeeper.machine.reaction import NO_SPACE
from innkeeper.machine.serial_log import bound
from innkeeper.machine.states import LIVE
from innkeeper.network import macvtap, sriov
from innkeeper.plan.options import Plan
from innkeeper.qemu import cgroup
from innkeeper.qemu.process import LOG, Pid, Process, find, last_words, spawn
from innkeeper.store.contract import Store, Value
from innkeeper.store.events import EventLog

log = structlog.get_logger()

ADOPT = 3.0
"""Seconds that a running QEMU gets to answer a daemon that comes back; all are asked at once."""
ROOM_EVERY = 1.0
"""Seconds between two looks whether a full pool has room again; looked only while a guest waits for it."""
INDIFFERENT = frozenset(
    {
        "vm-pause",
        "vm-resume",
        "vm-update",
        "vm-nics",
        "snapshot-create",
        "snapshot-delete",
        "snapshot-measure",
        "vm-clone",
    }
)
"""Operations on a VM that never record its end, so that somebody else has to."""
LOGS_EVERY = 30.0
"""Seconds between two looks at the size of the serial logs."""


class Machines:
    """The live machines, by VM id."""

    def __init__(self, home: Home, store: Store, events: EventLog) -> None:
        self._home, self._store, self._events = home, store, events
        self._live: dict[str, Machine] = {}
        self._care: list[asyncio.Task[None]] = []

    def get(self, vm_id: str) -> Machine | None:
        """The live machine of a VM, None when no QEMU runs for it."""
        machine = self._live.get(vm_id)
        return None if machine is None or machine.over.done() else machine

    def live(self) -> list[Machine]:
        """All of them."""
        return [machine for machine in self._live.values() if not machine.over.done()]

    async def start(
        self,
        vm: Value,
        plan: Plan,
        ram: int | None = None,
        then: Callable[[Machine], Awaitable[None]] | None = None,
        taps: Sequence[int] = (),
    ) -> Machine:
        """Spawn QEMU by the plan, stopped before its first instruction. Nothing is left of it when this fails. `ram`
        is the descriptor for `plan.ram`, `taps` are those for `plan.taps`, `then` is what is done with the stopped
        machine while its cgroup is being made.

        Raises `QemuFailed` with what QEMU wrote to stderr.
        """
        vm_id, folder = vm["id"], self._home.vm(vm["id"])
        if vm_id in self._live:  # one that no record knows has been ended by `adopt`
            await self.discard(vm_id)
        (folder / LOG).unlink(missing_ok=True)
        process = spawn(plan, self._home, vm_id, ram, taps)
        machine = self._new(vm_id, vm["name"], process)
        try:
            pid = process.pid
            live = {"pid": pid.number, "started": pid.started, "argv": plan.argv(), "since": now()}
            beside = asyncio.gather(
                cgroup.place(self._home, vm_id, pid.number),
                self._store.transact({f"live/{vm_id}": live}, synced=False),  # no QEMU outlives the power
                return_exceptions=True,
            )
            try:
                await machine.attach(vm["identity"]["uuid"], disc=vm["disc"])
                if then is not None:
                    await then(machine)
            finally:
                unconfined, recorded = await beside
            if isinstance(unconfined, BaseException) or isinstance(recorded, BaseException):
                raise recorded if isinstance(recorded, BaseException) else unconfined  # type: ignore[misc]
            if unconfined:
                log.warning("a VM has no cgroup of its own", vm=vm["name"], reason=unconfined)
        except BaseException as error:
            words = last_words(folder)
            await asyncio.shield(machine.discard())
            self._live.pop(vm_id, None)
            await asyncio.shield(self._store.transact({f"live/{vm_id}": None}))
            if isinstance(error, QmpFailed):
                raise QemuFailed(f"QEMU did not start: {error.detail}\n{words}", stderr=words) from None
            raise
        return machine

    async def discard(self, vm_id: str) -> None:
        """Kill whatever QEMU there is of a VM that is not running its guest: also one that no record knows."""
        machine = self._live.pop(vm_id, None)
        if machine is not None and not machine.over.done():
            await machine.discard()
        for pid, owner in find(self._home).items():
            if owner == vm_id:
                with suppress(ProcessLookupError):
                    await Process(pid).end()
        await clean(self._home, vm_id)
        await self._store.transact({f"live/{vm_id}": None})

    async def adopt(self) -> None:
        """After a start of the daemon: own what runs, note what has ended, kill what no VM claims."""
        running = find(self._home)
        records = {d.value["id"]: d.value for d in await self._store.list("vm/")}
        found: list[Coroutine[Any, Any, None]] = []
        for document in await self._store.list("live/"):
            vm_id, live = document.key.removeprefix("live/"), document.value
            vm = records.get(vm_id)
            pid = Pid(live["pid"], live["started"])
            if vm is not None and running.pop(pid, None) == vm_id:
                found.append(self._adopt_one(vm, pid))
            else:
                found.append(self._missing(vm_id, vm))
        await asyncio.gather(*found)
        for pid, vm_id in running.items():
            log.warning("killing a QEMU that no record claims", pid=pid.number, vm=vm_id)
            with suppress(ProcessLookupError):
                await Process(pid).end()
            await clean(self._home, vm_id)
        for vm_id in await cgroup.list_ours(self._home):
            if vm_id not in self._live:
                await cgroup.remove(self._home, vm_id)
        try:
            await macvtap.sweep(self._live, self._home.networks)
            await sriov.sweep(self._live, self._home.networks)
        except NetworkFailed as error:
            log.error("what cards were on that nobody uses cannot be put back", error=str(error))

    async def _adopt_one(self, vm: Value, pid: Pid) -> None:
        try:
            machine = self._new(vm["id"], vm["name"], Process(pid))
        except ProcessLookupError:
            await self._missing(vm["id"], vm)
            return
        uuid = vm["identity"]["uuid"]
        try:
            await machine.attach(uuid, disc=vm["disc"], seconds=ADOPT)
            async with asyncio.timeout(ADOPT):  # a store that cannot be written must not keep the daemon from starting
                await machine.recorded.wait()
        except InnkeeperError as error:
            # It lives and does not answer: never called stopped, and not killed either; `inn stop --force` can.
            log.error("a QEMU does not answer", vm=vm["name"], error=str(error))
            machine.own_without_monitor(uuid, vm["state"], disc=vm["disc"])
        except TimeoutError:
            log.error("the state of a VM cannot be recorded", vm=vm["name"])

    async def _missing(self, vm_id: str, vm: Value | None) -> None:
        """It ended while no daemon was looking. An operation that goes on sees to the VM itself."""
        await clean(self._home, vm_id)
        writes: dict[str, Value | None] = {f"live/{vm_id}": None}
        reason = "QEMU ended while no daemon was looking"
        held = vm is not None and vm["operation"] and vm["operation"]["kind"] not in INDIFFERENT
        crashed = vm is not None and not held and vm["state"] in LIVE
        if vm is not None and crashed:
            writes[f"vm/{vm_id}"] = vm | {"state": "crashed", "reason": reason, "since": now()}
        try:
            await self._store.transact(writes)
        except StoreFailed as error:
            log.error("the end of a VM cannot be recorded; the next start will", vm=vm_id, error=str(error))
            return
        if vm is not None and crashed:
            target = {"kind": "vm", "id": vm_id, "name": vm["name"]}
            await self._events.append("vm.crashed", f"{vm['name']} crashed: {reason}", target=target, level="error")

    def _new(self, vm_id: str, name: str, process: Process) -> Machine:
        machine = self._live[vm_id] = Machine(vm_id, name, self._home, self._store, self._events, process)
        machine.over.add_done_callback(
            lambda _: self._live.pop(vm_id, None) if self._live.get(vm_id) is machine else None
        )
        return machine

    # --- looking after them ---

    def begin_care(self) -> None:
        """Resume guests when a full pool has room, keep serial logs bounded."""
        self._care = [
            asyncio.create_task(self._resume_when_there_is_room()),
            asyncio.create_task(self._bound_logs()),
        ]

    async def release(self) -> None:
        """The daemon leaves; the guests go on."""
        for task in self._care:
            task.cancel()
        for machine in self.live():
            await machine.release()

    async def _resume_when_there_is_room(self) -> None:
        while True:
            waiting = [m for m in self.live() if m.status.reason == NO_SPACE and not m.held]
            if waiting and self._has_room():
                for machine in waiting:
                    with suppress(QmpFailed):
                        await machine.run()
                        target = {"kind": "vm", "id": machine.id, "name": machine.name}
                        text = f"{machine.name}: the pool has room again, so it goes on"
                        await self._events.append("vm.room", text, target=target)
            await asyncio.sleep(ROOM_EVERY)

    def _has_room(self) -> bool:
        room = os.statvfs(self._home.vms)
        return room.f_bavail * room.f_frsize >= min(256 * MIB, room.f_blocks * room.f_frsize // 20)

    async def _bound_logs(self) -> None:
        while True:
            for machine in self.live():
                for log_of in ("serial.log", LOG):  # what a guest does can make QEMU complain without an end
                    with suppress(OSError):
                        bound(machine.folder / log_of)
            await asyncio.sleep(LOGS_EVERY)
