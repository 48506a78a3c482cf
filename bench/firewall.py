"""The rules of many VMs: what a change of one VM's rules costs, and what a packet costs, with 10 VMs and with 1,000,
each of which has ten rules. In a network namespace of its own; needs root. No guest is booted: veths stand in for two
guests' taps, so the round trips are those of the bridge and the rules alone.

    .venv/bin/python bench/firewall.py [RUNS]

A change is from the API's operation down to nftables: `rules` is what the daemon's part takes (network/fabric.py, one
transaction of nft), `operation` all of it, journal and HTTP included. A round trip is UDP between two veths that stand
in for two guests' taps, through the chains of both.
"""

from __future__ import annotations

import asyncio
import ctypes
import ipaddress
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from common import median, say, timed
from namespaces import namespace, run

from innkeeper.network import firewall
from innkeeper.network.fabric import Fabric
from innkeeper.plan.filter import filter_of
from innkeeper.plan.network import Network, Nic, Subnet, by_mac
from innkeeper.spec.firewall import FirewallSpec

RUNS = int(sys.argv[1]) if len(sys.argv) > 1 else 15
FEW, MANY, TRIPS = 10, 1000, 3000
CLONE_NEWNET = 0x40000000
LAB = Network("a" * 12, "lab", "nat", Subnet("10.77.0.0/20"), ipaddress.IPv6Network("fd00:77::/64"), "inn")


def spec(number: int) -> FirewallSpec:
    """Ten rules, of all kinds; none fits the packets of the round trips, which fall through to the default."""
    rules = [{"direction": "in", "action": "allow", "protocol": "tcp", "ports": [str(1000 + at)]} for at in range(4)]
    rules += [
        {"direction": "in", "action": "allow", "protocol": "tcp", "ports": ["22"], "peer": "tag:office"},
        {"direction": "in", "action": "deny", "peer": f"192.0.2.{number % 250}"},
        {"direction": "in", "action": "allow", "protocol": "tcp", "ports": ["5432"], "peer": f"vm:vm-{number + 1}"},
        {"direction": "out", "action": "deny", "protocol": "tcp", "ports": ["25"]},
        {"direction": "out", "action": "deny", "peer": "198.51.100.0/24"},
        {"direction": "out", "action": "allow", "protocol": "udp", "ports": ["53"], "peer": "host"},
    ]
    return FirewallSpec.model_validate({"rules": rules})


def nic(number: int) -> Nic:
    vm, mac = f"{number:09x}000", "52:54:01:" + ":".join(f"{number:06x}"[at : at + 2] for at in (0, 2, 4))
    address, six = str(LAB.subnet[number + 2]), str(by_mac(LAB.prefix, mac))
    tags = ("office",) if number % 10 == 0 else ()
    judged = filter_of(spec(number), LAB, {"lab": LAB})
    return Nic(vm, f"vm-{number}", 0, LAB.id, mac, address, six, (), False, tags, judged)


@contextmanager
def inside(name: str) -> Iterator[None]:
    """This thread lives in a namespace."""
    libc = ctypes.CDLL(None, use_errno=True)
    home, there = (os.open(path, os.O_RDONLY) for path in ("/proc/self/ns/net", f"/run/netns/{name}"))
    try:
        if libc.setns(there, CLONE_NEWNET):
            raise OSError(ctypes.get_errno(), f"setns {name}")
        yield
    finally:
        libc.setns(home, CLONE_NEWNET)
        os.close(home)
        os.close(there)


def plug(host: str, guest: str, card: Nic) -> None:
    """A veth where a guest's tap would be; its other end is in a namespace that has the guest's MAC and address."""
    run(host, "ip", "link", "add", card.tap, "type", "veth", "peer", "name", "eth0", "netns", guest)
    run(host, "ip", "link", "set", card.tap, "master", LAB.bridge, "up")
    run(guest, "ip", "link", "set", "eth0", "address", card.mac)
    run(guest, "ip", "addr", "add", f"{card.address}/20", "dev", "eth0")
    run(guest, "ip", "link", "set", "eth0", "up")


def round_trip(one: str, other: str, at: tuple[str, str]) -> float:
    """Seconds, the median of many."""
    with inside(other):
        there = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    with inside(one):
        here = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    there.bind((at[1], 7))
    here.connect((at[1], 7))
    here.settimeout(5)
    there.settimeout(5)

    def once() -> None:
        here.send(b"x")
        _, who = there.recvfrom(10)
        there.sendto(b"y", who)
        here.recv(10)

    with here, there:
        return median([timed(once) for _ in range(TRIPS)])


async def measure() -> None:
    found: dict[str, list[float]] = {}
    with (
        namespace("ours") as host, namespace("one") as one, namespace("other") as other,
        tempfile.TemporaryDirectory(prefix="inn-bench-") as folder, inside(host),
    ):  # fmt: skip
        fabric = Fabric(Path(folder), Path(folder))
        cards = [nic(number) for number in range(MANY)]
        try:
            await fabric.add(LAB)
            for card in cards[:2]:
                plug(host, one if card is cards[0] else other, card)
            at = (str(cards[0].address), str(cards[1].address))
            for count in (1, FEW, MANY):
                await fabric.begin([LAB], {card.vm: (card,) for card in cards[: max(count, 2)]})
                round_trip(one, other, at)  # neighbours are known from here on
                found[f"trip {count}"] = [round_trip(one, other, at) for _ in range(RUNS)]
                if count == 1:
                    continue
                changed = replace(
                    cards[1], filter=filter_of(FirewallSpec(inbound="allow", rules=spec(1).rules[1:]), LAB, {})
                )
                took = []
                for number in range(RUNS * 2):
                    begun = time.perf_counter()
                    await fabric.set_vm(cards[1].vm, (changed if number % 2 == 0 else cards[1],))
                    took.append(time.perf_counter() - begun)
                found[f"change {count}"] = took
            assert await firewall.is_whole(fabric._rules())
        finally:
            await fabric.remove(LAB)
    for what, limit in (("change", "at most 2"), ("trip", "at most 1.1")):
        few, many = (median(found[f"{what} {count}"]) for count in ((FEW if what == "change" else 1), MANY))
        name = {"change": "a change of one VM's rules, of", "trip": "a round trip between guests, of"}[what]
        unit, text = (1e3, "ms") if what == "change" else (1e6, "µs")
        say(
            f"{name} {MANY} VMs with 10 rules each",
            f"{many * unit:.1f} {text}",
            f"{few * unit:.1f} {text}",
            many / few,
            limit,
        )


if __name__ == "__main__":
    print(subprocess.run(["nft", "--version"], capture_output=True, text=True).stdout.strip(), f"{RUNS} runs, medians")
    asyncio.run(measure())
