"""What QMP events do to a VM's status, in every order."""

from __future__ import annotations

from dataclasses import replace

from hypothesis import given, settings
from hypothesis import strategies as st

from innkeeper.machine.reaction import DISK_ERROR, HELD, NO_SPACE, PANICKED, QEMU_ERROR, Status, react

RUNNING = Status(state="running", agent=True)


def told(status: Status, *events, disc: bool = False):
    """The status after events (name, data), with all news and effects."""
    news, effects = [], []
    for event in events:
        name, data = event if isinstance(event, tuple) else (event, {})
        reaction = react(status, name, data, disc=disc)
        status = reaction.status
        news += reaction.news
        effects += reaction.effects
    return status, news, effects


def io_error(nospace=False, action="stop", **more):
    data = {"device": "", "node-name": "disk0", "operation": "write", "action": action, "nospace": nospace}
    return "BLOCK_IO_ERROR", data | {"reason": "No space left on device" if nospace else "Input/output error"} | more


def stop(status="paused"):
    return "STOP", {"running": False, "singlestep": False, "status": status}


def shutdown(reason):
    return "SHUTDOWN", {"guest": reason.startswith("guest"), "reason": reason}


def panicked():
    return "GUEST_PANICKED", {"action": "pause"}


def test_a_pause_that_was_asked_for_has_no_reason_and_is_told():
    status, news, effects = told(RUNNING, stop())
    assert (status.state, status.reason, effects) == ("paused", "", [])
    assert [n.kind for n in news] == ["vm.paused"]
    status, news, _ = told(status, "RESUME")
    assert (status.state, status.reason) == ("running", "")
    assert [n.kind for n in news] == ["vm.resumed"]


def test_a_full_pool_pauses_and_says_so_once():
    status, news, _ = told(RUNNING, io_error(nospace=True), io_error(nospace=True), stop("io-error"))
    assert (status.state, status.reason) == ("paused", NO_SPACE)
    assert [(n.kind, n.level) for n in news] == [("vm.paused", "error")]
    assert "disk0" in news[0].text and "full" in news[0].text
    status, _, _ = told(status, io_error(nospace=True), io_error())  # requests that were still under way
    assert status.reason == NO_SPACE
    status, news, _ = told(status, "RESUME")
    assert (status.state, status.reason, status.pausing) == ("running", "", "")
    status, news, _ = told(status, io_error(nospace=True), stop("io-error"))
    assert status.reason == NO_SPACE and len(news) == 1, "full again: said again"


def test_a_disk_error_says_which_and_what():
    status, news, _ = told(RUNNING, io_error(), stop("io-error"))
    assert (status.state, status.reason) == ("paused", DISK_ERROR)
    assert "write on disk0 failed: Input/output error" in news[0].text


def test_an_error_that_only_the_guest_sees_pauses_nothing():
    assert told(RUNNING, io_error(action="report"), io_error(action="ignore")) == (RUNNING, [], [])


def test_an_error_report_that_comes_after_its_stop():
    """Newer QEMU limits BLOCK_IO_ERROR to one a second, so that a STOP can be first."""
    status, news, _ = told(RUNNING, stop("io-error"))
    assert (status.state, status.reason, news[0].level) == ("paused", DISK_ERROR, "error")
    status, news, _ = told(status, io_error(nospace=True))
    assert (status.state, status.reason) == ("paused", NO_SPACE), "so it goes on by itself"
    assert "goes on by itself" in news[0].text
    assert told(status, io_error(nospace=True))[1] == []


def test_a_moment_in_which_an_operation_holds_it_is_no_news():
    status, news, _ = told(replace(RUNNING, pausing=HELD), stop())
    assert (status.state, status.reason, news) == ("paused", HELD, [])
    status, news, _ = told(status, "RESUME")
    assert (status.state, status.reason, news) == ("running", "", [])


def test_an_error_while_it_is_paused_by_a_person_does_not_make_it_go_on_by_itself():
    status, news, _ = told(RUNNING, stop("paused"), io_error(nospace=True))
    assert (status.reason, status.pausing) == ("", "")
    assert len(news) == 1


def test_a_panic_keeps_its_reason():
    status, news, _ = told(RUNNING, panicked(), stop("guest-panicked"))
    assert (status.state, status.reason) == ("paused", PANICKED)
    assert [(n.kind, n.level) for n in news] == [("vm.panicked", "error")]
    assert told(RUNNING, panicked(), io_error(nospace=True), stop("guest-panicked"))[0].reason == PANICKED
    assert told(RUNNING, stop("guest-panicked"))[0].reason == PANICKED


def test_an_internal_error_is_no_pause_that_somebody_asked_for():
    status, news, _ = told(RUNNING, stop("internal-error"))
    assert (status.state, status.reason) == ("paused", QEMU_ERROR)
    assert news[0].level == "error"


def test_the_guest_shuts_down():
    status, news, effects = told(RUNNING, "POWERDOWN", shutdown("guest-shutdown"), stop("shutdown"))
    assert (status.state, status.ending, effects) == ("stopping", "the guest shut down", ["quit"])
    assert not status.agent and not news
    # The quit that follows says SHUTDOWN once more; what ended it stays known.
    status, news, effects = told(status, shutdown("host-qmp-quit"))
    assert (status.ending, effects) == ("the guest shut down", [])


def test_a_quit_and_a_signal_end_qemu_by_themselves():
    for reason in ("host-qmp-quit", "host-signal"):
        status, _, effects = told(RUNNING, shutdown(reason))
        assert status.state == "stopping" and status.ending and not effects


def test_a_guest_that_restarts_stays():
    status, news, effects = told(RUNNING, ("RESET", {"guest": True, "reason": "guest-reset"}))
    assert (status.state, status.agent, news, effects) == ("running", False, [], [])


def test_a_restart_with_a_disc_ejects_it_and_is_no_pause():
    status, news, effects = told(RUNNING, shutdown("guest-reset"), disc=True)
    assert (status.state, status.ending, effects) == ("running", "", ["eject-and-reset"])
    assert [n.kind for n in news] == ["vm.ejected"]
    # A second SHUTDOWN is what QEMU 7.2 sends: SeaBIOS resets by the keyboard controller, then by port 0xcf9.
    status, news, effects = told(status, stop("shutdown"), shutdown("guest-reset"))
    assert (status.state, status.ending, news, effects) == ("running", "", [], [])
    status, news, effects = told(status, ("RESET", {"guest": False, "reason": "host-qmp-system-reset"}), "RESUME")
    assert (status, news, effects) == (Status(state="running"), [], [])
    status, news, _ = told(status, stop())
    assert status.state == "paused" and news, "the next pause is one"


def test_a_shutdown_from_the_disc_is_an_end():
    assert told(RUNNING, shutdown("guest-shutdown"), disc=True)[2] == ["quit"]


def test_the_agents_port():
    status, _, _ = told(Status(), ("VSERPORT_CHANGE", {"id": "agent0", "open": True}))
    assert status.agent
    assert told(status, ("VSERPORT_CHANGE", {"id": "another", "open": False}))[0].agent
    assert not told(status, ("VSERPORT_CHANGE", {"id": "agent0", "open": False}))[0].agent


RUNSTATES = ["paused", "io-error", "guest-panicked", "internal-error", "shutdown", "running", "prelaunch", "watchdog"]
REASONS = [
    "none", "host-error", "host-qmp-quit", "host-qmp-system-reset", "host-signal", "host-ui", "guest-shutdown",
    "guest-reset", "guest-panic", "subsystem-reset", "snapshot-load", "of-another-day",
]  # fmt: skip
EVENT = st.one_of(
    st.sampled_from(RUNSTATES).map(stop),
    st.just(("STOP", {})),
    st.just(("RESUME", {})),
    st.builds(io_error, st.booleans(), st.sampled_from(["stop", "report", "ignore"])),
    st.just(("BLOCK_IO_ERROR", {"device": "", "operation": "read", "action": "stop", "reason": "?"})),
    st.just(panicked()),
    st.sampled_from(REASONS).map(shutdown),
    st.sampled_from(REASONS).map(lambda reason: ("RESET", {"guest": True, "reason": reason})),
    st.booleans().map(lambda is_open: ("VSERPORT_CHANGE", {"id": "agent0", "open": is_open})),
    st.sampled_from(["POWERDOWN", "SUSPEND", "WAKEUP", "NIC_RX_FILTER_CHANGED", "OF_ANOTHER_DAY"]).map(
        lambda e: (e, {})
    ),
)
STATUS = st.builds(Status, state=st.sampled_from(["starting", "running", "paused"]), agent=st.booleans())


@settings(max_examples=2000, deadline=None)
@given(status=STATUS, events=st.lists(EVENT, max_size=12), disc=st.booleans())
def test_any_events_in_any_order(status, events, disc):
    told_why = set()
    for name, data in events:
        before = status
        reaction = react(before, name, data, disc=disc)
        status = reaction.status
        told_why |= {n.text for n in reaction.news}
        assert status.state in ("starting", "running", "paused", "stopping")
        assert all(n.kind.startswith("vm.") and n.text for n in reaction.news)
        if before.ending:
            assert reaction.status == before and not reaction.news and not reaction.effects
        if status.ending:
            assert status.state == "stopping" and not status.reason and not status.agent
        if name == "RESUME" and not status.ending:
            assert (status.state, status.reason, status.pausing) == ("running", "", "")
        if name == "STOP" and status.state == "paused" and not before.ending and "restarts" not in before.pausing:
            known = before.pausing or {"io-error": DISK_ERROR, "guest-panicked": PANICKED}.get(data.get("status"), "")
            kept = before.reason if before.state == "paused" else ""
            assert status.reason in (kept or known, QEMU_ERROR)
        if status.state == "paused" and before.state == "paused" and before.reason:
            assert status.reason in (before.reason, NO_SPACE), "a reason is not lost while it is paused"
        if status.state == "paused" and before.state != "paused":
            assert told_why, "whoever reads the events knows it too"
        assert not (status.state == "running" and status.reason)
