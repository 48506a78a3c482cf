"""A program: two networks of ours in the network namespace that it runs in, without a daemon that heals them.

Each line on stdin asks for a look at the host, and is answered by a line with the findings as JSON. `fix` puts right
what is safe to before it looks; `crowd` gives out every address of the small network; `twins` one MAC address twice.
"""

import asyncio
import dataclasses
import json
import sys
from pathlib import Path

from innkeeper.network import links, survey
from innkeeper.network.fabric import Fabric
from innkeeper.plan.doctor import diagnose
from innkeeper.plan.network import Nic, by_mac, network_of, network_record
from innkeeper.plan.survey import Ours
from innkeeper.spec.network import NetworkSpec
from innkeeper.spec.nic import PortForward


def network(number, name, subnet, **more):
    spec = NetworkSpec(name=name, subnet=subnet, **more)
    return network_of(network_record(f"{number:012}", spec, subnet, "2026-01-01T00:00:00.000Z"))


def card(number, name, network, mac, publish=()):
    address = str(network.subnet[number + 1])
    return Nic(f"{number}{0:011}", name, 0, network.id, mac, address, str(by_mac(network.prefix, mac)), publish)


LAB, SMALL = network(100000000001, "lab", "10.77.0.0/24"), network(200000000002, "small", "10.78.0.0/29")
WEB = card(1, "web", LAB, "52:54:00:00:00:01", (PortForward(host=8080, guest=80, address="0.0.0.0"),))
CARDS = (WEB, card(2, "db", LAB, "52:54:00:00:00:02"))
TWIN = card(3, "twin", LAB, WEB.mac)
CROWD = tuple(card(number, f"one{number}", SMALL, f"52:54:00:00:01:0{number}") for number in range(1, 6))


async def look(fabric, nics):
    whole, without = await fabric.condition()
    taken = {each.id: sum(nic.network == each.id for nic in nics) for each in (LAB, SMALL)}
    ours = Ours((LAB, SMALL), nics, taken, whole, without)
    return diagnose(ours, await survey.survey(nics), ours.networks)


async def main(folder, resolv, devices):
    survey.RESOLV, links.DEVICES = Path(resolv), Path(devices)
    fabric = Fabric(Path(folder), Path(folder))
    for each in (LAB, SMALL):
        await fabric.add(each)
    for nic in CARDS:
        await fabric.set_vm(nic.vm, (nic,))
    print(json.dumps({"bridge": LAB.bridge, "gateway": LAB.gateway, "mac": WEB.mac}), flush=True)
    while order := (await asyncio.to_thread(sys.stdin.readline)).strip():
        if order == "fix":
            await fabric.heal(look_at_rules=True)
        nics = {"crowd": (*CARDS, *CROWD), "twins": (*CARDS, TWIN)}.get(order, CARDS)
        print(json.dumps([dataclasses.asdict(finding) for finding in await look(fabric, nics)]), flush=True)
    for each in (LAB, SMALL):
        await fabric.remove(each)


asyncio.run(main(*sys.argv[1:]))
