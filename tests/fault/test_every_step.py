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

AT_A_STEP = ("before/fail", "after/fail", "before/twice", "before/kill", "after/kill")
FIRST = ("after/fail", "after/kill", "undo/kill")
IN_UNDO = ("undo/fail", "undo/twice", "undo/kill")


def faults(verb: Verb):
    """All fault texts of a verb."""
    for step in verb.steps:
        for fault in AT_A_STEP:
            yield f"{verb.kind}/{step.name}/{fault}"
    undoable = [step for step in verb.steps if not step.keep]
    if undoable and not verb.steps[0].keep:
        for step in undoable:
            for fault in IN_UNDO:
                yield f"{verb.kind}/{undoable[-1].name}/after/fail,{verb.kind}/{step.name}/{fault}"


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
    """Every fault of every scenario. A step that an earlier verb has too is by default only tried where it differs
    most from there: `FIRST`; the others are marked slow."""
    known: set[object] = set()
    for scenario in SCENARIOS:
        verb = VERBS[kind_of(scenario)]
        steps = {step.name: step for step in verb.steps}
        for fault in faults(verb):
            _, step, *what = fault.split(",")[-1].split("/")
            repeated = steps[step].do in known or "," in scenario
            marks = [pytest.mark.slow] if repeated and "/".join(what) not in FIRST else []
            yield pytest.param(scenario, fault, marks=marks, id=f"{scenario}: {fault}")
        known |= {step.do for step in verb.steps}


CASES = list(cases())
FAILED = pytest.StashKey[bool]()


@pytest.fixture(scope="module")
def kept():
    """The house that serves one case after the other, for as long as all goes well."""
    houses: list[House] = []
    yield houses
    for house in houses:
        house.clean()


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
def house(kept, request):
    name = request.node.callspec.params["name"]
    of_networks = name.startswith("network-") or name.endswith(("on an interface", "in a network"))
    where = request.getfixturevalue("elsewhere") if of_networks else None
    if kept and kept[0].namespace != where:
        kept.pop().clean()
    if not kept:
        kept.append(House(namespace=where))
    yield kept[0]
    if request.node.stash.get(FAILED, False):
        kept.pop().clean()


def test_every_verb_has_a_scenario():
    assert {kind_of(scenario) for scenario in SCENARIOS} == set(VERBS)


@pytest.mark.parametrize(("name", "fault"), CASES)
def test_fault(name, fault, house, request):
    request.node.stash[FAILED] = True
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
    house.end()
    request.node.stash[FAILED] = False


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
def test_the_next_daemon_settles_what_could_not_be_undone(name, fault, house, request):
    request.node.stash[FAILED] = True
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
    house.end()
    request.node.stash[FAILED] = False
