"""Who reaches whom, as the tables of docs/networks.md say: guests in networks of every mode, a host and an outside that
are network namespaces. The host's way out is what the bridged network has taken in."""

import ipaddress
import json
import os
import re
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from conftest import running_daemon
from namespaces import namespace, run

from innkeeper.client.wishes import vm_spec

pytestmark = [pytest.mark.guest, pytest.mark.skipif(os.geteuid() != 0, reason="networks are made by root")]
DOCS = Path(__file__).parents[2] / "docs/networks.md"
MODES = ("nat", "host-only", "internal", "bridged")
WHERE = ("host", "same network", "other network", "outside")
TO, FROM = "A guest reaches", "A guest is reached from"
HOST = ("192.0.2.1", "2001:db8::1")
OUTSIDE = ("192.0.2.2", "2001:db8::2")
PORT, YES, NO = 7000, 30, 4
"""Seconds for an answer that should come, and for one that should not."""

SERVER = f"""
import socket
with socket.create_server(("::", {PORT}), family=socket.AF_INET6, dualstack_ipv6=True, backlog=100) as server:
    while True:
        connection, who = server.accept()
        connection.sendall(who[0].encode())
        connection.close()
"""
CLIENT = f"""
import socket, sys
from concurrent.futures import ThreadPoolExecutor
def ask(target):
    address, seconds = target.split("/")
    try:
        with socket.create_connection((address, {PORT}), timeout=int(seconds)) as connection:
            return connection.recv(100).decode()
    except OSError:
        return "-"
with ThreadPoolExecutor(100) as pool:
    print(*pool.map(ask, sys.argv[1:]))
"""
# The same for guests, whose Perl has no modules.
GUEST_SERVER = f"""
socket(my $l, 10, 1, 0); setsockopt($l, 41, 26, pack("i", 0)); setsockopt($l, 1, 2, pack("i", 1));
bind($l, pack("S n N a16 N", 10, {PORT}, 0, "", 0)) or die $!; listen($l, 100);
while (accept(my $c, $l)) {{ syswrite $c, unpack("H*", getpeername $c); close $c }}
"""
GUEST_CLIENT = f"""
$| = 1;
for my $n (0 .. $#ARGV) {{
  fork and next;
  my ($hex, $seconds) = split "/", $ARGV[$n];
  $SIG{{ALRM}} = sub {{ print "$n -\\n"; exit }};
  alarm $seconds;
  my $six = length $hex == 32;
  socket(my $s, $six ? 10 : 2, 1, 0);
  my $to = pack("H*", $hex);
  my $ok = connect($s, $six ? pack("S n N a16 N", 10, {PORT}, 0, $to, 0) : pack("S n a4 x8", 2, {PORT}, $to));
  my $heard = "-";
  sysread($s, $heard, 100) or $heard = "-" if $ok;
  print "$n $heard\\n"; exit;
}}
1 while wait > 0;
"""


def table(title):
    """A table of the documentation: (mode, where) → what its cell says."""
    text = DOCS.read_text().split(f"**{title}**")[1]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in re.findall(r"^\|.*\|$", text, re.M)]
    heads = tuple(rows[0][1:])
    cells = {}
    for row in rows[2 : 2 + len(MODES)]:
        cells |= {(row[0], where): cell for where, cell in zip(heads, row[1:], strict=True)}
    return cells


SAID = {direction: table(direction) for direction in (TO, FROM)}


def test_the_tables_are_whole():
    for cells in SAID.values():
        assert set(cells) == {(mode, where) for mode in MODES for where in WHERE}
        assert set(cells.values()) <= {"yes", "no", "ping"}


@pytest.fixture(scope="module")
def outside():
    """The network outside, with a router that also gives addresses, and knows ways back to our networks."""
    with namespace("out") as name:
        yield name


@pytest.fixture(scope="module")
def host(outside, tmp_path_factory):
    with namespace("host") as name:
        run(name, "ip", "link", "add", "eth0", "type", "veth", "peer", "name", "eth0", "netns", outside)
        for where, addresses in ((name, HOST), (outside, OUTSIDE)):
            run(where, "ip", "addr", "add", f"{addresses[0]}/24", "dev", "eth0")
            run(where, "ip", "addr", "add", f"{addresses[1]}/64", "dev", "eth0", "nodad")
            run(where, "ip", "link", "set", "eth0", "up")
        run(name, "sysctl", "-qw", "net.ipv6.conf.eth0.accept_ra=0")  # it has its addresses
        for address in OUTSIDE:
            run(name, "ip", "route", "add", "default", "via", address)
        run(outside, "ip", "route", "add", "10.77.0.0/16", "via", HOST[0])
        run(outside, "ip", "route", "add", "fd00::/8", "via", HOST[1])
        run(outside, "sysctl", "-qw", "net.ipv4.ip_forward=1", "net.ipv6.conf.all.forwarding=1")
        leases = tmp_path_factory.mktemp("outside") / "leases"
        giving = [
            "dnsmasq", "--keep-in-foreground", "--conf-file=/dev/null", "--port=0", "--pid-file=", "--interface=eth0",
            "--user=root", "--log-facility=-", "--dhcp-range=192.0.2.100,192.0.2.150", "--enable-ra",
            "--dhcp-range=2001:db8::,ra-only,64", f"--dhcp-leasefile={leases}",
        ]  # fmt: skip
        serving = [sys.executable, "-c", SERVER]
        with in_namespace(outside, *giving), in_namespace(outside, *serving), in_namespace(name, *serving):
            eventually(lambda: "tentative" not in run(name, "ip", "addr"))
            yield name


class in_namespace(subprocess.Popen):
    """A program that ends with the block."""

    def __init__(self, where, *command):
        super().__init__(["nsenter", f"--net=/run/netns/{where}", *command], stderr=subprocess.DEVNULL)

    def __exit__(self, *failure):
        self.kill()
        super().__exit__(*failure)


def state_of(host):
    """What must be as before when all networks are gone."""
    looks = ("link", "addr", "route", "-6 route")
    found = {look: json.loads(run(host, "ip", "-j", *look.split())) for look in looks}
    for link in (*found["link"], *found["addr"]):
        link.pop("stats64", None)
    return found, run(host, "nft", "list", "ruleset")


@pytest.fixture(scope="module")
def lab(host):
    """One guest in a network of each mode, one in another nat network, and `peer`, which has a card in each."""
    before = state_of(host)
    networks = {"nat": "default", "host-only": "cell", "internal": "vault", "bridged": "lan"}
    with running_daemon("tiny", namespace=host) as daemon:
        daemon.inn.network_create("cell", mode="host-only", mtu=1400).wait()
        daemon.inn.network_create("vault", mode="internal").wait()
        daemon.inn.network_create("lan", mode="bridged", parent="eth0").wait()
        daemon.inn.network_create("elsewhere").wait()
        small = {"image": "tiny", "memory": "192M", "disk": "8M", "cpus": 1}
        peer = vm_spec("peer", **small) | {"nics": [{"mode": "network", "network": name} for name in networks.values()]}
        bridged = vm_spec("bridged", **small, network="lan")  # its address is nobody's to tell a fork
        warming = daemon.inn.warm("tiny", vm_spec("warming", **small))
        alone = networks | {"other": "elsewhere"}
        for operation in [warming, *(daemon.inn.create(spec) for spec in (peer, bridged))]:
            operation.wait()
        for name in alone.keys() - {"bridged"}:
            daemon.inn.fork("tiny", name=name, network=alone[name])
        daemon.networks = networks
        yield daemon
        for name in (*alone, "peer"):
            daemon.inn.vm(name).delete(force=True)
        daemon.inn.image_delete("tiny-warm").wait()
        for name in ("default", "cell", "vault", "lan", "elsewhere"):
            daemon.inn.network_delete(name).wait()
        assert state_of(host) == before


def sh(lab, vm, script, *words):
    """What a script says in a guest, which must end well."""
    done = lab.inn.vm(vm).exec(["sh", "-c", script, "sh", *words])
    assert done.status == 0, done
    return done.stdout.decode()


def eventually(look):
    deadline = time.monotonic() + 60
    while not (found := look()):
        assert time.monotonic() < deadline
        time.sleep(0.3)
    return found


def addresses(lab, vm, card="eth0"):
    """(IPv4, IPv6) of a guest's card, as soon as it has both."""

    def look():
        said = sh(lab, vm, f"ip addr show {card}")
        four = re.search(r"inet ([0-9.]+)/", said)
        six = re.search(r"inet6 ([0-9a-f:]+)/64 scope global", said)
        return four and six and "tentative" not in said and (four[1], six[1])

    try:
        return eventually(look)
    except AssertionError:
        raise AssertionError(sh(lab, vm, "ip addr; ip route; cat /run/dhcp.log; true")) from None


def way(lab, vm, network):
    """A guest that tries: it takes the host for a router where nobody has told it to."""
    gateways = (network["gateway"], network["gateway6"]) if network["subnet"] else HOST
    for version, gateway, destination in ((4, gateways[0], "10.77.0.0/16"), (6, gateways[1], "fd00::/8")):
        sh(lab, vm, f"ip -{version} route replace {destination} via {gateway} dev eth0")
        if not network["subnet"]:
            continue
        sh(lab, vm, f"ip -{version} route show default | grep -q . || ip -{version} route add default via {gateway}")


@pytest.fixture(scope="module")
def reached(lab, host, outside):
    """(direction, mode, where, version) → the answer, which is the address that the asked one saw."""
    guests = (*lab.networks, "other", "peer")
    documents = {mode: lab.inn.network(name) for mode, name in lab.networks.items()}
    ask_for_it = "ip link set eth$n up; udhcpc -n -q -i eth$n -s /usr/lib/innkeeper/dhcp"
    sh(lab, "peer", f"for n in 1 2 3; do {ask_for_it}; done 2>&1")
    for vm in guests:
        sh(lab, vm, 'perl -e "$1" >/dev/null 2>&1 </dev/null &', GUEST_SERVER)
    own = {vm: addresses(lab, vm) for vm in (*lab.networks, "other")}
    of_peer = {mode: addresses(lab, "peer", f"eth{index}") for index, mode in enumerate(lab.networks)}
    for mode in MODES:
        way(lab, mode, documents[mode])
    way(lab, "other", lab.inn.network("elsewhere"))

    asked = {}  # who asks → what it asks for
    for mode in MODES:
        gateways = (documents[mode]["gateway"], documents[mode]["gateway6"]) if mode != "bridged" else HOST
        there = {"host": gateways, "same network": of_peer[mode], "other network": own["other"], "outside": OUTSIDE}
        origins = {"host": host, "same network": "peer", "other network": "other", "outside": outside}
        for where in WHERE:
            for at in (0, 1):
                asked.setdefault(mode, []).append(((TO, mode, where, at), there[where][at]))
                asked.setdefault(origins[where], []).append(((FROM, mode, where, at), own[mode][at]))

    def ask(who):
        seconds = [YES if SAID[key[0]][key[1:3]] == "yes" else NO for key, _ in asked[who]]
        targets = [address for _, address in asked[who]]
        if who in (host, outside):
            words = [f"{address}/{patience}" for address, patience in zip(targets, seconds, strict=True)]
            answers = run(who, sys.executable, "-c", CLIENT, *words).split()
        else:
            words = [f"{ipaddress.ip_address(a).packed.hex()}/{p}" for a, p in zip(targets, seconds, strict=True)]
            lines = sh(lab, who, 'perl -e "$@"', GUEST_CLIENT, *words).splitlines()
            answers = [text for _, text in sorted((int(n), text) for n, text in map(str.split, lines))]
        return dict(zip([key for key, _ in asked[who]], answers, strict=True))

    with ThreadPoolExecutor(4) as pool:
        return {key: answer for found in pool.map(ask, asked) for key, answer in found.items()}


def test_who_reaches_whom(reached, lab, host):
    """One test, so that six guests boot once and in one worker."""
    wrong = {key: answer for key, answer in reached.items() if (answer != "-") != (SAID[key[0]][key[1:3]] == "yes")}
    assert len(reached) == 2 * len(MODES) * len(WHERE) * 2 and not wrong
    who_may_ping_the_host(lab)
    the_outside_sees_the_hosts_address_of_nat_and_the_guests_own_of_bridged(reached, lab)
    guests_on_the_default_network_find_each_other_by_name(lab)
    the_address_that_the_outside_gave_is_shown(lab)
    the_mtu_comes_to_the_guest(lab, host)


def who_may_ping_the_host(lab):
    for mode in MODES:
        network = lab.inn.network(lab.networks[mode])
        at = (network["gateway"], network["gateway6"]) if network["subnet"] else HOST
        assert SAID[TO][mode, "host"] == "ping"
        for address in at:
            sh(lab, mode, f"ping -c 1 -W 20 {address}")


def the_outside_sees_the_hosts_address_of_nat_and_the_guests_own_of_bridged(reached, lab):
    assert [reached[TO, "nat", "outside", at].removeprefix("::ffff:") for at in (0, 1)] == list(HOST)
    seen = [reached[TO, "bridged", "outside", at].removeprefix("::ffff:") for at in (0, 1)]
    assert seen == list(addresses(lab, "bridged"))


def guests_on_the_default_network_find_each_other_by_name(lab):
    for version in (4, 6):
        sh(lab, "nat", f"ping -{version} -c 1 -W 20 peer.inn")


def the_address_that_the_outside_gave_is_shown(lab):
    address = addresses(lab, "bridged")[0]
    assert eventually(lambda: lab.inn.vm("bridged").info["address"]) == address
    cards = {card["name"]: card["address"] for card in lab.inn.network("lan")["cards"]}
    assert cards["bridged"] == address


def the_mtu_comes_to_the_guest(lab, host):
    network = lab.inn.network("cell")
    said = sh(
        lab, "host-only",
        "cat /proc/sys/net/ipv6/conf/eth0/mtu; printf '#!/bin/sh\\necho mtu=$mtu\\n' >/run/say; chmod +x /run/say;"
        " udhcpc -n -q -i eth0 -O mtu -s /run/say 2>/dev/null",
    )  # fmt: skip
    assert said.split()[0] == "1400"
    assert "mtu=1400" in said.split()
    links = json.loads(run(host, "ip", "-j", "link"))
    assert {link["mtu"] for link in links if network["bridge"] in (link["ifname"], link.get("master"))} == {1400}
