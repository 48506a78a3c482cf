"""What a fork's guest is told. That it does it is seen in tests/guest/test_fork.py."""

import re
import shlex
import shutil
import subprocess
from dataclasses import replace
from ipaddress import IPv4Address, IPv4Interface

import pytest

from innkeeper.plan.rebirth import (
    DONE,
    PREPARE,
    WAIT,
    Place,
    Rebirth,
    forms,
    shell_script,
    state_with,
    understood,
    words,
)
from innkeeper.plan.seed import HostKey

MACS = [("52:54:00:00:00:01", "52:54:00:00:00:02")]
WHO = Rebirth("web", "0" * 32, HostKey("PRIVATE'\nKEY\n", "ssh-ed25519 AAAA it's\n"), MACS, bytes(range(64)), 1.5)


@pytest.mark.parametrize("shell", ["dash", "bash", "busybox"])
def test_the_scripts_are_a_shell_s(shell):
    if not shutil.which(shell):
        pytest.skip(f"{shell} is not installed")
    command = [shell, "sh", "-n"] if shell == "busybox" else [shell, "-n"]
    scripts = [shell_script(replace(WHO, places={MACS[0][0]: place(gateway)})) for gateway in ("10.77.0.1", None)]
    for text in (shell_script(WHO), shell_script(replace(WHO, nics=[])), *scripts, PREPARE, WAIT):
        done = subprocess.run(command, input=text.encode(), capture_output=True)
        assert (done.returncode, done.stderr) == (0, b"")


def test_what_waits_is_perl():
    (program,) = [word for word in shlex.split(WAIT) if "sub reborn" in word]
    done = subprocess.run(["perl", "-wc"], input=program.encode(), capture_output=True)
    assert (done.returncode, done.stderr) == (0, b"- syntax OK\n")


def test_words_are_pairs_without_blanks():
    told = words(WHO)
    assert told.endswith(f"\n{DONE}\n")
    pairs = dict(re.split("[ \n]", line) for line in told.removesuffix(f"{DONE}\n").splitlines())
    assert bytes.fromhex(pairs["private"]) == b"PRIVATE'\nKEY\n"
    assert (pairs["seconds"], pairs["microseconds"]) == ("1", "500000")
    assert pairs[MACS[0][0]] == MACS[0][1] and len(pairs) == 8


@pytest.mark.parametrize(("gateway", "way"), [("10.77.0.1", "0a4d0001"), (None, "")])
def test_a_place_in_a_network_is_told_in_a_form_that_needs_no_parser(gateway, way):
    told = words(replace(WHO, places={MACS[0][0]: place(gateway)}))
    assert f"{MACS[0][0]},place 0a4d0005,ffffff00,{way},10.77.0.1,inn,1400\n" in told


def test_a_host_that_is_reached_otherwise_is_told_likewise():
    host, hop = IPv4Address("169.254.169.254"), IPv4Address("10.77.0.1")
    who = replace(WHO, places={MACS[0][0]: replace(place(None), mtu=None, routes=((host, hop),))})
    assert f"{MACS[0][0]},place 0a4d0005,ffffff00,,10.77.0.1,inn,,a9fea9fe,0a4d0001\n" in words(who)
    assert " routes=169.254.169.254,10.77.0.1;;" in shell_script(who)


def place(gateway: str | None) -> Place:
    way = IPv4Address(gateway) if gateway else None
    return Place(IPv4Interface("10.77.0.5/24"), way, IPv4Address("10.77.0.1"), "inn", 1400)


def test_an_answer_is_understood():
    assert understood(f"{DONE}\n") == ([], [])
    assert understood(f"note: so\nwrong\n{DONE}\n") == (["so"], ["wrong"])
    assert understood("") == ([], ["it did not come to its end"])


def test_a_mac_address_is_exchanged_in_the_state_of_devices():
    old, new = (bytes.fromhex(mac.replace(":", "")) for mac in MACS[0])
    assert state_with(b"nic" + old + b"lease" + old, MACS) == b"nic" + new + b"lease" + new


def test_a_uuid_as_firmware_and_programs_write_it():
    binary, lower, upper = forms("00112233-4455-6677-8899-aabbccddeeff")
    assert binary.hex() == "33221100554477668899aabbccddeeff"
    assert lower == b"00112233-4455-6677-8899-aabbccddeeff" and upper == lower.upper()
