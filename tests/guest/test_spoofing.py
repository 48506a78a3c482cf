"""A guest with a raw socket claims to be who it is not: nothing of that arrives anywhere, and it is counted."""

import json
import os
import struct
import subprocess
import sys
from ipaddress import IPv4Address, IPv6Address, IPv6Network

import pytest
from conftest import running_daemon
from namespaces import namespace, run

from innkeeper.client.wishes import vm_spec
from innkeeper.plan.network import by_mac, tap_name

pytestmark = [pytest.mark.guest, pytest.mark.skipif(os.geteuid() != 0, reason="networks are made by root")]
SEND = r"""
open(my $i, "<", "/sys/class/net/eth0/ifindex"); my ($index) = <$i> =~ /(\d+)/;
socket(my $s, 17, 3, 0) or die "socket: $!";
while (<STDIN>) { chomp; send($s, pack("H*", $_), 0, pack("S n i S C C a8", 17, 0, $index, 0, 0, 6, "")) or die "$!" }
"""
SNIFF = """
import re, select, socket, sys
sockets = [socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(3)) for _ in sys.argv[1:]]
for each, device in zip(sockets, sys.argv[1:]):
    each.bind((device, 0))
print("ready", flush=True)
while True:
    for each in select.select(sockets, [], [])[0]:
        for mark in re.findall(rb"<(inn-[^>]+)>", each.recv(65536)):
            print(each.getsockname()[0], mark.decode(), flush=True)
"""
LOCAL = IPv6Network("fe80::/64")
BROADCAST, ALL_NODES, ANYBODY = "ff:ff:ff:ff:ff:ff", "33:33:00:00:00:01", "02:00:00:00:00:99"
IPV4, ARP, IPV6, VLAN, STAG = 0x0800, 0x0806, 0x86DD, 0x8100, 0x88A8
UDP, ICMPV6, HOP_BY_HOP, FRAGMENT, OPTIONS = 17, 58, 0, 44, 60
NOTHING = bytes([0, 1, 4, 0, 0, 0, 0])  # the rest of an extension header of 8 bytes that says nothing


def octets(mac):
    return bytes.fromhex(mac.replace(":", ""))


def ether(to, source, kind, payload):
    return octets(to) + octets(source) + struct.pack("!H", kind) + payload


def summed(data):
    """The Internet checksum (RFC 1071)."""
    data += bytes(len(data) % 2)
    total = sum(struct.unpack(f"!{len(data) // 2}H", data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return ~total & 0xFFFF


def udp(source_port, port, payload):
    return struct.pack("!HHHH", source_port, port, 8 + len(payload), 0) + payload


def ipv4(source, to, payload, protocol=UDP):
    head = struct.pack("!BBHHHBBH", 0x45, 0, 20 + len(payload), 0, 0, 64, protocol, 0)
    head += IPv4Address(source).packed + IPv4Address(to).packed
    return head[:10] + struct.pack("!H", summed(head)) + head[12:] + payload


def ipv6(source, to, payload, following=ICMPV6):
    head = struct.pack("!IHBB", 6 << 28, len(payload), following, 255)
    return head + IPv6Address(source).packed + IPv6Address(to).packed + payload


def icmpv6(source, to, kind, rest):
    """`rest`: what is behind the checksum."""
    pseudo = IPv6Address(source).packed + IPv6Address(to).packed + struct.pack("!II", 4 + len(rest), ICMPV6)
    return bytes([kind, 0]) + struct.pack("!H", summed(pseudo + bytes([kind, 0, 0, 0]) + rest)) + rest


def arp(operation, mac, address, to_mac, to):
    return struct.pack("!HHBBH", 1, IPV4, 6, 4, operation) + b"".join(
        (octets(mac), IPv4Address(address).packed, octets(to_mac), IPv4Address(to).packed)
    )


def forged(me, victim, gateway, mark):
    """What `me` has no right to send, by what it is. `mark` makes what is looked for out of that. `me`, `victim` and
    `gateway` are (MAC, IPv4, IPv6, link-local IPv6)."""
    mac, mine, _, local = me
    frames = {}

    def say(what, frame):
        frames[what] = frame

    def text(what):
        return udp(4000, 4000, mark(what))

    for what, source in (("mac", ANYBODY), ("victims-mac", victim[0]), ("gateways-mac", gateway[0])):
        say(what, ether(BROADCAST, source, IPV4, ipv4(mine, "255.255.255.255", text(what))))
    for what, source in (("ipv4", "10.77.0.250"), ("victims-ipv4", victim[1]), ("ipv4-of-the-world", "192.0.2.7")):
        say(what, ether(BROADCAST, mac, IPV4, ipv4(source, "255.255.255.255", text(what))))
    for what, source in (
        ("victims-ipv6", victim[2]),
        ("gateways-ipv6", gateway[3]),
        ("ipv6-of-the-world", "2001:db8::7"),
    ):
        say(what, ether(ALL_NODES, mac, IPV6, ipv6(source, "ff02::1", text(what), UDP)))
    for what, sender, address in (
        ("arp-gateway", mac, gateway[1]), ("arp-victim", mac, victim[1]), ("arp-mac", victim[0], mine),
    ):  # fmt: skip
        say(what, ether(BROADCAST, mac, ARP, arp(2, sender, address, BROADCAST, mine) + mark(what)))
    for what, target in (("na-gateway", gateway[3]), ("na-victim", victim[2])):
        said = struct.pack("!I", 0x20000000) + IPv6Address(target).packed + b"\2\1" + octets(mac) + mark(what)
        say(what, ether(ALL_NODES, mac, IPV6, ipv6(local, "ff02::1", icmpv6(local, "ff02::1", 136, said))))
    for what, kind in (("ra", 134), ("redirect", 137)):
        said = struct.pack("!BBHII", 64, 0, 1800, 0, 0) + bytes(32) + mark(what)
        whole = icmpv6(local, "ff02::1", kind, said)
        say(what, ether(ALL_NODES, mac, IPV6, ipv6(local, "ff02::1", whole)))
        hidden = f"{kind}-behind-options"
        whole = icmpv6(local, "ff02::1", kind, said.replace(mark(what), mark(hidden)))
        say(hidden, ether(ALL_NODES, mac, IPV6, ipv6(local, "ff02::1", bytes([ICMPV6]) + NOTHING + whole, HOP_BY_HOP)))
        # RFC 7113: the first fragment has but extension headers, and so nobody sees what it is
        hidden = f"{kind}-in-fragments"
        first = struct.pack("!BBHI", OPTIONS, 0, 1, 7) + bytes([ICMPV6]) + NOTHING + b""
        say(hidden, ether(ALL_NODES, mac, IPV6, ipv6(local, "ff02::1", first + mark(hidden), FRAGMENT)))
    # the address that it is about would be in the next fragment (RFC 6980)
    first = struct.pack("!BBHI", ICMPV6, 0, 1, 9) + bytes([136, 0, 0, 0, 0x20, 0, 0, 0]) + mark("na")
    say("na", ether(ALL_NODES, mac, IPV6, ipv6(local, "ff02::1", first, FRAGMENT)))
    say("dhcp", ether(BROADCAST, mac, IPV4, ipv4(mine, "255.255.255.255", udp(67, 68, b"\2\1\6" + mark("dhcp")))))
    say("dhcpv6", ether(ALL_NODES, mac, IPV6, ipv6(local, "ff02::1", udp(547, 546, b"\7" + mark("dhcpv6")), UDP)))
    for what, tag in (("vlan", VLAN), ("service-vlan", STAG)):
        inside = struct.pack("!HH", 5, IPV4) + ipv4(mine, "255.255.255.255", text(what))
        say(what, ether(BROADCAST, mac, tag, inside))
    say("spanning-tree", ether("01:80:c2:00:00:00", mac, 40, b"\x42\x42\3" + bytes(35) + mark("spanning-tree")))
    say("other-protocol", ether(BROADCAST, mac, 0x88B5, mark("other-protocol").ljust(46, b"\0")))
    return frames


@pytest.fixture(scope="module")
def lab():
    """A daemon with `evil` and `victim` in one network."""
    with namespace("spoof") as host, running_daemon("tiny", namespace=host) as daemon:
        daemon.inn.network_create("lab").wait()
        specs = [vm_spec(name, "tiny", memory="256M", disk="8M", cpus=1, network="lab") for name in ("evil", "victim")]
        for operation in [daemon.inn.create(spec) for spec in specs]:
            operation.wait()
        yield daemon, host
        for name in ("evil", "victim"):
            daemon.inn.vm(name).delete(force=True)
        daemon.inn.network_delete("lab").wait()


def test_nothing_that_is_forged_arrives_and_all_of_it_is_counted(lab):
    daemon, host = lab
    network = daemon.inn.network("lab")
    cards = {name: daemon.inn.vm(name).nics[0] for name in ("evil", "victim")}
    people = [
        (card["mac"], card["address"], card["address6"], str(by_mac(LOCAL, card["mac"]))) for card in cards.values()
    ]
    (bridge,) = json.loads(run(host, "ip", "-j", "link", "show", network["bridge"]))
    gateway = (bridge["address"], network["gateway"], network["gateway6"], "fe80::1")
    frames = forged(*people, gateway, lambda what: f"<inn-{what}>".encode())
    me = people[0]
    allowed = {
        "hello": ether(BROADCAST, me[0], IPV4, ipv4(me[1], "255.255.255.255", udp(4000, 4000, b"<inn-hello>"))),
        "hello-6": ether(ALL_NODES, me[0], IPV6, ipv6(me[3], "ff02::1", udp(4000, 4000, b"<inn-hello-6>"), UDP)),
        "bye": ether(BROADCAST, me[0], IPV4, ipv4(me[1], "255.255.255.255", udp(4000, 4000, b"<inn-bye>"))),
    }
    tap = tap_name(daemon.inn.vm("victim").info["id"], 0)
    before = cards["evil"]["dropped"]
    inside = ["nsenter", f"--net=/run/netns/{host}", sys.executable, "-c", SNIFF, network["bridge"], tap]
    with subprocess.Popen(inside, stdout=subprocess.PIPE, text=True) as sniffer:
        try:
            assert sniffer.stdout.readline() == "ready\n"
            lines = [allowed["hello"], allowed["hello-6"], *frames.values(), allowed["bye"]]
            feed = "".join(f"{frame.hex()}\n" for frame in lines).encode()
            done = daemon.inn.vm("evil").exec(["perl", "-e", SEND], stdin=feed)
            assert done.status == 0, done.stderr
            seen = []
            while sum("inn-bye" in line for line in seen) < 2:
                seen.append(sniffer.stdout.readline().strip())
        finally:
            sniffer.kill()
    wanted = {f"{device} inn-{what}" for device in (network["bridge"], tap) for what in allowed}
    assert set(seen) == wanted
    dropped = daemon.inn.vm("evil").nics[0]["dropped"] - before
    assert dropped >= len(frames)
    assert daemon.inn.vm("victim").nics[0]["dropped"] == cards["victim"]["dropped"]
