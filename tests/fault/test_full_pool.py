"""The pool becomes full in the middle of each verb that copies: nothing is lost, nothing is stuck, and with room again
it works. On a small file system of its own, which needs root.
"""

import os
from pathlib import Path

import pytest
from conftest import file_system
from house import House, attempt
from scenarios import SCENARIOS

pytestmark = [pytest.mark.guest, pytest.mark.root, pytest.mark.slow]

KINDS = ("snapshot-", "vm-clone", "vm-fork", "vm-delete, a linked", "template-")
FREE = (0, 100, 2100, 2500, 3500, 9000)
"""KiB that are left: less than any check lets pass, just enough for the checks, enough for some of it."""


def fill(pool: Path, free: int) -> Path:
    """A file that leaves so many KiB."""
    path = pool / "filler"
    with path.open("wb") as file:
        room = os.statvfs(pool)
        os.posix_fallocate(file.fileno(), 0, max(4096, room.f_bavail * room.f_frsize - (free << 10)))
    return path


@pytest.mark.parametrize("free", FREE)
@pytest.mark.parametrize("name", [name for name in SCENARIOS if name.startswith(KINDS)])
def test_a_full_pool_loses_nothing(name, free):
    scenario = SCENARIOS[name]
    with file_system("tmpfs", "300M") as pool:
        house = House(pool=pool)
        try:
            house.start()
            scenario.prepare(house)
            filler = fill(pool, free)
            operation = attempt(house, scenario.act)
            assert operation is not None and not house.dead
            house.settle()
            failed = operation.state == "failed"
            assert "crashed" not in {vm["state"] for vm in house.inn.vms()}, house.log()[-3000:]
            if failed:
                error = operation.error
                known = ("free and this needs", "No space left")
                assert error.code == "pool-full" or any(words in error.detail for words in known), error
            filler.unlink()
            house.check(deleting=name.startswith("vm-delete"))
            if failed:
                scenario.before(house)
                scenario.act(house.inn).wait()
                house.check()
            scenario.whole(house)
            house.empty()
        finally:
            house.clean()
