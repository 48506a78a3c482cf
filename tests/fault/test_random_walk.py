"""Several VMs and images, verbs at random, half of them with a fault: what must hold holds after every step.

`INNKEEPER_SEED` repeats a walk; a failure prints its seed and its steps.
"""

import os
import random
import signal
import time
from contextlib import suppress

import pytest
from house import House, attempt
from scenarios import disk_image, spec
from test_every_step import faults

from innkeeper.client.errors import ApiError, DaemonUnreachable
from innkeeper.operations.verbs import VERBS

pytestmark = pytest.mark.guest

NAMES = ("ann", "bob", "cat")
FAULTS = {verb.kind: list(faults(verb)) for verb in VERBS.values()}


def wishes(chance: random.Random):
    """The verb that it leads to, and something that a person could ask for: admitting it is the daemon's."""
    name = chance.choice(NAMES)
    force = chance.random() < 0.8
    image = chance.choice([None, None, "base"])
    which = chance.random()
    memory = f"{chance.choice([32, 40, 48])}M"

    def update(inn):
        """Its state stays as it is: no guest is here to answer a graceful stop."""
        state = "stopped" if inn.vm(name).state == "stopped" else "running"
        document = {"kind": "vm", "state": state, **spec(name, memory=memory, image=image)}
        return inn.operation(inn.apply([document])["operations"][0])

    def snapshot(inn):
        """One of those that it has; `IndexError` for none."""
        found = inn.vm(name).snapshots.list()
        return found[int(which * len(found))]["name"]

    def restore(inn):
        return inn.vm(name).snapshots.restore(snapshot(inn), keep=force, start=memory != "32M")

    return chance.choice(
        [
            *[("snapshot-create", lambda inn: inn.vm(name).snapshots.create())] * 2,
            ("snapshot-delete", lambda inn: inn.vm(name).snapshots.delete(snapshot(inn))),
            ("snapshot-delete", lambda inn: inn.vm(name).snapshots.prune(automatic=force)),
            ("snapshot-restore", restore),
            ("vm-create", lambda inn: inn.create(spec(name, image=image), start=False)),
            ("vm-launch", lambda inn: inn.create(spec(name, image=image), ready=False)),
            *((f"vm-{action}", lambda inn, a=action: inn.vm(name).act(a)) for action in ("start", "pause", "resume")),
            ("vm-delete", lambda inn: inn.vm(name).act("delete", force=force)),
            # No guest is here that would shut down when asked.
            *(
                (f"vm-{action}", lambda inn, a=action: inn.vm(name).act(a, force=True))
                for action in ("restart", "stop")
            ),
            ("vm-update", update),
            ("image-import", lambda inn: inn.image_import(disk_image(), name="base", format="raw")),
            ("image-build", lambda inn: inn.image_build("tiny", name="base", replace=True)),
            ("image-delete", lambda inn: inn.image_delete("base")),
        ]
    )


def calm(house: House) -> None:
    """Let what goes on come to its end, in a daemon without faults; deletions that failed are finished by it."""
    if not house.dead:
        house.kill()
    house.start()
    house.settle()
    house.check()


def walk(house: House, seed: int, seconds: float) -> int:
    chance, steps = random.Random(seed), []
    deadline, count = time.monotonic() + seconds, 0
    house.start()
    try:
        while time.monotonic() < deadline:
            count += 1
            asked = [wishes(chance) for _ in range(chance.randrange(1, 6))]
            fault = chance.choice(FAULTS[chance.choice(asked)[0]]) if chance.random() < 0.6 else ""
            if fault:
                house.end()
                house.start(fault)
            for kind, wish in asked:
                steps.append((fault, kind))
                if chance.random() < 0.15:
                    for victim in list(house.qemus())[:1]:
                        steps.append(("SIGKILL", "QEMU"))
                        os.kill(victim.number, signal.SIGKILL)
                if chance.random() < 0.15:
                    steps.append(("SIGKILL", "in the middle"))
                    with_kill(house, wish, chance.random() * 0.3)
                else:
                    with suppress(ApiError, IndexError):  # not admitted as things are, or nothing to change
                        attempt(house, wish)
                if house.dead:
                    break
            calm(house)
        house.empty()
    except BaseException:
        print(f"seed {seed}, after {count} rounds:", *steps[-12:], sep="\n")
        raise
    return count


def with_kill(house: House, wish, seconds: float) -> None:
    """Ask, and kill the daemon a moment later, wherever it is then."""
    with suppress(ApiError, IndexError, DaemonUnreachable):
        wish(house.inn)
        time.sleep(seconds)
    house.end()


@pytest.mark.parametrize("seconds", [25, pytest.param(600, marks=[pytest.mark.slow, pytest.mark.timeout(1200)])])
def test_random_walk(seconds):
    house = House()
    try:
        rounds = walk(house, int(os.environ.get("INNKEEPER_SEED") or random.randrange(1 << 32)), seconds)
        assert rounds
    finally:
        house.clean()
