"""Guests on an interface of the host, with real macvtaps: a network namespace plays the host, another one the network
outside, with a DHCP server."""

import errno
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import running_daemon
from inside import ready
from namespaces import namespace, run

from innkeeper.client.errors import ApiError
from innkeeper.client.wishes import vm_spec

pytestmark = [pytest.mark.guest, pytest.mark.skipif(os.geteuid() != 0, reason="a macvtap is made by root")]
FRAME = """
perl -e 'socket(my $s, 17, 3, 0) or die "socket: $!";
open(my $f, "<", "/sys/class/net/" . $ARGV[0] . "/ifindex"); my $index = <$f>;
my $to = pack("S n i S C C a8", 17, 0x0800, $index, 0, 0, 6, "\\xff" x 6);
for my $hex (@ARGV[1 .. $#ARGV]) { send($s, pack("H*", $hex), 0, $to) or die "send: $!" }' """


@pytest.fixture(scope="module")
def outside(tmp_path_factory):
    with namespace("out") as name:
        yield name


@pytest.fixture(scope="module")
def host(outside, tmp_path_factory):
    leases = tmp_path_factory.mktemp("macvtap") / "leases"
    with namespace("host") as name:
        run(name, "ip", "link", "add", "eth0", "type", "veth", "peer", "name", "eth0", "netns", outside)
        for where, last in ((name, 1), (outside, 2)):
            run(where, "ip", "addr", "add", f"192.0.2.{last}/24", "dev", "eth0")
            run(where, "ip", "addr", "add", f"2001:db8::{last}/64", "dev", "eth0", "nodad")
            run(where, "ip", "link", "set", "eth0", "up")
        giving = [
            "dnsmasq", "--keep-in-foreground", "--conf-file=/dev/null", "--port=0", "--pid-file=", "--interface=eth0",
            "--user=root", "--dhcp-range=192.0.2.100,192.0.2.150", "--enable-ra", "--dhcp-range=2001:db8::,ra-only,64",
            f"--dhcp-leasefile={leases}",
        ]  # fmt: skip
        with subprocess.Popen(["nsenter", f"--net=/run/netns/{outside}", *giving], stderr=subprocess.DEVNULL) as server:
            yield name
            server.kill()


@pytest.fixture(scope="module")
def lab(host):
    """A daemon with two guests on eth0, `one` and `two`; at its end the host is as before."""
    before = of_host(host)
    with running_daemon("tiny", namespace=host) as daemon:
        specs = [vm_spec(name, "tiny", memory="256M", disk="8M", macvtap="eth0") for name in ("one", "two")]
        for operation in [daemon.inn.create(spec) for spec in specs]:
            assert "not this host" in operation.wait().result["warnings"][0]
        yield daemon
        for name in ("one", "two"):
            daemon.inn.vm(name).delete(force=True)
        assert of_host(host) == before


def of_host(host):
    links = re.findall(r"^\d+: (\S+?)[@:]", run(host, "ip", "link"), re.M)
    return links, run(host, "nft", "-j", "list", "tables", "netdev"), list(Path("/dev").glob("innm-*"))


def macvtaps(host):
    return sorted(name for name in of_host(host)[0] if name.startswith("innm-"))


def sh(daemon, vm, command):
    done = daemon.inn.vm(vm).exec(["sh", "-c", command + " 2>&1"])
    return done.status == 0, done.stdout.decode()


def eventually(look):
    deadline = time.monotonic() + 60
    while not (found := look()):
        if time.monotonic() > deadline:
            return found
        time.sleep(0.2)
    return found


def answers(where, address):
    """Whether its system says that nobody listens there."""
    ask = f"import socket\ntry: socket.create_connection(('{address}', 9), 20)\nexcept OSError as e: print(e.errno)"
    return run(where, sys.executable, "-c", ask).strip() == str(errno.ECONNREFUSED)


def address_of(daemon, vm):
    """The IPv4 address that `inn ls` shows, once there is one."""
    found = eventually(lambda: re.fullmatch(r"192\.0\.2\.\d+", str(daemon.inn.vm(vm).info["address"])))
    assert found, daemon.inn.vm(vm).info["address"]
    return found[0]


def test_a_guest_is_on_the_network_outside_and_not_on_the_hosts(lab, outside):
    addresses = {name: address_of(lab, name) for name in ("one", "two")}
    assert [card["address"] for card in lab.inn.vm("one").nics] == [addresses["one"]]
    assert answers(outside, addresses["one"])
    for reached in ("192.0.2.2", addresses["two"]):
        assert sh(lab, "one", f"ping -c 1 -W 10 {reached}")[0], reached
    assert eventually(lambda: "2001:db8:" in sh(lab, "one", "ip -6 addr show dev eth0 scope global")[1])
    assert eventually(lambda: sh(lab, "one", "ping -6 -c 1 -W 5 2001:db8::2")[0])
    assert not sh(lab, "one", "ping -c 1 -W 3 192.0.2.1")[0]
    with pytest.raises(ApiError, match="no network that this host can reach it by"):
        lab.inn.call("GET", "/vms/one/ssh")


def test_what_it_may_not_send_is_dropped_and_counted(lab, outside):
    (mac,) = [card["mac"].replace(":", "") for card in lab.inn.vm("one").nics]
    other = "5254000000aa"
    udp = "450000200000000040110000c0000209ffffffff"  # from 192.0.2.9
    frames = {
        "another MAC": f"ffffffffffff{other}0800{udp}00070007000c000061616161",
        "a DHCP server": f"ffffffffffff{mac}0800{udp}00430044000c000062626262",
        "a VLAN": f"ffffffffffff{mac}810000050800{udp}00070007000c000063636363",
        "a service VLAN": f"ffffffffffff{mac}88a800050800{udp}00070007000c000064646464",
        "ARP of another": f"ffffffffffff{mac}08060001080006040001{other}c0000209000000000000c000020365656565",
        "a router": f"333300000001{mac}86dd6000000000103aff{'fe80' + '0' * 27 + '1'}{'ff02' + '0' * 27 + '1'}"
        f"86000000{'66' * 12}",
    }
    good = f"ffffffffffff{mac}0800{udp}00070007000c00007a7a7a7a"
    sniff = [
        "nsenter", f"--net=/run/netns/{outside}", "timeout", "30", "python3", "-c",
        "import socket\ns = socket.socket(17, 3, socket.htons(3)); s.bind(('eth0', 3)); print('ready', flush=True)\n"
        "while True: print(s.recv(2000).hex(), flush=True)",
    ]  # fmt: skip
    with subprocess.Popen(sniff, stdout=subprocess.PIPE, text=True) as sniffer:
        assert sniffer.stdout.readline() == "ready\n"
        done, said = sh(lab, "one", FRAME + " ".join(["eth0", *frames.values(), good]))
        assert done, said
        heard = []
        for line in sniffer.stdout:
            heard.append(line)
            if "7a7a7a7a" in line:
                break
        sniffer.kill()
    marks = [f"{letter}" * 4 for letter in ("61", "62", "63", "64", "65", "66")]
    assert [mark for mark in marks if any(mark in line for line in heard)] == []
    assert "7a7a7a7a" in heard[-1]
    assert lab.inn.vm("one").nics[0]["dropped"] >= len(frames)


def test_rules_that_somebody_takes_away_are_put_back(lab, host):
    run(host, "nft", "flush", "ruleset")
    assert eventually(lambda: len(re.findall("table netdev innm-", run(host, "nft", "list", "tables"))) == 2)
    assert eventually(lambda: any("innm-" in event["text"] for event in lab.inn.events()))


def test_a_card_comes_and_goes_while_the_guest_runs(lab, host, outside):
    vm, there = lab.inn.vm("two"), macvtaps(host)
    assert "not this host" in vm.nic_add(macvtap="eth0", macvtap_mode="private").wait().result["warnings"][0]
    (new,) = set(macvtaps(host)) - set(there)
    assert "mode private" in run(host, "ip", "-d", "link", "show", new)
    assert vm.nics[1]["tap"] == new and vm.nics[1]["parent"] == "eth0"
    assert sh(lab, "two", "ip link set eth1 up && ip addr add 192.0.2.60/24 dev eth1")[0]
    assert answers(outside, "192.0.2.60")
    with pytest.raises(ApiError, match="of mode macvtap: its packets go past this host"):
        vm.publish("8080:80", nic=1)
    for link, carrier in (("down", "0"), ("up", "1")):
        vm.nic_set(1, link=link).wait()
        assert eventually(lambda want=carrier: sh(lab, "two", "cat /sys/class/net/eth1/carrier")[1].strip() == want)
    vm.nic_remove(1).wait()
    assert macvtaps(host) == there


@pytest.mark.parametrize("end", ["stop", "crash", "crash while no daemon looks"])
def test_a_macvtap_ends_with_its_qemu(lab, host, end):
    vm, (first, second) = lab.inn.vm("two"), macvtaps(host)
    name = vm.nics[0]["tap"]
    if end == "stop":
        vm.stop(force=True)
    else:
        pid = vm.info["pid"]
        if end != "crash":
            lab.kill()
        os.kill(pid, 9)
        if end != "crash":
            assert macvtaps(host) == [first, second]
            lab.start()
    assert eventually(lambda: name not in macvtaps(host)), macvtaps(host)
    assert name not in run(host, "nft", "list", "tables")
    assert len(macvtaps(host)) == 1
    vm.start()
    ready(vm)
    assert address_of(lab, "two")


def test_a_daemon_that_comes_back_leaves_those_that_run_as_they_are(lab, host):
    there = run(host, "ip", "link")
    lab.kill()
    lab.start()
    assert run(host, "ip", "link") == there
    assert sh(lab, "one", "ping -c 1 -W 10 192.0.2.2")[0]


def test_forks_are_refused_and_clones_get_macs_of_their_own(lab, host):
    with pytest.raises(ApiError, match="forks would go on with its address"):
        lab.inn.fork("one", name="other")
    lab.inn.vm("one").clone("other").wait()
    clone = lab.inn.vm("other")
    assert clone.info["spec"]["nics"][0]["parent"] == "eth0"
    assert clone.info["machine"]["macs"] != lab.inn.vm("one").info["machine"]["macs"]
    clone.delete()


def test_a_parent_that_cannot_be_one_is_refused(lab, host):
    run(host, "ip", "link", "add", "br0", "type", "bridge")
    run(host, "ip", "link", "add", "in-it", "type", "veth", "peer", "name", "its-peer")
    run(host, "ip", "link", "set", "in-it", "master", "br0")
    try:
        for parent, why in (("eth9", "no interface 'eth9'"), ("lo", "no Ethernet"), ("in-it", "in-it is in br0")):
            with pytest.raises(ApiError, match=why):
                lab.inn.vm("one").nic_add(macvtap=parent)
            with pytest.raises(ApiError, match=why):
                lab.inn.create(vm_spec("never", "tiny", macvtap=parent))
    finally:
        run(host, "ip", "link", "del", "br0")
        run(host, "ip", "link", "del", "in-it")


def test_a_parent_that_is_down_is_said(lab, host):
    assert lab.inn.network_doctor() == []
    run(host, "ip", "link", "set", "eth0", "down")
    try:
        (found,) = lab.inn.network_doctor()
        assert (found["code"], found["fix"]) == ("parent-down", ["ip link set eth0 up"])
    finally:
        run(host, "ip", "link", "set", "eth0", "up")


def test_a_parent_that_goes_takes_no_cpu_and_leaves_nothing(lab, host):
    """Last: the guests stay without their cards."""
    vm = lab.inn.vm("two")
    run(host, "ip", "link", "add", "usb0", "type", "veth", "peer", "name", "far")
    for link in ("usb0", "far"):
        run(host, "ip", "link", "set", link, "up")
    vm.nic_add(macvtap="usb0").wait()
    assert sh(lab, "two", "ip link set eth1 up && ip addr add 203.0.113.9/24 dev eth1")[0]
    run(host, "ip", "link", "del", "usb0")
    assert [found["code"] for found in lab.inn.network_doctor()] == ["parent-gone"]
    before = cpu(vm)
    sh(lab, "two", "ping -c 3 203.0.113.1; sleep 5")
    assert cpu(vm) - before < 4
    vm.nic_remove(1).wait()
    assert lab.inn.network_doctor() == []


def cpu(vm):
    """Seconds that its QEMU has computed."""
    fields = Path(f"/proc/{vm.info['pid']}/stat").read_text().rpartition(")")[2].split()
    return sum(map(int, fields[11:13])) / os.sysconf("SC_CLK_TCK")
