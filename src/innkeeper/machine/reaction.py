"""What a QMP event means for a VM: a pure function, so that every event in every state can be tested.

Events and their fields: QEMU's qapi/run-state.json, block-core.json and char.json.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

Level = Literal["info", "warning", "error"]

NO_SPACE = "the pool is full"
PANICKED = "the guest's kernel panicked"
DISK_ERROR = "a disk had an I/O error"
HELD = "an operation holds it for a moment"
"""A pause that nobody asked for and nobody is told of: it is over before they could look."""
QEMU_ERROR = "QEMU met an error after which the guest cannot go on; see qemu.log"
_RESTARTING = "the guest restarts, without its disc"

_STOPPED_BY = {"io-error": DISK_ERROR, "guest-panicked": PANICKED, "internal-error": QEMU_ERROR}
"""What `query-status` says right after a STOP (RunState), where no event has told more."""


@dataclass(frozen=True)
class Status:
    """What is known of a live QEMU."""

    state: Literal["starting", "running", "paused", "stopping"] = "starting"
    reason: str = ""
    pausing: str = ""
    """Why the next STOP will come, told by the event before it."""
    agent: bool = False
    """The guest has the agent's port open."""
    ending: str = ""
    """Why QEMU is about to end, as a sentence; empty means that an end would be a crash."""


@dataclass(frozen=True)
class News:
    """Something people should know: becomes an event."""

    kind: str
    text: str
    level: Level = "info"


@dataclass(frozen=True)
class Reaction:
    """The new status, what to tell, and what the owner has to do."""

    status: Status
    news: tuple[News, ...] = ()
    effects: tuple[Literal["quit", "eject-and-reset"], ...] = ()


def react(status: Status, event: str, data: Mapping[str, Any], *, disc: bool) -> Reaction:
    """`disc`: an ISO is in the drive, so a restart of the guest means that it is done with it.

    `data` is the event's own, and for STOP, which has none, the answer of `query-status`: it tells a pause that was
    asked for from one that befell the guest. QEMU 7.2 sends BLOCK_IO_ERROR before its STOP; newer ones limit it to one
    a second (monitor/monitor.c), so there it may come after.
    """
    if event == "SHUTDOWN":
        return _shutdown(status, str(data.get("reason", "")), disc)
    if status.ending:  # nothing but the end of the process changes it any more
        return Reaction(status)
    if status.pausing == _RESTARTING and event in ("STOP", "BLOCK_IO_ERROR", "GUEST_PANICKED"):
        return Reaction(status)
    if event == "STOP":
        return _stop(status, str(data.get("status", "")))
    if event == "RESUME":
        news = (News("vm.resumed", "goes on"),) if status.state == "paused" and status.reason != HELD else ()
        return Reaction(replace(status, state="running", reason="", pausing=""), news)
    if event == "BLOCK_IO_ERROR" and data.get("action") == "stop":
        return _disk_error(status, data)
    if event == "GUEST_PANICKED":
        news = (
            News("vm.panicked", "paused: the guest's kernel panicked; inn logs and inn screenshot show how", "error"),
        )
        return Reaction(replace(status, pausing=PANICKED), news)
    if event == "VSERPORT_CHANGE" and data.get("id") == "agent0":
        return Reaction(replace(status, agent=bool(data.get("open"))))
    if event == "NETDEV_STREAM_DISCONNECTED":
        card = str(data.get("netdev-id")).removeprefix("net")
        text = f"has no network any more on card {card}, until its next start: its passt has ended"
        return Reaction(status, (News("nic.lost", text, "warning"),))
    if event == "RESET":
        return Reaction(replace(status, agent=False))
    return Reaction(status)


def _stop(status: Status, runstate: str) -> Reaction:
    reason = status.pausing or _STOPPED_BY.get(runstate, "")
    if status.state == "paused":  # known already: this STOP was on its way when the state was read
        return Reaction(replace(status, reason=status.reason or reason, pausing=""))
    paused = replace(status, state="paused", reason=reason, pausing="")
    if status.pausing:
        return Reaction(paused)  # the event that told why was news already
    return Reaction(
        paused, (News("vm.paused", f"paused: {reason}", "error") if reason else News("vm.paused", "paused"),)
    )


def _disk_error(status: Status, data: Mapping[str, Any]) -> Reaction:
    full = bool(data.get("nospace"))
    reason = NO_SPACE if full else DISK_ERROR
    late = status.state == "paused"
    # A request that fails while a guest is paused for another reason is tried again, and told, when it goes on.
    if late and (status.reason != DISK_ERROR or not full):
        return Reaction(status)
    if status.pausing in (reason, PANICKED):
        return Reaction(status)
    which = str(data.get("node-name") or data.get("device") or "a disk").partition("-")[0]  # plan/chain.py
    text = (
        f"paused: the file system of the pool is full ({which}); it goes on by itself once there is room"
        if full
        else f"paused: {data.get('operation', 'access')} on {which} failed: {data.get('reason', 'unknown error')}"
    )
    known = replace(status, reason=reason) if late else replace(status, pausing=reason)
    return Reaction(known, (News("vm.paused", text, "error"),))


def _shutdown(status: Status, reason: str, disc: bool) -> Reaction:
    if status.ending:
        return Reaction(status)  # QEMU says it again when it quits; the first one told why
    if reason == "guest-reset" and status.pausing == _RESTARTING:
        return Reaction(status)  # firmware and kernels try several ways to reset, and QEMU tells of each
    if reason == "guest-reset" and disc:
        news = News("vm.ejected", "the guest restarted, so its disc was ejected: it boots from its own disk now")
        known = replace(status, agent=False, pausing=_RESTARTING)  # until the RESUME after the reset
        return Reaction(known, (news,), ("eject-and-reset",))
    why = {
        "guest-shutdown": "the guest shut down",
        "guest-reset": "the guest restarted",
        "host-qmp-quit": "by force",
        "host-signal": "QEMU was asked to end by a signal",
        "guest-panic": PANICKED,
    }.get(reason, f"QEMU shut down ({reason})")
    effects: tuple[Literal["quit"], ...] = () if reason in ("host-qmp-quit", "host-signal") else ("quit",)
    known = replace(status, state="stopping", reason="", pausing="", ending=why, agent=False)
    return Reaction(known, (), effects)
