"""What a VM admits in which state: one pure rule for the API, the CLI, the UI and the tests."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

STATES = ("creating", "stopped", "starting", "running", "paused", "stopping", "crashed", "deleting")
ACTIONS = (
    "start",
    "stop",
    "restart",
    "pause",
    "resume",
    "delete",
    "exec",
    "console",
    "screenshot",
    "snapshot",
    "restore",
    "clone",
    "fork",
    "nics",
    "firewall",
)

LIVE = frozenset({"starting", "running", "paused", "stopping"})
"""States in which a QEMU process may exist."""


@dataclass(frozen=True)
class Admission:
    """The answer to a request: accept it, nothing to do, or refuse it and say why and what instead."""

    answer: Literal["accept", "nothing", "refuse"]
    reason: str = ""
    hint: str = ""


ACCEPT = Admission("accept")

_ALL_BUT_DELETE = " ".join(action for action in ACTIONS if action != "delete")

# (states, actions) → answer; the first row that fits counts.
_RULES: tuple[tuple[frozenset[str], frozenset[str], Admission], ...] = tuple(
    (frozenset(states.split()), frozenset(actions.split()), Admission(answer, reason, hint))  # type: ignore[arg-type]
    for states, actions, answer, reason, hint in (
        ("creating", _ALL_BUT_DELETE, "refuse", "it is still being made", "inn op ls shows how far it is"),
        ("deleting", _ALL_BUT_DELETE, "refuse", "it is being deleted", ""),
        ("deleting", "delete", "accept", "", ""),
        ("running", "start", "nothing", "it is running already", ""),
        ("starting", "start", "nothing", "it is starting already", ""),
        ("paused", "start", "refuse", "it is paused", "inn resume lets it go on"),
        ("stopping", "start", "refuse", "it is shutting down", "wait for its end, or use inn restart"),
        ("stopped crashed", "stop", "nothing", "it is stopped already", ""),
        ("stopped crashed", "pause resume", "refuse", "it is stopped", "inn start starts it"),
        ("stopped crashed", "exec console screenshot", "refuse", "it is stopped", "inn start starts it"),
        ("starting", "pause resume restart exec snapshot clone fork nics",
         "refuse", "it is still starting", "try again in a moment"),
        ("stopping", "pause restart exec snapshot clone fork nics",
         "refuse", "it is shutting down", "wait, or inn stop --force"),
        ("stopping", "resume", "refuse", "it is shutting down", ""),
        ("paused", "pause", "nothing", "it is paused already", ""),
        ("running", "resume", "nothing", "it is running already", ""),
        ("stopped crashed", "fork", "refuse", "it is stopped, and a fork goes on with what a guest is doing",
         "inn clone makes a VM of its own with its disks"),
        ("paused", "fork", "refuse", "it is paused, and so would its forks be", "inn resume lets it go on"),
        ("paused", "exec", "refuse", "it is paused, so nobody would answer", "inn resume lets it go on"),
    )
)  # fmt: skip

_WITHOUT_FORCE = {
    ("paused", "stop"): Admission(
        "refuse", "it is paused, so its system cannot shut down", "inn resume first, or inn stop --force"
    ),
    ("paused", "restart"): Admission(
        "refuse", "it is paused, so its system cannot shut down", "inn resume first, or inn restart --force"
    ),
    **{
        (state, "delete"): Admission(
            "refuse", "it is running" if state != "paused" else "it is paused", "inn stop it first, or inn rm --force"
        )
        for state in ("running", "paused", "stopping", "starting")
    },
    **{
        (state, "restore"): Admission(
            "refuse",
            "it is running" if state != "paused" else "it is paused",
            "inn stop it first; or --and-start: what it is doing is lost then, its disks are kept",
        )
        for state in ("running", "paused", "stopping", "starting")
    },
}


def admit(state: str, action: str, *, operation: Mapping[str, Any] | None = None, force: bool = False) -> Admission:
    """Whether a VM in `state`, held by `operation` or by none, takes `action`.

    A held VM takes nothing that would change it, except a forced stop or delete, which end the operation first.
    """
    if operation is not None and action not in ("exec", "console", "screenshot"):
        forced = force and action in ("stop", "delete")
        if not forced:
            return Admission(
                "refuse", f"it is busy: {operation['kind']} ({operation['id']}) is under way",
                f"inn op show {operation['id']} tells how far it is, inn op cancel {operation['id']} stops it",
            )  # fmt: skip
        if action == "delete":
            return ACCEPT
    if operation is not None and operation["kind"] == "vm-fork" and action in ("exec", "console"):
        return Admission("refuse", "it is still becoming a machine of its own", "try again in a moment")
    if not force and (state, action) in _WITHOUT_FORCE:
        return _WITHOUT_FORCE[state, action]
    for states, actions, answer in _RULES:
        if state in states and action in actions:
            return answer
    return ACCEPT


def allowed_actions(state: str, operation: Mapping[str, Any] | None) -> dict[str, dict[str, Any]]:
    """Every action with whether it would be accepted now, and if not why: what the API shows with each VM."""
    answers = {action: admit(state, action, operation=operation) for action in ACTIONS}
    return {
        action: {"allowed": answer.answer == "accept", "reason": answer.reason, "hint": answer.hint}
        for action, answer in answers.items()
    }
