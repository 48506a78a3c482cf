"""The rules of many VMs: what a change of one VM's rules costs, and what a packet costs, with 10 VMs and with 1,000,
each of which has ten rules. In a network namespace of its own; needs root. No guest is booted: veths stand in for two
guests' taps, so the round trips are those of the bridge and the rules alone.

    .venv/bin/python bench/firewall.py [RUNS]

A change is all that a user waits for: `vm.firewall.default(…)`, from the API to the operation's end. A round trip
is UDP between two veths.
"""

from __future__ import annotations

import asyncio
import ipaddress
import os
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

from common import inside, median, records, running_daemon, say, timed
from namespaces import namespace, run

from innkeeper.network.fabric import Fabric
from innkeeper.plan.filter import filter_of
from innkeeper.plan.network import Network, Nic, Subnet, by_mac
from innkeeper.spec.firewall import FirewallSpec
from innkeeper.store.sqlite import SQLiteStore

RUNS = int(sys.argv[1]) if len(sys.argv) > 1 else 15
FEW, MANY, TRIPS = 10, 1000, 3000
LAB = Network("a" * 12, "lab", "nat", Subnet("10.77.0.0/20"), ipaddress.IPv6Network("fd00:77::/64"), "inn")


def spec(number: int) -> FirewallSpec:
    """Ten rules, of all kinds; none fits the packets of the round trips, which fall through to the default."""
    rules = [{"direction": "in", "action": "allow", "protocol": "tcp", "ports": [str(1000 + at)]} for at in range(4)]
    rules += [
        {"direction": "in", "action": "allow", "protocol": "tcp", "ports": ["22"], "peer": "tag:office"},
        {"direction": "in", "action": "deny", "peer": f"192.0.2.{number % 250}"},
        {"direction": "in", "action": "allow", "protocol": "tcp", "ports": ["5432"], "peer": f"vm:vm-{number + 1:05d}"},
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
    return Nic(vm, f"vm-{number:05d}", 0, LAB.id, mac, address, six, tags=tags, filter=judged)


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


async def trips() -> None:
    """The way of a packet through the rules of both guests, with nobody else there and with all."""
    found: dict[int, list[float]] = {}
    with (
        namespace("ours") as host, namespace("one") as one, namespace("other") as other,
        tempfile.TemporaryDirectory(prefix="inn-bench-") as folder, inside(host),
    ):  # fmt: skip
        fabric = Fabric(Path(folder), Path(folder))
        cards = [nic(number) for number in range(MANY)]
        try:
            await fabric.add(LAB)
            for card, guest in zip(cards[:2], (one, other), strict=True):
                plug(host, guest, card)
            at = (str(cards[0].address), str(cards[1].address))
            for count in (2, MANY):
                await fabric.begin([LAB], {card.vm: (card,) for card in cards[:count]})
                round_trip(one, other, at)  # neighbours are known from here on
                found[count] = [round_trip(one, other, at) for _ in range(RUNS)]
        finally:
            await fabric.remove(LAB)
    alone, all_of_them = median(found[2]), median(found[MANY])
    words = [f"{seconds * 1e6:.1f} µs" for seconds in (all_of_them, alone)]
    say(f"round trip between two guests, with {MANY} of them or alone", *words, all_of_them / alone, "at most 1.1")


def stopped(count: int) -> dict[str, dict]:
    """The documents of so many VMs in the network, as the daemon writes them, but with ids that differ from their
    beginning on, as real ones do."""
    documents = {}
    for key, value in records(count).items():
        vm_id = _id(value["id"])
        value["id"] = vm_id
        if key.startswith("vm/"):
            number = int(value["name"].removeprefix("vm-"))
            key = f"vm/{vm_id}"
            value["spec"]["nics"][0] |= {"mode": "network", "network": "lab"}
            value["spec"] |= {
                "firewall": spec(number).model_dump(mode="json"), "tags": ["office"] if number % 10 == 0 else [],
            }  # fmt: skip
            value["identity"] |= {"id": vm_id, "ssh_port": None}
        documents[key] = value
    return documents


def _id(number: str) -> str:
    return number[3:] + number[:3]


def change(count: int) -> float:
    """Seconds of one change, as a user sees it."""
    with namespace(f"of-{count}") as host, running_daemon(namespace=host) as daemon:
        daemon.inn.network_create("lab", subnet="10.77.0.0/20").wait()
        network = daemon.inn.network("lab")
        daemon.stop()
        documents, subnet = stopped(count), ipaddress.IPv4Network(network["subnet"])
        for number in range(1, count + 1):
            who = {"id": _id(f"{number:012x}"), "name": f"vm-{number:05d}", "nic": 0}
            documents[f"address/{network['id']}/{subnet[number + 1]}"] = who

        async def write() -> None:
            store = SQLiteStore(daemon.home.store)
            await store.transact(documents)
            await store.close()

        asyncio.run(write())
        daemon.start()
        firewall = daemon.inn.vm("vm-00002").firewall
        took = []
        for number in range(RUNS + 2):
            action = ("deny", "allow")[number % 2]
            took.append(timed(lambda action=action: firewall.default("out", action).wait()))
        return median(took[2:])


def main() -> None:
    version = subprocess.run(["nft", "--version"], capture_output=True, text=True).stdout.strip()
    print(f"{version}; {RUNS} runs, medians; load {os.getloadavg()[0]:.1f}")
    few, many = change(FEW), change(MANY)
    words = [f"{seconds * 1e3:.0f} ms" for seconds in (many, few)]
    say(f"changing one VM's rules, of {MANY} VMs or of {FEW}", *words, many / few, "at most 2")
    asyncio.run(trips())


if __name__ == "__main__":
    main()
