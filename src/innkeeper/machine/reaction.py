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
    """`disc`: an ISO is in the drive, so a restart of the guest means that it is done with it."""
    if event == "STOP":
        if status.ending:
            return Reaction(status)
        reason = status.pausing
        news = () if reason in (NO_SPACE, PANICKED, DISK_ERROR) else (News("vm.paused", "paused"),)
        return Reaction(replace(status, state="paused", reason=reason, pausing=""), news)
    if event == "RESUME":
        news = (News("vm.resumed", "goes on"),) if status.state == "paused" else ()
        return Reaction(replace(status, state="running", reason="", pausing=""), news)
    if event == "BLOCK_IO_ERROR" and data.get("action") == "stop":
        full = bool(data.get("nospace"))
        reason = NO_SPACE if full else DISK_ERROR
        if status.pausing == reason or status.reason == reason:
            return Reaction(status)
        which = data.get("node-name") or data.get("device") or "a disk"
        text = (
            f"paused: the file system of the pool is full ({which}); it goes on by itself once there is room"
            if full
            else f"paused: {data.get('operation', 'access')} on {which} failed: {data.get('reason', 'unknown error')}"
        )
        return Reaction(replace(status, pausing=reason), (News("vm.paused", text, "error"),))
    if event == "GUEST_PANICKED":
        news = (
            News("vm.panicked", "paused: the guest's kernel panicked; inn logs and inn screenshot show how", "error"),
        )
        return Reaction(replace(status, pausing=PANICKED), news)
    if event == "SHUTDOWN":
        return _shutdown(status, str(data.get("reason", "")), disc)
    if event == "VSERPORT_CHANGE" and data.get("id") == "agent0":
        return Reaction(replace(status, agent=bool(data.get("open"))))
    if event == "RESET":
        return Reaction(replace(status, agent=False))
    return Reaction(status)


def _shutdown(status: Status, reason: str, disc: bool) -> Reaction:
    if reason == "guest-reset" and disc:
        news = News("vm.ejected", "the guest restarted, so its disc was ejected: it boots from its own disk now")
        return Reaction(replace(status, agent=False), (news,), ("eject-and-reset",))
    why = {
        "guest-shutdown": "the guest shut down",
        "guest-reset": "the guest restarted",
        "host-qmp-quit": "stopped",
        "host-signal": "QEMU was asked to end by a signal",
        "guest-panic": PANICKED,
    }.get(reason, f"QEMU shut down ({reason})")
    effects: tuple[Literal["quit"], ...] = () if reason in ("host-qmp-quit", "host-signal") else ("quit",)
    return Reaction(replace(status, state="stopping", ending=why, agent=False), (), effects)
