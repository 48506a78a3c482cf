"""Findings and other programs' firewalls as pure functions of planted facts."""

from dataclasses import replace
from pathlib import Path

import pytest

from innkeeper.plan import doctor_parents
from innkeeper.plan.doctor import CHECKS, diagnose
from innkeeper.plan.network import network_of, network_record
from innkeeper.plan.rivals import drops, packet
from innkeeper.plan.survey import Link, Ours, Route, Survey
from innkeeper.spec.network import NetworkSpec

PAGE = Path(__file__).parents[2] / "docs/networks-doctor.md"
LAB = network_of(network_record("100000000001", NetworkSpec(name="lab"), "10.77.0.0/24", ""))
VAULT = network_of(network_record("200000000002", NetworkSpec(name="vault", mode="internal"), "10.78.0.0/24", ""))
HEALTHY = Survey(
    links={name: Link(name) for name in ("wan", LAB.bridge, VAULT.bridge)},
    routes=(Route("0.0.0.0/0", "wan", "192.0.2.2"), Route("::/0", "wan", "fe80::1"), Route("10.77.0.0/24", LAB.bridge)),
    sysctls={"ipv4/ip_forward": "1", "ipv6/conf/all/forwarding": "1", "ipv6/conf/wan/accept_ra": "2"},
    nameservers=("192.0.2.2", "127.0.0.53"),
)
OURS = Ours(networks=(LAB, VAULT))


def codes(survey=HEALTHY, ours=OURS, **more):
    return {finding.code: finding.networks for finding in diagnose(ours, survey, ours.networks, **more)}


def test_nothing_is_said_of_a_healthy_host():
    assert codes() == {}


def test_what_one_network_does_not_need_is_not_held_against_it():
    """An internal network needs no way out."""
    assert codes(Survey(links=HEALTHY.links), replace(OURS, networks=(VAULT,))) == {}


def test_a_table_of_connections_that_fills():
    assert codes(replace(HEALTHY, connections=(89, 100))) == {}
    assert codes(replace(HEALTHY, connections=(90, 100))) == {"conntrack-full": ("lab",)}


def test_a_bridged_network_on_wifi_is_known_by_its_parent():
    wlan = replace(HEALTHY, links=HEALTHY.links | {"wlan0": Link("wlan0", wireless=True)})
    assert codes(wlan) == {}
    assert codes(
        wlan,
        replace(
            OURS, networks=(replace(LAB, parent="wlan0", onto_bridge=True, mode="bridged", subnet=None, prefix=None),)
        ),
    ) == {"wireless-parent": ("lab",)}


def test_a_look_before_a_boot_leaves_out_what_takes_long():
    broken = replace(OURS, rules_whole=False, without_resolver=frozenset({LAB.id}))
    assert codes(ours=broken) == {"rules-gone": ("lab", "vault"), "dnsmasq-dead": ("lab",)}
    assert codes(ours=broken, quick=True) == {}


def chain(name, hook=None, policy=None, family="inet", table="theirs"):
    base = {"type": "filter", "hook": hook, "prio": 0, "policy": policy} if hook else {}
    return {"chain": {"family": family, "table": table, "name": name, **base}}


def rule(name, *expressions, handle=1, family="inet", table="theirs"):
    return {"rule": {"family": family, "table": table, "chain": name, "handle": handle, "expr": list(expressions)}}


def match(left, right, op="=="):
    kind, key = left.split()
    side = {kind: {"key": key}} if kind in ("meta", "ct") else {"payload": {"protocol": kind, "field": key}}
    return {"match": {"op": op, "left": side, "right": right}}


OUT = packet(4, "tcp", 443, iifname="innbr-1", oifname="wan", saddr="10.77.0.2", daddr="198.51.100.1")
FORWARD, DROP, ACCEPT = chain("f", "forward", "drop"), {"drop": None}, {"accept": None}


@pytest.mark.parametrize(
    ("rules", "where"),
    [
        ([FORWARD], ("f", None)),
        ([FORWARD, rule("f", match("meta iifname", "innbr-*"), ACCEPT)], None),
        ([FORWARD, rule("f", match("ip saddr", {"prefix": {"addr": "10.0.0.0", "len": 8}}), ACCEPT)], None),
        ([FORWARD, rule("f", match("ct state", ["established", "related"], "in"), ACCEPT)], ("f", None)),
        ([FORWARD, rule("f", match("tcp dport", {"set": [80, {"range": [440, 450]}]}), ACCEPT)], None),
        ([FORWARD, rule("f", {"xt": {"type": "match", "name": "conntrack"}}, ACCEPT)], ("f", None)),
        ([chain("f", "forward", "accept"), rule("f", match("meta oifname", "eth9", "!="), DROP, handle=7)], ("f", 7)),
        ([chain("f", "forward", "accept"), rule("f", {"limit": {"rate": 5}}, DROP)], None),
        ([chain("f", "input", "drop")], None),
        ([chain("f", "forward", "drop", "ip6")], None),
        ([FORWARD, chain("u"), rule("f", {"jump": {"target": "u"}}), rule("u", ACCEPT)], None),
        ([FORWARD, chain("u"), rule("f", {"jump": {"target": "u"}}), rule("u", {"return": None})], ("f", None)),
        (
            [FORWARD, chain("u"), rule("u", {"reject": None}, handle=9),
             rule("f", {"vmap": {"key": {"meta": {"key": "iifname"}},
                                 "data": {"set": [["eth0", ACCEPT], ["innbr-1", {"goto": {"target": "u"}}]]}}})],
            ("u", 9),
        ),
        (
            [FORWARD, {"set": {"family": "inet", "table": "theirs", "name": "good", "elem": ["wan"]}},
             rule("f", match("meta oifname", "@good"), ACCEPT)],
            None,
        ),
    ],
)  # fmt: skip
def test_a_packet_in_somebody_elses_chains(rules, where):
    found = [(drop.chain, drop.handle) for drop in drops(rules, OUT)]
    assert found == ([where] if where else [])


def test_the_page_has_every_finding():
    rows = [line.split("|")[1:-1] for line in PAGE.read_text().splitlines() if line.startswith("| `")]
    listed = {row[0].strip(" `"): (row[1].strip(), row[3].strip(), row[-1].strip()) for row in rows}
    of_networks = {check.code: (check.level, check.means, "yes" if check.safe else "") for check in CHECKS}
    assert listed == of_networks | {check.code: (check.level, check.means, "") for check in doctor_parents.CHECKS}


def test_an_interface_that_cards_are_on():
    vms = [
        {"name": name, "spec": {"nics": [{"mode": "user"}, {"mode": "macvtap", "parent": parent}]}}
        for name, parent in (("web", "eth0"), ("db", "eth1"), ("mail", "eth1"), ("dns", "eth2"))
    ]
    seen = Survey(links={"eth0": Link("eth0"), "eth1": Link("eth1", up=False)})
    found = doctor_parents.diagnose(doctor_parents.parents(vms), seen)
    assert [(finding.code, finding.what) for finding in found] == [
        ("parent-gone", "eth2 is not there, and cards of dns are on it"),
        ("parent-down", "eth1 is down, and cards of db, mail are on it"),
    ]
