"""A VM's rules as values, as nftables' commands, and in the kernel: in a network namespace, without guests."""

import dataclasses
import ipaddress
import json
import os
import struct
import subprocess
from pathlib import Path

import pytest
from namespaces import namespace
from pydantic import ValidationError

from innkeeper.base.errors import InvalidInput, NotFound
from innkeeper.cli.commands import COMMANDS
from innkeeper.cli.firewall import sentence
from innkeeper.cli.table import find
from innkeeper.network.watch import NEW_GENERATION, generations
from innkeeper.operations.vm_firewall import remarks
from innkeeper.plan import filter, ruleset, sender
from innkeeper.plan.denials import Attempt, attempts, counted, reason
from innkeeper.plan.filter import filter_of, tagged, tags_changed, with_addresses
from innkeeper.plan.network import Network, Nic, Subnet, by_mac, nics_of
from innkeeper.plan.rules import with_change
from innkeeper.spec.firewall import AddRule, FirewallRule, FirewallSpec, RemoveRule, SetDefault, SetTags, port_range
from innkeeper.spec.nic import PortForward
from innkeeper.spec.vm import VMSpec

GOLDEN = Path(__file__).parents[1] / "golden" / "firewall.nft"


def network(letter, name, mode, subnet, *, ipv6=True):
    prefix = ipaddress.IPv6Network(f"fd00:{letter * 4}::/64") if ipv6 else None
    return Network(letter * 12, name, mode, Subnet(subnet), prefix, "inn")


LAB = network("a", "lab", "nat", "10.77.0.0/24")
OTHER = network("b", "other", "nat", "10.77.1.0/24")
CELL = network("c", "cell", "host-only", "10.77.2.0/24", ipv6=False)
LAN = Network("d" * 12, "lan", "bridged", None, None, "inn", "eth0")
NETWORKS = {each.name: each for each in (LAB, OTHER, CELL, LAN)}
RULES = FirewallSpec.model_validate(
    {
        "inbound": "deny",
        "outbound": "deny",
        "rules": [
            {"direction": "in", "action": "allow", "protocol": "tcp", "ports": ["22", "8000-8100"], "peer": "vm:db"},
            {"direction": "in", "action": "allow", "protocol": "icmp"},
            {"direction": "in", "action": "deny", "peer": "10.9.0.0/16"},
            {"direction": "in", "action": "allow", "protocol": "udp", "ports": ["53"], "peer": "tag:web"},
            {"direction": "out", "action": "allow", "protocol": "udp", "ports": ["53"], "peer": "host"},
            {"direction": "out", "action": "allow", "peer": "network:other"},
            {"direction": "out", "action": "allow", "peer": "fd00::1"},
        ],
    }
)


def nic(number, name, where, address, rules=None, **more):
    mac = f"52:54:00:00:00:{number:02x}"
    six = str(by_mac(where.prefix, mac)) if where.prefix else None
    judged = filter_of(rules, where, NETWORKS) if rules else None
    return Nic(f"{number:02}" * 6, name, 0, where.id, mac, address, six, filter=judged, **more)


WEB = nic(1, "web", LAB, "10.77.0.2", RULES, tags=("web",), publish=(PortForward(host=8080, guest=80, address="::"),))
DB = nic(2, "db", LAB, "10.77.0.3", tags=("web",), limit=8_000_000)
CAGED = nic(3, "caged", CELL, "10.77.2.2", RULES)
OUT = nic(4, "out", LAN, None, RULES)
ALL = (WEB, DB, CAGED, OUT)


def resolved(*nics):
    who = {}
    for each in nics:
        who[f"vm:{each.name}"] = who.get(f"vm:{each.name}", frozenset()) | frozenset(each.addresses)
    return [with_addresses(each, who) for each in nics]


def test_the_rules_are_the_pinned_ones():
    """One command per line: a changed line is a decision. INNKEEPER_UPDATE_GOLDEN=1 writes them anew."""
    lines = [json.dumps(command) for command in ruleset.everything(NETWORKS.values(), resolved(*ALL))]
    text = "".join(f"{line}\n" for line in lines)
    if os.environ.get("INNKEEPER_UPDATE_GOLDEN"):
        GOLDEN.write_text(text)
    assert GOLDEN.read_text() == text


class Kernel:
    """nftables of a namespace."""

    def __init__(self, where):
        self.where = where

    def nft(self, *words, feed=None):
        inside = ["nsenter", f"--net=/run/netns/{self.where}", "nft", "-j", *words]
        done = subprocess.run(inside, input=feed, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)["nftables"] if done.stdout else []

    def apply(self, commands):
        self.nft("-f", "-", feed=json.dumps({"nftables": commands}))

    def there(self):
        return ruleset.objects(
            [each for family, name in ruleset.TABLES for each in self.nft("list", "table", family, name)]
        )


@pytest.fixture(scope="module")
def kernel():
    if os.geteuid() != 0:
        pytest.skip("network namespaces are made by root")
    with namespace("rules") as where:
        yield Kernel(where)


def test_every_change_ends_with_what_would_have_been_made_anew(kernel):
    """From any of these hosts to any other: in one transaction, and nothing is left over."""
    bare = dataclasses.replace(WEB, filter=None, publish=(), tags=())
    strict = dataclasses.replace(WEB, filter=filter_of(FirewallSpec(inbound="deny"), LAB, NETWORKS))
    moved = dataclasses.replace(DB, address="10.77.0.9", limit=None)
    hosts = [(WEB, DB, CAGED, OUT), (strict, DB), (bare, DB, OUT), (WEB, moved, CAGED), (), (WEB, DB, CAGED, OUT)]
    before = ()
    kernel.apply(ruleset.everything(NETWORKS.values(), before))
    for after in hosts:
        old, new = ({each.tap: each for each in resolved(*nics)} for nics in (before, after))
        first, last = tags_changed(tagged(old.values()), tagged(new.values()))
        for tap in old.keys() | new.keys():
            if tap not in new:
                first += ruleset.nic_removed(old[tap])
            elif tap not in old:
                first += ruleset.nic_added(new[tap])
            else:
                first += ruleset.nic_changed(old[tap], new[tap])
        kernel.apply([*first, *last])
        assert kernel.there() == ruleset.objects(ruleset.everything(NETWORKS.values(), list(new.values())))
        before = after


def test_a_change_touches_nobody_else():
    other = dataclasses.replace(WEB, filter=filter_of(FirewallSpec(outbound="deny"), LAB, NETWORKS))
    (web,) = resolved(WEB)
    said = json.dumps(ruleset.nic_changed(web, other))
    assert WEB.tap in said and DB.tap not in said and CAGED.tap not in said
    assert ruleset.nic_changed(web, web) == []


def test_who_is_meant():
    spec = {"direction": "in", "action": "allow"}
    peers = {
        peer: filter_of(FirewallSpec(rules=(FirewallRule(**spec, peer=peer),)), LAB, NETWORKS).rules[0].peers
        for peer in ("any", "host", "network:lab", "network:other", "network:gone", "10.1.2.3", "tag:x")
    }
    words = {peer: None if found is None else [str(each) for each in found] for peer, found in peers.items()}
    assert words == {
        "any": None, "host": ["10.77.0.1/32", "fd00:aaaa::1/128"], "tag:x": ["tag:x"], "10.1.2.3": ["10.1.2.3/32"],
        "network:lab": ["10.77.0.0/24", "fd00:aaaa::/64", "fe80::/64"], "network:gone": [],
        "network:other": ["10.77.1.0/24", "fd00:bbbb::/64"],
    }  # fmt: skip
    assert filter_of(FirewallSpec(), LAB, NETWORKS) is None
    # whom a rule names that is not there is nobody, and not everybody
    nobody = filter_of(FirewallSpec(rules=(FirewallRule(**spec, peer="network:gone"),)), LAB, NETWORKS)
    assert filter._matches(nobody.rules[0]) == []
    assert tagged(resolved(WEB, DB, OUT))[filter.set_name("tag:web", 4)] == {"10.77.0.2", "10.77.0.3"}


def test_a_vms_document_becomes_cards_with_its_rules():
    vm = {
        "id": "01" * 6, "name": "web", "identity": {"macs": ["52:54:00:00:00:01"]},
        "spec": {
            "nics": [{"mode": "network", "network": "lab", "publish": [], "limit": None}], "tags": ["web"],
            "firewall": RULES.model_dump(mode="json"),
        },
    }  # fmt: skip
    (found,) = nics_of(vm, NETWORKS, {(LAB.id, 0): "10.77.0.2"})
    assert (found.filter, found.tags) == (WEB.filter, ("web",))
    del vm["spec"]["firewall"], vm["spec"]["tags"]  # of a VM that an older version made
    assert nics_of(vm, NETWORKS, {(LAB.id, 0): "10.77.0.2"})[0].filter is None


@pytest.mark.parametrize(
    ("rule", "words"),
    [
        ({"ports": ["80"]}, "ports are those of tcp or udp"),
        ({"protocol": "tcp", "ports": ["0"]}, "'0' is neither a port"),
        ({"protocol": "tcp", "ports": ["90-80"]}, "'90-80' is neither a port"),
        ({"protocol": "tcp", "ports": ["80", "70-90"]}, "port 80 is named twice"),
        ({"peer": "10.0.0.1/8"}, "host bits"),
        ({"peer": "vm:"}, "'' in 'vm:' is not a name"),
        ({"peer": "vm:a b"}, "'a b' in 'vm:a b' is not a name"),
        ({"peer": "someone"}, "neither an address nor a subnet"),
        ({"peer": 'x" } ; flush ruleset'}, "neither an address nor a subnet"),
    ],
)
def test_what_is_no_rule(rule, words):
    with pytest.raises(ValidationError, match=words.replace("'", "'")):
        FirewallRule.model_validate({"direction": "in", "action": "allow"} | rule)


def test_ports_and_addresses_are_written_in_one_way():
    assert port_range(" 80 ") == (80, 80) and port_range("1-65535") == (1, 65535)
    rule = FirewallRule(direction="in", action="deny", peer="fd00:0:0::1")
    assert (
        rule.peer == "fd00::1" and FirewallRule(direction="in", action="deny", peer="10.0.0.0/8").peer == "10.0.0.0/8"
    )


def test_rules_come_and_go_by_number():
    spec = VMSpec.model_validate({"name": "web", "disks": [{"size": "1G"}], "tags": ["b", "a", "b"]})
    one, two = (FirewallRule(direction="in", action=action) for action in ("allow", "deny"))
    spec = with_change(spec, AddRule(rule=one))
    spec = with_change(spec, AddRule(rule=two, at=1))
    assert spec.firewall.rules == (two, one)
    assert with_change(spec, RemoveRule(number=1)).firewall.rules == (one,)
    assert with_change(spec, SetDefault(direction="out", action="deny")).firewall.outbound == "deny"
    assert with_change(spec, SetTags(add=("c", "a"), remove=("b",))).tags == ("a", "c")
    with pytest.raises(NotFound, match="no rule 3"):
        with_change(spec, RemoveRule(number=3))
    with pytest.raises(InvalidInput, match="place 4"):
        with_change(spec, AddRule(rule=one, at=4))
    with pytest.raises(NotFound, match="no tag x"):
        with_change(spec, SetTags(remove=("x",)))


def test_what_was_denied_and_by_what():
    (web,) = resolved(WEB)
    members = tagged(resolved(*ALL))
    by = {
        Attempt("in", "tcp", "10.77.0.7", 22, 1, 0): None,
        Attempt("in", "tcp", "10.9.3.3", 443, 1, 0): 3,
        Attempt("in", "ipv6-icmp", "fd00::9", None, 1, 0): None,
        Attempt("in", "udp", "10.77.0.3", 53, 1, 0): None,  # rule 4 lets it in: it was denied by what was there before
        Attempt("out", "tcp", "10.9.3.3", 443, 1, 0): None,
    }
    assert {attempt: reason(web.filter, members, attempt) for attempt in by} == by


def test_what_nft_lists_is_read():
    elements = [
        {"elem": {"val": {"concat": [WEB.tap, "tcp", "10.9.0.1", "10.77.0.2", 22]}, "expires": filter.DENIED_FOR - 5,
                  "counter": {"packets": 3, "bytes": 180}}},
        {"elem": {"val": {"concat": [WEB.tap, "icmp", "10.9.0.1", "10.77.0.2", 2048]}, "expires": filter.DENIED_FOR,
                  "counter": {"packets": 1, "bytes": 84}}},
    ]  # fmt: skip
    listed = [{"metainfo": {}}, {"set": {"name": "denied-in4", "elem": elements}}, {"set": {"name": "denied-out4"}}]
    assert attempts(listed) == {
        WEB.tap: [Attempt("in", "icmp", "10.9.0.1", None, 1, 0.0), Attempt("in", "tcp", "10.9.0.1", 22, 3, 5.0)]
    }
    rules = [{"rule": {"comment": "rule 1", "expr": [{"counter": {"packets": n, "bytes": 10 * n}}]}} for n in (2, 3)]
    assert counted([*rules, {"rule": {"expr": [{"accept": None}]}}]) == {"rule 1": (5, 50)}
    refused = [{"set": {"elem": [{"elem": {"val": WEB.tap, "counter": {"packets": 7, "bytes": 1}}}]}}]
    assert sender.refused(refused) == {WEB.tap: 7}


def test_what_is_said_of_it():
    entry = {
        "direction": "in",
        "protocol": "tcp",
        "peer": "10.77.0.3",
        "name": "db",
        "port": 22,
        "packets": 1,
        "rule": 2,
    }
    assert sentence("web", entry) == "db (10.77.0.3) was kept from TCP port 22 (ssh) of web: 1 packet; rule 2"
    entry = entry | {
        "direction": "out",
        "protocol": "ipv6-icmp",
        "name": None,
        "port": None,
        "packets": 4,
        "rule": None,
    }
    assert (
        sentence("web", entry) == "web was kept from the ICMPv6 of 10.77.0.3: 4 packets; the default for what goes out"
    )
    vm = {"name": "web", "spec": {"nics": [{"mode": "network"}, {"mode": "user"}]}}
    said = remarks(vm, SetDefault(direction="in", action="deny"))
    assert "in tcp 22 --from host" in said[0] and "not for card 1" in said[1]


def test_news_of_others_is_told_from_our_own():
    def message(kind, *attributes):
        body = bytes(4) + b"".join(
            struct.pack("=HH", 8, number) + struct.pack(">I", value) for number, value in attributes
        )
        return struct.pack("=IHHII", 16 + len(body), kind, 0, 0, 0) + body

    data = message(10 << 8 | 6) + message(NEW_GENERATION, (1, 77), (2, 4242)) + message(NEW_GENERATION, (1, 78))
    assert list(generations(data)) == [4242, 0]
    for end in range(len(data)):  # cut off anywhere
        list(generations(data[:end]))


def test_the_vm_may_be_named_first():
    assert find(COMMANDS, ["firewall", "web", "ls"])[0].name == "firewall ls"
    command, words = find(COMMANDS, ["firewall", "web", "allow", "in", "tcp", "22"])
    assert (command.name, words) == ("firewall allow", ["web", "in", "tcp", "22"])
    assert find(COMMANDS, ["firewall", "ls", "rm"])[1] == ["rm"]  # a VM that is called so
