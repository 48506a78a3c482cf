"""A guest's whole life through the SDK, on a real daemon with real QEMU."""

import pytest

from innkeeper.client.errors import ApiError

pytestmark = pytest.mark.guest


def test_exec_passes_everything_through(guest):
    assert b"Linux" in guest.exec(["uname", "-a"]).stdout
    assert guest.exec(["cat"], stdin=b"hi\n\x00\xff").stdout == b"hi\n\x00\xff"
    result = guest.exec(["sh", "-c", "echo out; echo err >&2; exit 7"])
    assert (result.stdout, result.stderr, result.status) == (b"out\n", b"err\n", 7)


def test_files_go_in_and_out_unchanged(guest):
    data = bytes(range(256)) * 4096
    guest.write_file("/tmp/blob", data)
    assert guest.read_file("/tmp/blob") == data
    with pytest.raises(ApiError) as caught:
        guest.read_file("/tmp/none")
    assert "/tmp/none" in caught.value.detail


def test_pause_resume_and_what_is_refused(guest):
    guest.pause()
    assert guest.state == "paused"
    with pytest.raises(ApiError, match="paused"):
        guest.exec(["true"])
    assert guest.info["allowed_actions"]["resume"]["allowed"]
    guest.resume()
    assert guest.exec(["true"]).status == 0


def test_screenshot_and_log(guest):
    assert guest.screenshot().startswith(b"\x89PNG")
    assert b"shared" in b"".join(guest.logs())


def test_stop_start_restart_delete(daemon):
    vm = daemon.inn.launch("tiny", name="lifecycle", memory="256M", disk="1G")
    first = vm.info["pid"]
    vm.stop()
    assert (vm.state, vm.info["pid"]) == ("stopped", None)
    assert vm.stop().result == {}  # nothing to do, and no error
    vm.start()
    assert vm.state == "running" and vm.info["pid"] != first
    vm.restart(force=True)
    assert vm.state == "running"
    with pytest.raises(ApiError, match="running"):
        vm.delete()
    folder = daemon.home.vm(vm.info["id"])
    vm.delete(force=True)
    assert not folder.exists()
    assert "lifecycle" not in [v["name"] for v in daemon.inn.vms()]
    assert "lifecycle" not in daemon.qemus().values()
