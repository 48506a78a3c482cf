"""What a fork's guest is told. That it does it is seen in tests/guest/test_fork.py."""

import shlex
import shutil
import socket
import subprocess
from dataclasses import replace
from ipaddress import IPv4Address, IPv4Interface

import pytest

from innkeeper.plan.rebirth import (
    DONE,
    NAT,
    Place,
    Rebirth,
    before_capture,
    forms,
    shell_script,
    state_with,
    understood,
)
from innkeeper.plan.seed import HostKey
from innkeeper.plan.waiting import WAIT, Calls, calls

MACS = [("52:54:00:00:00:01", "52:54:00:00:00:02")]
WHO = Rebirth("web", "0" * 32, HostKey("PRIVATE'\nKEY\n", "ssh-ed25519 AAAA it's\n"), MACS, bytes(range(64)), 1.5)


@pytest.mark.parametrize("shell", ["dash", "bash", "busybox"])
def test_the_scripts_are_a_shell_s(shell):
    if not shutil.which(shell):
        pytest.skip(f"{shell} is not installed")
    command = [shell, "sh", "-n"] if shell == "busybox" else [shell, "-n"]
    scripts = [shell_script(replace(WHO, places={MACS[0][0]: place(gateway)})) for gateway in ("10.77.0.1", None)]
    for text in (shell_script(WHO), shell_script(replace(WHO, nics=[])), *scripts, before_capture([MACS[0][0]]), WAIT):
        done = subprocess.run(command, input=text.encode(), capture_output=True)
        assert (done.returncode, done.stderr) == (0, b"")


def test_what_waits_is_perl():
    done = subprocess.run(["perl", "-wc"], input=_program().encode(), capture_output=True)
    assert (done.returncode, done.stderr) == (0, b"- syntax OK\n")


def _program() -> str:
    (program,) = [word for word in shlex.split(WAIT) if "sub settle" in word]
    return program


OLDER = [
    "pool 3", "called 4", "name 5", "machine-id 6", "hosts 7 6120 0a62", "private 8", "public 9", "sshd 77",
    f"card 10 {b'eth0'.hex()} {MACS[0][0].encode().hex()}", f"card 10 {b'lo'.hex()} {b'00:00:00:00:00:00'.hex()}",
    f"naming 11 {f'mac: {MACS[0][0]}, 52:54:00:00:00:09'.encode().hex()}",
]  # fmt: skip
"""What waits in a guest that was captured by a version that told no sizes."""
SIZES = {"pool": 0, "called": 0, "name": 9, "machine-id": 33, "hosts": 20, "private": 3, "public": 100, "naming": 41}


def with_size(line: str) -> str:
    kind, file, *more = line.split(" ")
    return " ".join([kind, file, *([str(SIZES[kind]).encode().hex()] if kind in SIZES else []), *more])


TOLD = [with_size(line) for line in OLDER]


def records(message: bytes) -> list[tuple[int, int, int, bytes]]:
    """As the program in the guest reads them."""
    assert int(message[:8]) == len(message)
    found, at = [], 8
    while at < len(message):
        what, file, number, size = (int(message[at + a : at + b]) for a, b in ((0, 4), (4, 10), (10, 22), (22, 28)))
        found.append((what, file, number, message[at + 28 : at + 28 + size]))
        at += 28 + size
    return found


@pytest.mark.parametrize(
    ("told", "cut"),
    [
        (TOLD, [(5, 4), (9, 22), (7, 17)]),
        (OLDER, [(5, 0), (6, 0), (8, 0), (9, 0), (7, 0), (11, 0)]),
    ],
)
def test_what_waits_is_told_system_calls(told, cut):
    """A file is made shorter where it is longer; one of unknown size is emptied first."""
    found = records(calls(told, WHO).message())
    written = {file: data for what, file, number, data in found if what == 1 and number == len(data)}
    assert written == {
        4: b"web", 5: b"web\n", 6: b"0" * 32 + b"\n", 7: b"a 127.0.1.1 web\nb", 8: b"PRIVATE'\nKEY\n",
        9: b"ssh-ed25519 AAAA it's\n", 11: f"mac: {MACS[0][1]}, 52:54:00:00:00:09".encode(),
    }  # fmt: skip
    assert [(file, number) for what, file, number, _ in found if what == 77] == cut
    assert found[0] == (16, 3, 0x40085203, (512).to_bytes(4, "little") + (64).to_bytes(4, "little") + WHO.seed)
    (mac,) = [data for what, file, _, data in found if (what, file) == (16, 10)]
    assert mac == b"eth0".ljust(16, b"\0") + b"\1\0" + bytes.fromhex(MACS[0][1].replace(":", "")) + bytes(16)
    assert found[-2:] == [(227, 0, 0, bytes([1, *[0] * 7]) + (500_000_000).to_bytes(8, "little")), (62, 77, 1, b"")]


def test_what_a_guest_tells_that_makes_no_sense_is_left_out():
    nonsense = ["", "name", "name x", "name 5 xyz", "name 12345678", "card 10 aa", "naming 3", "NAME 5", "name 5;"]
    assert calls(nonsense, WHO).message() == calls([], WHO).message()


def test_a_card_may_be_called_by_a_number():
    (found,) = records(calls([f"card 10 {b'7'.hex()} {MACS[0][0].encode().hex()}"], WHO).message())[:1]
    assert found[:2] == (16, 10) and found[3].startswith(b"7\0")


def test_a_complaint_says_what_it_is_about():
    told = calls(["pool 3", "sshd 77"], WHO)
    assert told.answer(f"1 Bad file descriptor\n3 No such process\neth0: no\n9 what\n{DONE}\n") == (
        f"the random pool: Bad file descriptor\neth0: no\n9 what\n{DONE}\n"
    )


@pytest.mark.parametrize("text", [b"new\n\0" * 9000, b"new"])
@pytest.mark.parametrize("known", [True, False])
def test_what_waits_does_what_it_is_told(tmp_path, text, known):
    """On this host: a socket for a port, a file, and nothing that only a guest has."""
    ours, port = socket.socketpair()
    kept, before = tmp_path / "kept", b"what it was before, which is longer"
    kept.write_bytes(before)
    held = kept.open("r+" if known else "a+")
    loop = _program()
    loop = loop[loop.index("my ($text, $at, $call)") : loop.index("sleep;")]
    begin = f'my @said; sub settle {{ push @said, "@_: no\\n" }} open(my $port, "+<&=", {port.fileno()});\n{loop}'
    process = subprocess.Popen(["perl", "-we", begin], pass_fds=[port.fileno(), held.fileno()])
    told = Calls()
    told.put("the file", held.fileno(), len(before) if known else None, text)
    told.add("nothing", 1, 999, 1, b"x")
    told.add("", 62, 2**19, 0)
    told.add("", 0, 0, 0, b"eth0,1")
    ours.sendall(told.message())
    port.close()
    answer = ours.makefile().read()
    assert (process.wait(), told.answer(answer)) == (0, f"nothing: Bad file descriptor\neth0 1: no\n{DONE}\n")
    assert kept.read_bytes() == text


@pytest.mark.parametrize(("gateway", "way"), [("10.77.0.1", "0a4d0001"), (None, "")])
def test_a_place_in_a_network_is_told_in_a_form_that_needs_no_parser(gateway, way):
    found = records(calls(TOLD, replace(WHO, places={MACS[0][0]: place(gateway)})).message())
    settled = [data for what, _, _, data in found if what == 0]
    assert settled == [f"eth0,0a4d0005,ffffff00,{way},10.77.0.1,inn,1400".encode()]


def test_a_host_that_is_reached_otherwise_is_told_likewise():
    host, hop = IPv4Address("169.254.169.254"), IPv4Address("10.77.0.1")
    who = replace(WHO, places={MACS[0][0]: replace(place(None), mtu=None, routes=((host, hop),))})
    (settled,) = [data for what, _, _, data in records(calls(TOLD, who).message()) if what == 0]
    assert settled == b"eth0,0a4d0005,ffffff00,,10.77.0.1,inn,,a9fea9fe,0a4d0001"
    assert " routes=169.254.169.254,10.77.0.1;;" in shell_script(who)


KEEPS = "[Network]\nDHCP=no\nKeepConfiguration=static\n"
LAB = f"{KEEPS}Address=10.77.0.5/24\nGateway=10.77.0.1\nDNS=10.77.0.1\nDomains=inn\n[Link]\nMTUBytes=1400\n"
NATS = f"{KEEPS}Address=10.0.2.15/24\nGateway=10.0.2.2\nDNS=10.0.2.3\n"


@pytest.mark.parametrize(
    ("before", "place_now", "after", "moves"),
    [
        (NATS, "nat", NATS, False),
        (NATS, "lab", LAB, True),
        (LAB, "lab", LAB, False),
        (LAB, "nat", NATS, True),
        (NATS, None, "", True),
        ("", "lab", LAB, True),
    ],
)
def test_a_card_that_has_a_fixed_place_gets_its_new_one_so(before, place_now, after, moves):
    """systemd-networkd hears of it only where it is another one."""
    (old, new), now = MACS[0], {"nat": NAT, "lab": place("10.77.0.1")}.get(place_now)
    who = replace(WHO, places={old: now} if now else {})
    naming = "naming 11 " + f"# Innkeeper: {old}\n{before}".encode().hex()
    found = records(calls([*TOLD[:-1], naming], who).message())
    written = [data.decode() for what, file, _, data in found if (what, file) == (1, 11)]
    assert written == [f"# Innkeeper: {new}\n{after}"]
    assert [what for what, *_ in found if what == 2] == [2] * moves
    assert sum(what == 0 for what, *_ in found) == (now is not None and (moves or now is not NAT))


def test_another_file_is_not_taken_for_one_with_a_fixed_place():
    who = replace(WHO, places={MACS[0][0]: place("10.77.0.1")})
    assert not [what for what, *_ in records(calls(TOLD, who).message()) if what == 2]


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
