"""Every step of every verb: failed before and after, run twice, and the daemon killed before and after; every undo
failed and killed. Made from the table of verbs, so a new verb or step is covered or fails here.

After each: nothing stuck, nothing orphaned, nothing half-made listed, what was there is intact, and the next attempt
works (house.py `check`, scenarios.py).
"""

import pytest
from house import FAR_END, UPLINK, UPLINK_ADDRESS, House, attempt
from namespaces import namespace, run
from scenarios import SCENARIOS

from innkeeper.operations.engine import UNDO_ATTEMPTS, Verb
from innkeeper.operations.verbs import VERBS

pytestmark = pytest.mark.guest

AT_A_STEP = ("before/fail", "after/fail", "before/kill", "after/kill")
DIFFERS_MOST = ("after/fail", "after/kill", "undo/kill", "before/twice", "undo/twice")


def faults(verb: Verb):
    """All fault texts of a verb. What leads on, a step that is done twice or an undo that fails at first, is for all
    steps at once."""

    def at(steps, *what):
        return [f"{verb.kind}/{step.name}/{each}" for step in steps for each in what]

    yield from at(verb.steps, *AT_A_STEP)
    yield ",".join(at(verb.steps, "before/twice"))
    undoable = [step for step in verb.steps if not step.keep]
    if undoable and not verb.steps[0].keep:
        failed = at(undoable[-1:], "after/fail")
        for kill in at(undoable, "undo/kill"):
            yield ",".join([*failed, kill])
        yield ",".join([*failed, *at(undoable, "undo/fail", "undo/twice")])


def reaches_the_end(verb: Verb, fault: str) -> bool:
    """Whether what was asked for is there even though the operation has failed: it failed behind that."""
    _, step, when, _ = fault.split(",")[0].split("/")
    deletes = verb.kind.endswith("-delete")
    index = [step.name for step in verb.steps].index(step)
    last = index == len(verb.steps) - 1
    return verb.steps[index].keep and (last and when == "after" if deletes else True)


def kind_of(scenario: str) -> str:
    return scenario.partition(",")[0]


def cases():
    """Every fault of every scenario. A step that an earlier verb has too is by default only tried as `DIFFERS_MOST`
    says; the others are marked slow."""
    known: set[object] = set()
    for scenario in SCENARIOS:
        verb = VERBS[kind_of(scenario)]
        steps = {step.name: step for step in verb.steps}
        for fault in faults(verb):
            _, step, *what = fault.split(",")[-1].split("/")
            repeated = steps[step].do in known or "," in scenario
            marks = [pytest.mark.slow] if repeated and "/".join(what) not in DIFFERS_MOST else []
            name = f"{verb.kind}/all/{'/'.join(what)}" if what[1] == "twice" else fault
            yield pytest.param(scenario, fault, marks=marks, id=f"{scenario}: {name}")
        known |= {step.do for step in verb.steps}


CASES = list(cases())


@pytest.fixture(scope="module")
def elsewhere():
    """A network namespace, for what changes the host's network: with an interface that leads outside."""
    with namespace("fault") as name:
        run(name, "ip", "link", "add", UPLINK, "type", "veth", "peer", "name", FAR_END)
        run(name, "ip", "addr", "add", UPLINK_ADDRESS + "/24", "dev", UPLINK)
        for link in (UPLINK, FAR_END):
            run(name, "ip", "link", "set", link, "up")
        run(name, "ip", "route", "add", "default", "via", "192.0.2.2")
        yield name


@pytest.fixture
def house(request):
    name = request.node.callspec.params["name"]
    of_networks = name.startswith("network-") or name.endswith(("on an interface", "in a network"))
    made = House(namespace=request.getfixturevalue("elsewhere") if of_networks else None)
    yield made
    made.clean()


def test_every_verb_has_a_scenario():
    assert {kind_of(scenario) for scenario in SCENARIOS} == set(VERBS)


@pytest.mark.parametrize(("name", "fault"), CASES)
def test_fault(name, fault, house):
    scenario, kind = SCENARIOS[name], kind_of(name)
    came_to_its_end = reaches_the_end(VERBS[kind], fault)
    house.start(fault)
    scenario.prepare(house)
    killed = attempt(house, scenario.act) is None
    assert killed == fault.endswith("/kill"), "the fault did not come to pass"
    if killed or "/undo/" in fault:  # what an undo that failed left is swept by whoever comes next
        house.end()
        house.start()
    house.settle()
    operation = house.latest(kind)
    house.check(deleting=kind in ("vm-delete", "network-delete") and operation.state == "failed")
    if operation.state == "done":
        assert "/fail" not in fault
        scenario.whole(house)
    else:
        assert operation.state == "failed"
        lost = killed and operation.error.code == scenario.lost
        assert lost or (operation.error.code == "injected-fault" and "/fail" in fault)
        if not came_to_its_end:
            scenario.before(house)
            scenario.act(house.inn).wait()
        house.check()
        scenario.whole(house)
    house.empty()


@pytest.mark.parametrize(
    ("name", "fault"),
    [
        (verb, ",".join([f"{verb}/{last}/after/fail", *[f"{verb}/{step}/undo/fail"] * UNDO_ATTEMPTS]))
        for verb, last, step in (
            ("vm-create", "settle", "claim"),
            ("vm-create", "settle", "make-files"),
            ("vm-start", "run", "admit"),
            ("vm-start", "run", "spawn"),
            ("vm-stop", "shut-down", "mark"),
            ("vm-restart", "shut-down", "mark"),
        )
    ]
    + [("vm-delete", f"vm-delete/{step.name}/before/fail") for step in VERBS["vm-delete"].steps[1:]],
)
def test_the_next_daemon_settles_what_could_not_be_undone(name, fault, house):
    house.start(fault)
    SCENARIOS[name].prepare(house)
    operation = attempt(house, SCENARIOS[name].act)
    assert operation is not None and operation.state == "failed"
    house.end()
    house.start()
    house.settle()
    house.check()
    if name == "vm-delete":
        SCENARIOS[name].whole(house)
    house.empty()
