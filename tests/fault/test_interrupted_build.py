"""A real build, with its host programs, is killed, goes on, and is cancelled: nothing of it stays."""

import time

import pytest
from house import House

pytestmark = pytest.mark.guest


def tools(house: House, operation: str, wanted: bool) -> None:
    deadline = time.monotonic() + 60
    while bool(house.tools({operation})) != wanted:
        assert time.monotonic() < deadline, f"tools: {house.tools({operation})}\n{house.log()[-2000:]}"
        time.sleep(0.05)


def test_a_build_is_interrupted():
    house = House(real_builds=True)
    try:
        house.start()
        operation = house.inn.image_build("tiny")
        tools(house, operation.id, wanted=True)
        house.kill()
        tools(house, operation.id, wanted=False)  # they die with the daemon
        house.start()
        tools(house, operation.id, wanted=True)  # the build has begun anew
        assert not house.inn.images()
        operation = house.inn.operation(operation.id)
        assert operation.cancel().wait_quietly().state == "cancelled"
        house.check()
        assert not house.inn.images()
    finally:
        house.clean()
