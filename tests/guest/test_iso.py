"""Rescue discs of Debian's packages boot, and the drive is told of truly. (tests/guest/test_install.py installs.)"""

import io
import time
from pathlib import Path

import pytest
from PIL import Image

from innkeeper.client.errors import ApiError

pytestmark = pytest.mark.guest

GRUB = Path("/usr/lib/grub-rescue/grub-rescue-cdrom.iso")
MEMTEST = Path("/usr/lib/memtest86+/memtest86+x64.iso")
GREY, BLUE = (168, 168, 168), (0, 0, 168)
"""VGA's text colours 7 and 1."""
SECONDS = 120


def needs(disc: Path, package: str):
    return pytest.mark.skipif(not disc.exists(), reason=f"{disc} is not there: apt install {package}")


@pytest.fixture
def booted(daemon):
    """Boot a disc, with an empty disk behind it."""
    made = []

    def boot(name, disc):
        vm = daemon.inn.launch(None, name=name, memory="128M", disk="1G", iso=disc)
        made.append(vm)
        return vm

    yield boot
    for vm in made:
        vm.delete(force=True)


def screen(vm) -> Image.Image:
    return Image.open(io.BytesIO(vm.screenshot())).convert("RGB")


def shows(vm, wanted) -> Image.Image:
    """The first screen that `wanted` is true for."""
    deadline = time.monotonic() + SECONDS
    while not wanted(picture := screen(vm)):
        assert time.monotonic() < deadline, f"{vm.name} never showed it; its screen now: {colours(picture)}"
        time.sleep(0.3)
    return picture


def colours(picture: Image.Image) -> dict[tuple[int, int, int], int]:
    """Each colour on the screen, with its number of pixels."""
    return {colour: count for count, colour in picture.getcolors(1 << 24)}


def has_menu(picture: Image.Image) -> bool:
    """Some row of text (16 pixels high) is highlighted over nearly its whole width: an entry of GRUB's menu."""
    width, height = picture.size
    rows = (picture.crop((0, top, width, top + 16)) for top in range(0, height, 16))
    return any(colours(row).get(GREY, 0) > width * 16 * 0.8 for row in rows)


@needs(GRUB, "grub-rescue-pc")
def test_grub_rescue_shows_its_menu(booted):
    vm = booted("grub", GRUB)
    assert vm.info["disc"] == str(GRUB)
    menu = shows(vm, has_menu)
    assert colours(menu)[0, 0, 0] > 100_000  # the rest of the menu is text on black
    shows(vm, lambda picture: picture.tobytes() != menu.tobytes())  # the seconds to its first entry go down


@needs(MEMTEST, "memtest86+")
def test_memtest_runs(booted):
    vm = booted("memtest", MEMTEST)
    first = shows(vm, lambda picture: colours(picture).get(BLUE, 0) > 150_000)
    shows(vm, lambda picture: picture.tobytes() != first.tobytes())  # its clock and its bars move
    assert vm.info["disc"] == str(MEMTEST)


@needs(GRUB, "grub-rescue-pc")
def test_a_disc_stays_in_until_its_guest_has_restarted(booted):
    """Stopped from outside, the guest was not done with it."""
    vm = booted("unfinished", GRUB)
    shows(vm, has_menu)
    vm.stop(force=True)
    assert vm.info["disc"] == str(GRUB)
    vm.start()
    shows(vm, has_menu)


@needs(GRUB, "grub-rescue-pc")
def test_a_disc_that_is_gone_is_named(booted, tmp_path):
    disc = tmp_path / "rescue.iso"
    disc.write_bytes(GRUB.read_bytes())
    disc.chmod(0o600)  # the daemon opens it, not QEMU's own user
    vm = booted("lost", disc)
    vm.stop(force=True)
    disc.unlink()
    with pytest.raises(ApiError) as caught:
        vm.start()
    assert caught.value.code == "invalid-input" and str(disc) in caught.value.detail
    assert vm.state == "stopped"


def test_what_is_no_disc_is_refused(daemon, tmp_path):
    with pytest.raises(ApiError) as caught:
        daemon.inn.launch(None, name="nodisc", memory="128M", disk="1G", iso=tmp_path)
    assert str(tmp_path) in caught.value.detail
    assert "nodisc" not in [vm["name"] for vm in daemon.inn.vms()]
