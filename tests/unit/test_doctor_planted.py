"""The doctor on a real host (a network namespace) with one fault planted after the other."""

import json
import os
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from namespaces import namespace, programs, run

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="networks are made by root")
DRIVER = Path(__file__).parents[1] / "examined_host.py"
FRAME = """
import socket
out = socket.socket(socket.AF_PACKET, socket.SOCK_RAW)
out.bind(("far", 0))
out.send(bytes.fromhex("ffffffffffffMAC88b5") + bytes(50))
"""
FRAMES = "net.bridge.bridge-nf-call-iptables"
LISTENER = "import socket; s = socket.create_server(('0.0.0.0', 8080)); print(flush=True); input()"


class Examined:
    """A healthy host with the networks `lab` and `small`."""

    def __init__(self, name, folder):
        self.name, self.folder = name, folder
        self.resolv, self.devices = folder / "resolv.conf", folder / "devices"
        self.devices.mkdir()
        self.resolv.write_text("nameserver 192.0.2.2\n")
        command = [
            "nsenter",
            f"--net=/run/netns/{name}",
            sys.executable,
            DRIVER,
            folder / "home",
            self.resolv,
            self.devices,
        ]
        (folder / "home").mkdir()
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.facts = json.loads(self.process.stdout.readline())
        self.bridge = self.facts["bridge"]

    def look(self, order="look"):
        self.process.stdin.write(f"{order}\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())

    def sh(self, *lines):
        for line in lines:
            run(self.name, "sh", "-ec", line)


@pytest.fixture(scope="module")
def examined(tmp_path_factory):
    folder = tmp_path_factory.mktemp("examined", numbered=True)
    for each in (folder, *folder.parents):  # dnsmasq's own user passes through
        if each != Path(each.anchor) and each.owner() == "root":
            each.chmod(each.stat().st_mode | 0o111)
    with namespace("examined") as name:
        for link, peer, address in (("wan", "net", "192.0.2.1/24"), ("wan2", "net2", "198.18.0.1/24")):
            run(name, "ip", "link", "add", link, "type", "veth", "peer", "name", peer)
            run(name, "ip", "addr", "add", address, "dev", link)
            for end in (link, peer):
                run(name, "ip", "link", "set", end, "up")
        run(name, "ip", "route", "add", "default", "via", "192.0.2.2")
        run(name, "ip", "-6", "route", "add", "default", "via", "fe80::1", "dev", "wan")
        run(name, "sysctl", "-qe", "-w", f"{FRAMES}=0")  # on by default where br_netfilter is loaded
        made = Examined(name, folder)
        deadline = time.monotonic() + 60
        while not all(f"{gateway}:53" in run(name, "ss", "-Hlun") for gateway in ("10.77.0.1", "10.78.0.1")):
            assert time.monotonic() < deadline, "a dnsmasq does not serve"
            time.sleep(0.05)
        before = made.look()
        assert before == [], before
        yield made
        made.process.communicate("\n", timeout=60)
        assert made.process.returncode == 0


@pytest.fixture
def host(examined):
    """Healthy before the test, as a daemon keeps it, and left so."""
    assert examined.look("fix") == []
    yield examined
    left = examined.look()
    assert left == [], left


def only(found, code, networks=("lab",)):
    """The first of what was found: nothing but this, for these networks."""
    assert {finding["code"] for finding in found} == {code}, found
    assert {name for finding in found for name in finding["networks"]} == set(networks)
    assert all(finding["evidence"] and finding["consequence"] and finding["fix"] for finding in found)
    return found[0]


def killed(pid):
    """It has ended for whoever waits for it, not only left its namespace."""
    pidfd = os.pidfd_open(pid)
    try:
        os.kill(pid, signal.SIGKILL)
        assert select.select([pidfd], [], [], 60)[0]
    finally:
        os.close(pidfd)


def test_put_right_what_is_our_own(host):
    """Each of these is found, and over with `fix`."""
    (dnsmasq, _) = [pid for pid, name in programs(host.name).items() if name == "dnsmasq"]
    faults = {
        "rules-gone": lambda: host.sh("nft flush ruleset"),
        "bridge-gone": lambda: host.sh(f"ip link del {host.bridge}"),
        "forwarding-off": lambda: host.sh("sysctl -qw net.ipv4.ip_forward=0"),
        "dnsmasq-dead": lambda: killed(dnsmasq),
    }
    for code, plant in faults.items():
        plant()
        found = [finding for finding in host.look() if finding["code"] == code]
        assert len(found) == 1 and found[0]["fixable"], (code, found)
        left = host.look("fix")
        assert left == [], (code, left)


DOCKER = (
    "iptables -P FORWARD DROP",
    "iptables -N DOCKER-USER && iptables -A DOCKER-USER -j RETURN",
    "iptables -A FORWARD -j DOCKER-USER",
    "iptables -A FORWARD -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT",
    "iptables -A FORWARD -o docker0 -j ACCEPT",
)


def test_a_forward_chain_of_docker_is_named_and_its_fix_ends_it(host):
    host.sh(*DOCKER)
    found = host.look()
    assert {finding["code"] for finding in found} == {"foreign-firewall"}
    assert "drops what its guests send out of network lab: table ip filter, chain FORWARD" in str(found)
    mine = next(finding for finding in found if finding["networks"] == ["lab"])
    assert mine["evidence"] == ["table ip filter, chain FORWARD: type filter hook forward; policy drop"]
    assert mine["fix"][0] == f"iptables -I DOCKER-USER -i {host.bridge} -j ACCEPT"
    host.sh(*(line for finding in found for line in finding["fix"]))
    assert host.look() == []
    host.sh("nft delete table ip filter")


def test_a_rule_of_another_table_is_named_with_its_words(host):
    host.sh(
        "nft add table inet strict",
        "nft 'add chain inet strict in { type filter hook input priority 10; policy drop; }'",
        "nft add rule inet strict in ct state established accept",
        "nft add rule inet strict in iifname lo accept",
        "nft add chain inet strict checks",
        "nft add rule inet strict in jump checks",
        "nft add rule inet strict checks meta l4proto udp udp dport 67 counter reject",
    )
    found = host.look()
    evidence = [line for finding in found for line in finding["evidence"]]
    assert any("chain checks: " in line and "udp dport 67 counter" in line for line in evidence), evidence
    assert any(line.endswith("chain in: type filter hook input; policy drop") for line in evidence), evidence
    host.sh(*(line for finding in found for line in finding["fix"]))
    assert host.look() == []
    host.sh("nft delete table inet strict")


def test_frames_within_a_network_that_another_firewall_sees(host):
    if subprocess.run(
        ["nsenter", f"--net=/run/netns/{host.name}", "sysctl", "-n", FRAMES], capture_output=True
    ).returncode:
        pytest.skip("this kernel has no br_netfilter")
    host.sh(*DOCKER, f"sysctl -qw {FRAMES}=1")
    found = [finding for finding in host.look() if finding["code"] == "bridge-netfilter"]
    assert {name for finding in found for name in finding["networks"]} == {"lab", "small"}
    assert found[0]["evidence"] == [f"{FRAMES} = 1"]
    host.sh(found[0]["fix"][0])
    assert "bridge-netfilter" not in str(host.look())
    host.sh("nft delete table ip filter")


BOTH = ("lab", "small")
FAULTS = {
    "no-uplink": (["ip route del default"], BOTH, "default", ["ip route add default via 192.0.2.2"]),
    "no-ipv6-uplink": (
        ["ip -6 route del default"], BOTH, "ip -6 route", ["ip -6 route add default via fe80::1 dev wan"],
    ),
    "mtu-mismatch": (["ip link set wan mtu 1400"], BOTH, "wan: mtu 1400", ["ip link set wan mtu 1500"]),
    "subnet-overlap": (
        ["ip tuntap add vpn mode tun && ip link set vpn up && ip route add 10.77.0.0/16 dev vpn"],
        ("lab",), "10.77.0.0/16 dev vpn", ["ip link del vpn"],
    ),
    "strict-rp-filter": (
        ["ip route add default via 198.18.0.2 metric 50", "sysctl -qw net.ipv4.conf.wan2.rp_filter=1"],
        BOTH, "net.ipv4.conf.wan2.rp_filter = 1",
        ["ip route del default via 198.18.0.2", "sysctl -qw net.ipv4.conf.wan2.rp_filter=0"],
    ),
    "ra-ignored": (
        ["sysctl -qw net.ipv6.conf.wan.accept_ra=1"], BOTH, "net.ipv6.conf.wan.accept_ra = 1",
        ["sysctl -qw net.ipv6.conf.wan.accept_ra=2"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("code", FAULTS)
def test_a_fault_is_found(host, code):
    plant, networks, evidence, mend = FAULTS[code]
    try:
        host.sh(*plant)
        found = only(host.look(), code, networks)
        assert evidence in str(found["evidence"])
    finally:
        host.sh(*mend)


def test_a_program_on_a_published_port_is_named(host):
    inside = ["nsenter", f"--net=/run/netns/{host.name}", sys.executable, "-c", LISTENER]
    with subprocess.Popen(inside, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as listener:
        listener.stdout.readline()
        found = only(host.look(), "port-taken")
        assert f"(pid {listener.pid}) listens on host port 8080/tcp, which is published for web" in found["what"]
        listener.communicate(b"\n")


def test_names_that_are_asked_for_in_a_circle_or_of_nobody(host):
    before = host.resolv.read_text()
    for server in (host.facts["gateway"], "127.0.0.1"):
        host.resolv.write_text(f"nameserver {server}\n")
        found = only(host.look(), "dns-loop", BOTH)
        assert found["evidence"] == [f"/etc/resolv.conf: nameserver {server}"]
    host.resolv.write_text(before)


def test_somebody_else_with_the_mac_of_a_guest(host):
    host.sh(
        f"ip link add near type veth peer name far && ip link set near master {host.bridge} up && ip link set far up"
    )
    assert host.look() == []
    run(host.name, sys.executable, "-c", FRAME.replace("MAC", host.facts["mac"].replace(":", "")))
    found = only(host.look(), "duplicate-mac")
    assert "behind near has the MAC address of web" in found["what"]
    host.sh("ip link del near")
    assert "web and twin have the same MAC address" in only(host.look("twins"), "duplicate-mac")["what"]


def test_a_bridge_on_wifi(host):
    """sysfs is a made-up one: no such card is here."""
    host.sh(f"ip link add wlan0 type veth peer name air && ip link set wlan0 master {host.bridge}")
    (host.devices / "wlan0/wireless").mkdir(parents=True)
    assert "bridged onto wlan0, which is Wi-Fi" in only(host.look(), "wireless-parent")["what"]
    host.sh("ip link del wlan0")


def test_a_network_that_is_full(host):
    found = only(host.look("crowd"), "addresses-low", ("small",))
    assert found["what"] == "network small has 0 of 5 addresses left"
