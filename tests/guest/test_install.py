"""Debian installed for real: its netboot installer from a disc, with an answer file, onto an empty disk.

An administrator's first guest, whole: `inn launch --iso setup.iso`, then nothing, then a machine of one's own.
Takes most of an hour under software emulation.
"""

import os
import secrets
import shutil
import subprocess
import sys
import time
from contextlib import suppress

import pytest
from installer_disc import RELEASE, TOOLS, make_disc

from innkeeper.base.errors import InnkeeperError
from innkeeper.client.errors import ApiError

HOURS = 3
INN = [sys.executable, "-c", "import sys; from innkeeper.cli.main import main; sys.exit(main())"]

pytestmark = [pytest.mark.guest, pytest.mark.slow, pytest.mark.timeout(HOURS * 3600)]


def until(vm, true, minutes: float) -> None:
    """Wait; fail with what the guest printed last, and at once when the installer asks something."""
    deadline = time.monotonic() + minutes * 60
    while not true():
        printed = b"".join(vm.logs(tail=30)).decode(errors="replace")
        assert vm.state in ("running", "paused"), f"{vm.name} is {vm.state}:\n{printed}"
        asks = "Prompt: '?' for help" in printed or "[Press enter to continue]" in printed
        assert not asks, f"the installer asks what the preseed does not answer:\n{printed}"
        assert time.monotonic() < deadline, f"still not after {minutes} minutes:\n{printed}"
        time.sleep(2)


def answers(vm) -> bool:
    with suppress(ApiError):
        return vm.info["agent"] and vm.exec(["true"]).status == 0
    return False


@pytest.fixture
def disc(tmp_path):
    if missing := [tool for tool in TOOLS if not shutil.which(tool)]:
        pytest.skip(
            f"making an installer disc needs {', '.join(missing)}: apt install grub-common grub-pc-bin xorriso cpio"
        )
    try:
        return make_disc(tmp_path, hostname="setup", password=secrets.token_hex(16))
    except InnkeeperError as error:
        pytest.skip(f"{error.detail}: {error.hint}")


def test_debian_is_installed_from_a_disc(bare_daemon, disc):
    inn = bare_daemon.start().inn
    vm = inn.launch(None, name="setup", cpus=2, memory="1G", disk="8G", iso=disc)
    pid = vm.info["pid"]
    assert vm.info["disc"] == str(disc)

    until(vm, lambda: vm.info["disc"] is None, minutes=120)
    told = [event["kind"] for event in inn.events() if (event["target"] or {}).get("name") == "setup"]
    assert told.count("vm.ejected") == 1 and "vm.stopped" not in told
    disc.unlink()  # nobody needs it any more

    until(vm, lambda: answers(vm), minutes=20)
    assert vm.info["pid"] == pid  # the same QEMU: the guest restarted, no more
    env = os.environ | {"INNKEEPER_HOME": str(bare_daemon.home.data)}
    ran = subprocess.run([*INN, "exec", "setup", "--", "cat", "/etc/debian_version"], env=env, capture_output=True)
    assert (ran.returncode, ran.stderr) == (0, b"")
    assert ran.stdout.startswith(f"{RELEASE}.".encode())
    assert vm.exec(["hostname"]).stdout == b"setup\n"
    assert vm.exec(["findmnt", "-no", "SOURCE,FSTYPE", "/"]).stdout.split() == [b"/dev/vda1", b"ext4"]
    assert b"console=ttyS0" in vm.read_file("/proc/cmdline")
    assert vm.exec(["systemctl", "is-active", "ssh"]).stdout == b"active\n"

    vm.stop()  # by ACPI and the agent, without force
    assert vm.state == "stopped"
    vm.start()
    until(vm, lambda: answers(vm), minutes=20)
    assert b"setup login:" in b"".join(vm.logs())  # getty on the serial console
    vm.delete(force=True)
