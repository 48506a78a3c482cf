"""Networks with real guests, in a network namespace that plays the host; another one plays the internet."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
from conftest import running_daemon
from namespaces import host_beside, namespace, programs, run

from innkeeper.client.errors import ApiError
from innkeeper.client.wishes import vm_spec

pytestmark = [pytest.mark.guest, pytest.mark.skipif(os.geteuid() != 0, reason="networks are made by root")]
SERVER = """
import http.server, socket
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
        self.wfile.write(self.client_address[0].removeprefix("::ffff:").encode())
http.server.HTTPServer.address_family = socket.AF_INET6
http.server.HTTPServer(("::", 80), Handler).serve_forever()
"""


def of_host(host):
    """What networks may change of a host, and must put back."""
    links = [link["ifname"] for link in json.loads(run(host, "ip", "-j", "link"))]
    routes = run(host, "ip", "-j", "route") + run(host, "ip", "-j", "-6", "route")
    sysctls = run(host, "sysctl", "net.ipv4.ip_forward", "net.ipv6.conf.all.forwarding")
    return links, routes, run(host, "nft", "-j", "list", "ruleset"), sysctls


@pytest.fixture(scope="module")
def internet():
    with namespace("net") as name:
        yield name


@pytest.fixture(scope="module")
def host(internet):
    """The namespace of the daemon, with a way to the internet."""
    with host_beside(internet) as name:
        yield name


@pytest.fixture(scope="module")
def lab(host):
    """A daemon with a nat network `lab` and two guests in it, `web` and `db`; at its end the host is as before."""
    before = of_host(host)
    with running_daemon("tiny", "tiny-net", namespace=host) as daemon:
        daemon.inn.network_create("lab").wait()
        specs = [vm_spec(name, "tiny-net", memory="256M", disk="8M", network="lab") for name in ("web", "db")]
        for operation in [daemon.inn.create(spec) for spec in specs]:
            operation.wait()
        yield daemon
        for name in ("web", "db"):
            daemon.inn.vm(name).delete(force=True)
        daemon.inn.network_delete("lab").wait()
        assert of_host(host) == before
        assert "dnsmasq" not in programs(host).values()


def sh(daemon, vm, command):
    """Whether a shell command ends well in a guest, and what it says."""
    done = daemon.inn.vm(vm).exec(["sh", "-c", command + " 2>&1"])
    return done.status == 0, done.stdout.decode()


def answers_ipv6(daemon, name):
    """Whether a guest has its IPv6 address: that comes some seconds after the IPv4 one, and its name means both."""
    addresses = sh(daemon, name, "ip -6 addr show eth0")[1]
    return "fe80" in addresses and "scope global" in addresses and "tentative" not in addresses


def test_guests_have_the_addresses_that_are_shown_and_find_each_other_by_name(lab):
    addresses = {vm["name"]: vm["address"] for vm in lab.inn.vms()}
    assert {card["name"]: card["address"] for card in lab.inn.network("lab")["cards"]} == addresses
    for name, address in addresses.items():
        assert f"inet {address}/24" in sh(lab, name, "ip -4 addr show eth0")[1]
    assert eventually(lambda: all(answers_ipv6(lab, name) for name in addresses))
    for other in ("db.inn", addresses["db"]):
        reached, said = sh(lab, "web", f"ping -c 1 -W 10 {other}")
        assert reached, said


def test_the_internet_sees_the_hosts_address_over_both_ip_versions(lab, internet):
    inside = ["nsenter", f"--net=/run/netns/{internet}", sys.executable, "-c", SERVER]
    with subprocess.Popen(inside, stderr=subprocess.DEVNULL) as server:
        try:
            assert eventually(lambda: ":80" in run(internet, "ss", "-ltn"))
            for target, seen in (("192.0.2.2", "192.0.2.1"), ("[2001:db8:2::2]", "2001:db8:2::1")):
                page = f"curl -sS -g -m 20 http://{target}/"
                assert eventually(lambda page=page, seen=seen: sh(lab, "web", page) == (True, seen)), sh(
                    lab, "web", page
                )
        finally:
            server.kill()


def test_a_card_with_a_limit_sends_and_receives_no_more_than_that(lab, host):
    web, db, limit = lab.inn.vm("web"), lab.inn.vm("db").info["address"], 10_000_000
    tap = web.nics[0]["tap"]
    sh(lab, "db", "iperf3 -s -D")

    def rate(*more):
        """Bits per second that came through TCP, of five seconds."""
        ended, said = sh(lab, "web", f"iperf3 -J -t 5 -c {db} {' '.join(more)}")
        assert ended, said
        return json.loads(said)["end"]["sum_received"]["bits_per_second"]

    def queue():
        return run(host, "tc", "qdisc", "show", "dev", tap)

    web.nic_set(0, limit="10mbit").wait()
    assert web.nics[0]["limit"] == limit
    assert limit * 0.3 < rate() < limit * 1.5
    assert limit * 0.3 < rate("-R") < limit * 1.5
    run(host, "tc", "qdisc", "del", "dev", tap, "root")
    assert eventually(lambda: "tbf" in queue())
    assert eventually(lambda: any("limit" in event["text"] for event in lab.inn.events()))
    lab.kill()
    run(host, "tc", "qdisc", "del", "dev", tap, "root")
    lab.start()
    assert "rate 10Mbit" in queue()
    assert "limit rate over" in run(host, "nft", "list", "table", "bridge", "innkeeper")
    web.nic_set(0, limit="none").wait()
    assert "tbf" not in queue() and web.nics[0]["limit"] is None
    assert "limit rate over" not in run(host, "nft", "list", "table", "bridge", "innkeeper")
    sh(lab, "db", "killall iperf3")


def test_an_address_that_is_not_its_own_gets_a_guest_nowhere(lab):
    db = lab.inn.vm("db").info["address"]
    assert sh(lab, "web", f"ip addr add 10.77.0.99/24 dev eth0; ping -c 1 -W 5 {db}")[0]
    assert not sh(lab, "web", f"ping -c 2 -W 3 -I 10.77.0.99 {db}")[0]
    assert sh(lab, "web", "ip addr del 10.77.0.99/24 dev eth0")[0]


def test_a_network_with_vms_in_it_stays(lab):
    with pytest.raises(ApiError, match="network lab is that of db, web"):
        lab.inn.network_delete("lab")


def eventually(look):
    deadline = time.monotonic() + 60
    while not look():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.2)
    return True


def no_dnsmasq(host):
    (pid,) = [pid for pid, name in programs(host).items() if name == "dnsmasq"]
    os.kill(pid, signal.SIGKILL)


@pytest.mark.parametrize(
    ("harm", "word"),
    [
        (lambda host, bridge: run(host, "nft", "flush", "ruleset"), "firewall"),
        (lambda host, bridge: run(host, "ip", "link", "del", bridge), "bridge"),
        (lambda host, bridge: no_dnsmasq(host), "dnsmasq"),
    ],
    ids=["rules", "bridge", "dnsmasq"],
)
def test_what_somebody_takes_away_is_put_back(lab, host, harm, word):
    seen = {event["seq"] for event in lab.inn.events()}
    harm(host, lab.inn.network("lab")["bridge"])

    def healed():
        return any(
            event["kind"] == "network.healed" and word in event["text"]
            for event in lab.inn.events()
            if event["seq"] not in seen
        )

    assert eventually(healed), list(lab.inn.events())[-5:]
    assert eventually(lambda: sh(lab, "web", "ping -c 1 -W 5 db.inn")[0])


def test_forks_and_clones_come_into_a_network_with_addresses_of_their_own(lab):
    spec = vm_spec("warming", "tiny", memory="256M", disk="8M", cpus=1)
    lab.inn.warm("tiny", spec).wait()
    assert lab.inn.image("tiny-warm")["warm"]["waits"]
    for operation in lab.inn.forks("tiny", ["one", "two"], network="lab"):
        operation.wait()
    lab.inn.fork("one", name="one-more")  # of a VM that is in the network
    lab.inn.fork("web", name="other")
    lab.inn.vm("db").clone("db-2").wait()
    names = ["one", "two", "one-more", "other", "db-2"]
    try:
        cards = {card["name"]: card["address"] for card in lab.inn.network("lab")["cards"]}
        assert len({cards[name] for name in names}) == len(names)
        for name in names[:-1]:
            mac = lab.inn.vm(name).info["machine"]["macs"][0]
            assert f"inet {cards[name]}/24" in sh(lab, name, "ip -4 addr show eth0")[1]
            assert "10.0.2" not in sh(lab, name, "ip addr; ip route; cat /etc/resolv.conf")[1]
            assert sh(lab, name, "cat /sys/class/net/eth0/address")[1].strip() == mac
            assert sh(lab, name, "ping -c 1 -W 10 web.inn && ping -c 1 -W 10 192.0.2.2")[0], name
        # What they say of themselves is all that the host heard of them: nothing under another's name.
        assert eventually(lambda: all(answers_ipv6(lab, name) for name in names[:4]))
        assert sh(lab, "web", "ping -c 1 -W 10 one.inn && ping -c 1 -W 10 one-more.inn")[0]
    finally:
        for name in reversed(names):
            lab.inn.vm(name).delete(force=True)
        lab.inn.image_delete("tiny-warm").wait()
    with pytest.raises(ApiError, match="no network"):
        lab.inn.forks("web", ["nowhere"], network="nowhere")


def test_a_restored_memory_is_of_a_guest_in_its_network(lab):
    vm = lab.inn.vm("db")
    address = vm.info["address"]
    vm.snapshots.create("then", memory=True).wait()
    vm.snapshots.restore("then", force=True).wait()
    assert vm.info["address"] == address
    assert sh(lab, "db", "ping -c 1 -W 10 web.inn")[0] and sh(lab, "web", f"ping -c 1 -W 10 {address}")[0]
    vm.snapshots.delete("then").wait()
    vm.snapshots.prune(automatic=True).wait()


def test_guests_stay_connected_while_the_daemon_is_away(lab):
    lab.kill()
    lab.start()
    assert sh(lab, "web", "ping -c 1 -W 10 db.inn")[0]
    assert lab.inn.network("lab")["state"] == "active"


def test_a_connection_is_followed_to_where_it_ends(lab, host):
    before = of_host(host)

    def check(*target):
        found = lab.inn.vm("web").network_check(*target)
        return found["reached"], found["hops"][-1]["name"], found["hops"][-1]["text"]

    assert check("10.77.0.1", 53) == (True, "target", "10.77.0.1:53 answers")
    assert check("db.inn", 81)[:2] == (False, "target")
    assert check("10.77.0.1", 22)[1:] == (
        "firewall",
        "Innkeeper's own rules drop it: table inet innkeeper, chain to-host",
    )
    assert check("nobody.inn", 80)[:2] == (False, "name")
    assert check("192.0.2.2", 81)[:2] == (False, "target")
    assert of_host(host) == before


def test_another_firewall_is_named_by_doctor_and_check_and_before_a_boot(lab, host):
    run(host, "ip", "route", "add", "default", "via", "192.0.2.2")
    run(host, "iptables", "-P", "FORWARD", "DROP")
    try:
        (found,) = [one for one in lab.inn.network_doctor("lab") if one["code"] == "foreign-firewall"]
        assert found["evidence"] == ["table ip filter, chain FORWARD: type filter hook forward; policy drop"]
        last = lab.inn.vm("web").network_check("192.0.2.2", 80)["hops"][-1]
        assert last["text"] == "another firewall drops it: table ip filter, chain FORWARD"
        spec = vm_spec("late", "tiny", memory="256M", disk="8M", network="lab")
        begun = lab.inn.create(spec, ready=False).wait()
        assert any("table ip filter, chain FORWARD" in text for text in begun.result["warnings"])
        lab.inn.vm("late").delete(force=True)
    finally:
        run(host, "nft", "delete", "table", "ip", "filter")
        run(host, "ip", "route", "del", "default")


def test_what_a_check_left_is_removed(lab, host):
    lab.kill()
    run(host, "nft", "add", "table", "bridge", "innkeeper-check-of-a-daemon-that-was-killed")
    lab.start()
    assert "innkeeper-check" not in run(host, "nft", "list", "tables")
