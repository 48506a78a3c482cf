"""The rules of VMs, with real guests and packets: what passes, what does not, and what is told of it."""

import ipaddress
import os
import subprocess
import sys
import time

import pytest
from conftest import running_daemon
from inside import begin, sh
from namespaces import host_beside, namespace, run

from innkeeper.client.errors import ApiError
from innkeeper.client.wishes import vm_spec

pytestmark = [pytest.mark.guest, pytest.mark.skipif(os.geteuid() != 0, reason="networks are made by root")]
YES, NO = 20, 2
"""Seconds for an answer that should come, and for one that should not."""
# Guests have Perl without modules. They answer TCP and UDP on a port, IPv4 and IPv6.
SERVER = """
for my $port (@ARGV) {{
  unless (fork) {{
    socket(my $l, 10, 1, 0); setsockopt($l, 41, 26, pack("i", 0)); setsockopt($l, 1, 2, pack("i", 1));
    bind($l, pack("S n N a16 N", 10, $port, 0, "", 0)) or die $!; listen($l, 100);
    while (accept(my $c, $l)) {{ syswrite $c, "tcp"; close $c }}
  }}
  unless (fork) {{
    socket(my $u, 10, 2, 0); setsockopt($u, 41, 26, pack("i", 0));
    bind($u, pack("S n N a16 N", 10, $port, 0, "", 0)) or die $!;
    while (my $from = recv($u, my $said, 100, 0)) {{ send($u, "udp", 0, $from) }}
  }}
}}
1 while wait > 0;
""".replace("{{", "{").replace("}}", "}")
CLIENT = """
my ($kind, $port, $seconds, @hex) = @ARGV;
sub answer {
  my $six = length $_[0] == 32; my $to = pack("H*", $_[0]);
  socket(my $s, $six ? 10 : 2, $kind eq "udp" ? 2 : 1, 0);
  my $where = $six ? pack("S n N a16 N", 10, $port, 0, $to, 0) : pack("S n a4 x8", 2, $port, $to);
  my $heard = "";
  $SIG{ALRM} = sub { die }; alarm $seconds;
  eval { connect($s, $where) or die } or return "-";
  for (1 .. $seconds) {
    send($s, "hello", 0) if $kind eq "udp";
    alarm($kind eq "udp" ? 1 : $seconds);
    eval { sysread($s, $heard, 100) }; last if $heard;
  }
  return $heard || "-";
}
my @asked;
for my $hex (@hex) { open(my $said, "-|") // die $! or do { print answer($hex); exit }; push @asked, $said }
print join " ", map { readline $_ } @asked;
"""
"""Asks all addresses at once; their answers in that order, `-` for none."""
OUTSIDE_CLIENT = """
import socket, sys
address, port, seconds = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
try:
    with socket.create_connection((address, port), seconds) as line:
        print(line.recv(10).decode(), end="")
except OSError:
    print("-", end="")
"""
LISTENER = """
import socket, sys
with socket.create_server(("::", int(sys.argv[1])), family=socket.AF_INET6, dualstack_ipv6=True) as server:
    while True:
        line, _ = server.accept()
        line.sendall(b"tcp")
        line.close()
"""


@pytest.fixture(scope="module")
def outside():
    with namespace("out") as name:
        yield name


@pytest.fixture(scope="module")
def host(outside):
    with host_beside(outside) as name:
        run(outside, "ip", "route", "add", "10.77.0.0/16", "via", "192.0.2.1")
        run(outside, "ip", "addr", "add", "10.77.0.3/32", "dev", "lo")  # somebody outside who says to be `db`
        listening = ["nsenter", f"--net=/run/netns/{name}", sys.executable, "-c", LISTENER]
        with subprocess.Popen([*listening, "8000"]) as one, subprocess.Popen([*listening, "9000"]) as other:
            yield name
            one.kill()
            other.kill()


@pytest.fixture(scope="module")
def lab(host):
    """A daemon with nat networks `lab` and `other`, and forks of one guest: `web` and `db` in lab, `far` in other."""
    with running_daemon("tiny", namespace=host) as daemon:
        for name in ("lab", "other"):
            daemon.inn.network_create(name).wait()
        daemon.inn.warm("tiny", vm_spec("w", "tiny", memory="192M", disk="8M", cpus=1, network="lab"), name="w").wait()
        for name, network in (("web", "lab"), ("db", "lab"), ("far", "other")):
            begin(daemon.inn.fork("w", name=name, network=network), f"perl -e '{SERVER}' 22 80 53")
        daemon.at = {name: addresses(daemon.inn.vm(name)) for name in ("web", "db", "far")}
        assert daemon.at["db"][0] == "10.77.0.3"
        yield daemon
        for name in ("web", "db", "far"):
            daemon.inn.vm(name).delete(force=True)


def addresses(vm):
    (card,) = vm.nics
    deadline = time.monotonic() + 60
    while "tentative" in (said := sh(vm, "ip addr show eth0")) or card["address6"] not in said:
        assert time.monotonic() < deadline, said
        time.sleep(0.3)
    return card["address"], card["address6"]


@pytest.fixture
def web(lab):
    """The guest whose rules are tried; it has none again afterwards."""
    vm = lab.inn.vm("web")
    yield vm
    for _ in vm.firewall.overview()["rules"]:
        vm.firewall.remove(1).wait()
    for direction in ("in", "out"):
        vm.firewall.default(direction, "allow").wait()


def reaches(lab, who, whom, port, *, kind="tcp", seconds=YES):
    """Whether a guest reaches another one, by both versions of IP, which must agree."""
    asked = lab.at[whom] if isinstance(whom, str) else whom
    packed = [ipaddress.ip_address(address).packed.hex() for address in asked]
    said = lab.inn.vm(who).exec(["perl", "-e", CLIENT, kind, str(port), str(seconds), *packed]).stdout.decode().split()
    assert set(said) in ({kind}, {"-"}) and len(said) == len(asked), (asked, said)
    return said[0] == kind


def kept_from(*who, **what):
    return not reaches(*who, **what, seconds=NO)


def from_outside(where, address, port, *more):
    inside = ["nsenter", f"--net=/run/netns/{where}", sys.executable, "-c", OUTSIDE_CLIENT, address, str(port), str(NO)]
    return subprocess.run([*inside, *more], capture_output=True, text=True).stdout == "tcp"


def test_what_comes_in(lab, host, outside, web):
    assert reaches(lab, "db", "web", 80) and reaches(lab, "db", "web", 53, kind="udp")
    web.publish("8080:80").wait()
    done = web.firewall.default("in", "deny").wait()
    assert "inn ssh" in done.result["warnings"][0]
    assert kept_from(lab, "db", "web", 22) and kept_from(lab, "db", "web", 53, kind="udp")
    assert not from_outside(host, lab.at["web"][0], 22)
    # what is published is let in, and what answers the guest
    assert from_outside(outside, "192.0.2.1", 8080) and reaches(lab, "db", "web", 80)
    web.unpublish(8080).wait()
    assert kept_from(lab, "db", "web", 80)
    assert reaches(lab, "web", "db", 80) and reaches(lab, "web", "db", 53, kind="udp")
    sh(web, "ping -c 1 -W 20 db.inn")

    web.firewall.allow("in", "tcp", ["20-30", "80"], peer="vm:db", note="the database").wait()
    assert reaches(lab, "db", "web", 22) and reaches(lab, "db", "web", 80)
    assert not from_outside(host, lab.at["web"][0], 22)
    web.firewall.allow("in", "tcp", ["22"], peer="host").wait()
    assert from_outside(host, lab.at["web"][0], 22) and not from_outside(host, lab.at["web"][0], 80)
    web.firewall.deny("in", peer="vm:db", at=1).wait()
    assert kept_from(lab, "db", "web", 22)
    what_was_denied_reads_like_sentences(lab, web)


def what_was_denied_reads_like_sentences(lab, web):
    shown = web.firewall.overview()
    assert [rule["action"] for rule in shown["rules"]] == ["deny", "allow", "allow"]
    assert shown["rules"][0]["packets"] >= 2 and shown["rules"][0]["bytes"] >= 80 and not shown["rules"][1]["packets"]
    denied = web.firewall.log()
    (ssh,) = [entry for entry in denied if (entry["peer"], entry["port"]) == (lab.at["db"][0], 22)]
    assert (ssh["name"], ssh["direction"], ssh["protocol"], ssh["rule"]) == ("db", "in", "tcp", 1)
    assert ssh["packets"] >= 2
    (of_host,) = [entry for entry in denied if entry["name"] == "host" and entry["port"] == 80]
    assert of_host["rule"] is None
    from innkeeper.cli.firewall import sentence

    assert sentence("web", ssh).startswith("db (10.77.0.3) was kept from TCP port 22 (ssh) of web: ")


def test_what_goes_out(lab, host, web):
    assert kept_from(lab, "web", ["192.0.2.1"], 8000)  # services of the host
    gateway = (lab.inn.network("lab")["gateway"], lab.inn.network("lab")["gateway6"])
    web.firewall.allow("out", "tcp", ["8000"], peer="host").wait()
    assert reaches(lab, "web", gateway, 8000) and kept_from(lab, "web", gateway, 9000)
    assert kept_from(lab, "db", gateway, 8000)

    web.firewall.default("out", "deny").wait()
    assert kept_from(lab, "web", "db", 80) and kept_from(lab, "web", "db", 53, kind="udp")
    assert web.exec(["nslookup", "db.inn"], timeout=30).status != 0
    assert reaches(lab, "db", "web", 80) and reaches(lab, "db", "web", 53, kind="udp")  # it answers
    assert reaches(lab, "web", gateway, 8000)
    web.firewall.allow("out", "udp", ["53"], peer="host").wait()
    web.firewall.allow("out", "icmp", peer="network:lab").wait()
    sh(web, "ping -c 1 -W 20 db.inn")
    sh(web, "udhcpc -n -q -i eth0 -s /bin/true 2>&1")
    assert {entry["direction"] for entry in web.firewall.log() if entry["port"] == 80} >= {"out"}


def test_what_the_mode_of_the_network_keeps_out_comes_in_by_a_rule(lab, outside, web):
    own = lab.at["web"][0]
    assert kept_from(lab, "far", "web", 80) and not from_outside(outside, own, 80)
    web.firewall.allow("in", "tcp", ["80"], peer="network:other").wait()
    assert reaches(lab, "far", "web", 80) and kept_from(lab, "far", "web", 22)
    assert kept_from(lab, "web", "far", 80)  # there is no rule of `far`
    web.firewall.allow("in", "tcp", ["22"], peer="192.0.2.0/24").wait()
    assert from_outside(outside, own, 22) and not from_outside(outside, own, 80)
    # `db` may, and nobody outside can say that this is who they are
    web.firewall.allow("in", "tcp", ["53"], peer="vm:db").wait()
    before = web.firewall.overview()["rules"][2]["packets"]
    syn = (
        "import socket,sys; s=socket.socket(); s.bind(('10.77.0.3', 0)); s.settimeout(3); s.connect((sys.argv[1], 53))"
    )
    done = subprocess.run(["nsenter", f"--net=/run/netns/{outside}", sys.executable, "-c", syn, own])
    assert done.returncode and web.firewall.overview()["rules"][2]["packets"] == before


def test_a_tag_is_who_has_it(lab, web):
    web.firewall.default("in", "deny").wait()
    web.firewall.allow("in", "tcp", ["80"], peer="tag:friend").wait()
    db = lab.inn.vm("db")
    assert kept_from(lab, "db", "web", 80)
    db.firewall.tag(add=["friend", "other"]).wait()
    assert reaches(lab, "db", "web", 80) and db.firewall.overview()["tags"] == ["friend", "other"]
    db.firewall.tag(remove=["friend", "other"]).wait()
    assert kept_from(lab, "db", "web", 80)
    with pytest.raises(ApiError, match="db has no tag friend"):
        db.firewall.tag(remove=["friend"])


def test_rules_outlive_the_daemon_and_come_back_when_somebody_flushes_them(lab, host, web):
    web.firewall.default("in", "deny").wait()
    lab.kill()
    assert not from_outside(host, lab.at["web"][0], 80)
    lab.start()
    assert not from_outside(host, lab.at["web"][0], 80)
    run(host, "nft", "flush", "ruleset")
    deadline = time.monotonic() + 60
    while "inn-" not in run(host, "nft", "list", "ruleset") or from_outside(host, lab.at["web"][0], 80):
        assert time.monotonic() < deadline
    web.firewall.default("in", "allow").wait()
    assert from_outside(host, lab.at["web"][0], 80)


def test_a_fork_has_the_rules_of_its_source_from_its_first_packet(lab, web):
    web.firewall.deny("in", "tcp", ["22"]).wait()
    with lab.inn.fork("web", name="twin") as twin:
        lab.at["twin"] = addresses(twin)
        assert twin.firewall.overview()["rules"][0]["action"] == "deny"
        assert kept_from(lab, "db", "twin", 22) and reaches(lab, "db", "twin", 80)


def test_a_manifest_brings_rules_to_a_vm_that_runs(lab, web):
    manifest = web.export()
    manifest["firewall"] = {"inbound": "deny", "rules": [{"direction": "in", "action": "allow", "protocol": "icmp"}]}
    answer = lab.inn.apply([manifest])
    for operation in answer["operations"]:
        lab.inn.operation(operation).wait()
    assert not web.info["pending"] and not answer["changes"][0]["note"]
    assert kept_from(lab, "db", "web", 80)
    sh(lab.inn.vm("db"), "ping -c 1 -W 20 web.inn")


def test_what_makes_no_sense_is_refused(lab, web):
    with pytest.raises(ApiError, match="there is no VM 'nobody'"):
        web.firewall.allow("in", peer="vm:nobody")
    with pytest.raises(ApiError, match="web has no rule 1"):
        web.firewall.remove(1)
    with pytest.raises(ApiError, match="70000"):
        web.firewall.allow("in", "tcp", ["70000"])
    lab.inn.create(vm_spec("alone", "tiny", memory="192M", disk="8M"), start=False).wait()
    with pytest.raises(ApiError, match="no card in a network"):
        lab.inn.vm("alone").firewall.default("in", "deny")
    lab.inn.vm("alone").delete()
