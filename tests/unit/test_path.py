"""The way of a probe, told from what was seen of it: where it ends, and why."""

from dataclasses import replace

import pytest

from innkeeper.plan.network import Nic, network_of, network_record
from innkeeper.plan.path import Seen, Way, hops
from innkeeper.spec.network import NetworkSpec

LAB = network_of(network_record("100000000001", NetworkSpec(name="lab"), "10.77.0.0/24", ""))
NIC = Nic("300000000003", "web", 0, LAB.id, "52:54:00:00:00:01", "10.77.0.2", None)
PACKET = "trace id 1a bridge innkeeper from-guests packet: iif inn-300000000-0"
KEPT = "tcp 6 9 SYN_SENT src=10.77.0.2 dst=192.0.2.2 sport=1 dport=80 {}src=192.0.2.2 dst={} sport=80 dport=1"
OPEN = Seen(
    NIC, LAB, "192.0.2.2", 80, "tcp",
    cards=(("lo", "", ("127.0.0.1/8",)), ("eth0", NIC.mac, ("10.77.0.2/24",))),
    target="192.0.2.2", route="192.0.2.2 via 10.77.0.1 dev eth0", outcome="open", frames=4, master=LAB.bridge,
    bridge_up=True, trace=(PACKET, "trace id 1a inet innkeeper forward policy accept"),
    way=Way("wan", "192.0.2.2", "192.0.2.1"), connection=KEPT.format("", "192.0.2.1"),
)  # fmt: skip
SILENT = replace(OPEN, outcome="silence", connection=KEPT.format("[UNREPLIED] ", "192.0.2.1"))


def test_a_way_to_its_end():
    way = hops(OPEN)
    assert [hop.name for hop in way] == [
        "guest",
        "guest's route",
        "tap",
        "bridge",
        "firewall",
        "route",
        "next hop",
        "NAT",
        "target",
    ]
    assert all(hop.passed for hop in way)


@pytest.mark.parametrize(
    ("seen", "name", "text"),
    [
        (replace(OPEN, cards=(("eth0", "52:54:00:00:00:99", ()),)), "guest", "no card with MAC 52:54:00:00:00:01"),
        (replace(OPEN, cards=(("eth0", NIC.mac, ("169.254.1.1/16",)),)), "guest", "not taken its address 10.77.0.2"),
        (replace(OPEN, target=None, wanted="nix.inn"), "name", "no address for nix.inn"),
        (replace(SILENT, route="RTNETLINK answers: Network is unreachable"), "guest's route", "there is none"),
        (replace(SILENT, frames=None), "tap", "QEMU has no such card"),
        (replace(SILENT, frames=0), "tap", "sent nothing"),
        (replace(SILENT, master=None), "bridge", "not connected"),
        (replace(SILENT, bridge_up=False), "bridge", "not connected"),
        (replace(SILENT, trace=(PACKET, "trace id 1a ip filter FORWARD policy drop")), "firewall",
         "another firewall drops it: table ip filter, chain FORWARD"),
        (replace(SILENT, trace=(PACKET, "trace id 1a inet innkeeper to-host rule drop (verdict drop)")), "firewall",
         "Innkeeper's own rules drop it: table inet innkeeper, chain to-host"),
        (replace(SILENT, trace=()), "firewall", "nobody answers the guest's ARP"),
        (replace(SILENT, way=None), "route", "no route to 192.0.2.2"),
        (replace(SILENT, way=Way("wan", "192.0.2.2", "", failed=True)), "next hop", "does not answer on wan"),
        (replace(SILENT, connection=KEPT.format("[UNREPLIED] ", "10.77.0.2")), "NAT", "the guest's own address"),
        (replace(OPEN, outcome="silence"), "answer", "dropped on its way to the guest"),
        (replace(OPEN, outcome="refused"), "target", "refuses"),
        (replace(SILENT, from_host="open"), "target", "does not answer"),
    ],
    ids=lambda value: value if isinstance(value, str) and len(value) < 15 else "",
)  # fmt: skip
def test_it_ends_where_something_is_in_its_way(seen, name, text):
    last = hops(seen)[-1]
    assert (last.name, last.passed) == (name, False) and text in last.text


def test_the_host_is_compared_with_the_guest():
    assert hops(replace(SILENT, from_host="open"))[-1].evidence == (
        "this host itself reaches 192.0.2.2:80, the guest does not",
    )


def test_within_its_network_it_meets_neither_route_nor_nat():
    assert [hop.name for hop in hops(replace(OPEN, target="10.77.0.3", wanted="10.77.0.3"))][-2:] == [
        "firewall",
        "target",
    ]


def test_without_an_agent_nothing_is_claimed():
    way = hops(
        replace(OPEN, agent="does not answer", cards=(), route="", outcome="unknown", frames=0, trace=(), connection="")
    )
    assert {hop.name: hop.passed for hop in way if hop.name in ("guest", "tap", "bridge", "firewall", "target")} == {
        "guest": None, "tap": None, "bridge": True, "firewall": None, "target": None,
    }  # fmt: skip


def test_over_udp_silence_means_nothing_and_an_answer_all():
    asked = replace(SILENT, protocol="udp", outcome="unknown")
    assert hops(asked)[-1].passed is None
    assert hops(replace(asked, connection=KEPT.format("", "192.0.2.1")))[-1].passed is True
