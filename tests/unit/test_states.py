"""Admission: every state, action, holder and force has one answer, with a reason where it is no."""

from __future__ import annotations

from itertools import product

import pytest

from innkeeper.machine.states import ACTIONS, LIVE, STATES, admit, allowed_actions

BUSY = {"id": "abc123", "kind": "vm-start"}
EVERY = list(product(STATES, ACTIONS, (None, BUSY), (False, True)))
CHANGING = ("start", "stop", "restart", "pause", "resume", "delete", "snapshot", "restore")


@pytest.mark.parametrize(("state", "action", "operation", "force"), EVERY)
def test_every_question_has_an_answer(state, action, operation, force):
    answer = admit(state, action, operation=operation, force=force)
    assert answer.answer in ("accept", "nothing", "refuse")
    assert bool(answer.reason) == (answer.answer != "accept")
    assert answer.answer == "refuse" or not answer.hint
    assert admit(state, action, operation=operation, force=force) == answer


@pytest.mark.parametrize(("state", "operation"), list(product(STATES, (None, BUSY))))
def test_allowed_actions_agrees_with_admit(state, operation):
    shown = allowed_actions(state, operation)
    assert tuple(shown) == ACTIONS
    for action, answer in shown.items():
        asked = admit(state, action, operation=operation)
        assert answer == {"allowed": asked.answer == "accept", "reason": asked.reason, "hint": asked.hint}


@pytest.mark.parametrize(("state", "operation"), list(product(STATES, (None, BUSY))))
def test_deleting_works_from_every_state_with_force(state, operation):
    assert admit(state, "delete", operation=operation, force=True).answer == "accept"


def test_deleting_what_lives_needs_force():
    for state in STATES:
        assert admit(state, "delete").answer == ("refuse" if state in LIVE else "accept")


@pytest.mark.parametrize(("state", "action"), list(product(STATES, CHANGING)))
def test_a_held_machine_refuses_and_names_the_operation(state, action):
    answer = admit(state, action, operation=BUSY)
    assert answer.answer == "refuse"
    assert BUSY["id"] in answer.reason and BUSY["kind"] in answer.reason and BUSY["id"] in answer.hint


@pytest.mark.parametrize("state", sorted(LIVE))
def test_a_forced_stop_gets_through_to_whatever_lives(state):
    assert admit(state, "stop", operation=BUSY, force=True).answer == "accept"
    assert admit(state, "stop", force=True).answer == "accept"


@pytest.mark.parametrize(("state", "action", "force"), list(product(STATES, ACTIONS, (False, True))))
def test_force_never_makes_less_possible(state, action, force):
    if admit(state, action).answer == "accept":
        assert admit(state, action, force=True).answer == "accept"


@pytest.mark.parametrize(("state", "action"), list(product(("stopped", "crashed", "creating", "deleting"), ACTIONS)))
def test_what_needs_a_guest_is_refused_without_one(state, action):
    if action in ("exec", "console", "screenshot", "pause", "resume"):
        assert admit(state, action, force=True).answer == "refuse"


def test_looking_is_allowed_while_an_operation_holds_it():
    for action in ("exec", "console", "screenshot"):
        assert admit("running", action, operation=BUSY).answer == "accept"
    for state in ("starting", "running", "paused", "stopping"):
        assert admit(state, "console").answer == admit(state, "screenshot").answer == "accept"


def test_the_answers_people_meet_most():
    table = {
        ("stopped", "start"): "accept", ("crashed", "start"): "accept", ("running", "start"): "nothing",
        ("running", "stop"): "accept", ("stopped", "stop"): "nothing", ("paused", "stop"): "refuse",
        ("running", "restart"): "accept", ("stopped", "restart"): "accept", ("crashed", "restart"): "accept",
        ("running", "pause"): "accept", ("paused", "pause"): "nothing", ("paused", "resume"): "accept",
        ("running", "resume"): "nothing", ("stopped", "resume"): "refuse", ("stopped", "delete"): "accept",
        ("running", "snapshot"): "accept", ("stopped", "snapshot"): "accept", ("paused", "snapshot"): "accept",
        ("running", "restore"): "refuse", ("stopped", "restore"): "accept", ("crashed", "restore"): "accept",
    }  # fmt: skip
    for (state, action), answer in table.items():
        assert admit(state, action).answer == answer, (state, action)
