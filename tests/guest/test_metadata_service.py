"""The metadata service, asked by real guests: each gets its own data, and those that did not want it nothing."""

import os
import subprocess
import sys
import time

import pytest
from conftest import running_daemon
from inside import sh
from namespaces import namespace, run

from innkeeper.client.wishes import vm_spec

pytestmark = [pytest.mark.guest, pytest.mark.skipif(os.geteuid() != 0, reason="networks are made by root")]
KEY = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIGPJpDhzzN6jbG6zAWAr2nVwCwZ4Y7rKqVvx1Zr4yWqd somebody@somewhere"
LISTEN = """
import socket
heard = socket.socket(socket.AF_PACKET, socket.SOCK_DGRAM, socket.htons(3))
heard.bind((BRIDGE, 3))
heard.settimeout(300)
print("hears", flush=True)
sent, found = b"", set()
while b"user-data-of-web" not in sent:
    packet, where = heard.recvfrom(65536)
    if where[2] == socket.PACKET_OUTGOING and packet[0] == 0x45 and packet[12:16] == bytes((169, 254, 169, 254)):
        sent += packet[20:]
        found.add(packet[8])
print(*found)
"""
"""In the host's namespace: the TTLs of all that the service says until it has said the user-data."""


@pytest.fixture(scope="module")
def host():
    with namespace("meta") as name:
        yield name


@pytest.fixture(scope="module")
def lab(host):
    """`web` in a nat network, `db` in an internal one, `plain` beside web without the service."""
    with running_daemon("tiny", namespace=host) as daemon:
        daemon.inn.network_create("lab").wait()
        daemon.inn.network_create("den", mode="internal").wait()
        specs = [
            vm_spec(
                name, "tiny", memory="256M", disk="8M", network=network, metadata=name != "plain", ssh_keys=[KEY],
                user_data=f"#!/bin/sh\n# user-data-of-{name}\n",
            )
            for name, network in (("web", "lab"), ("db", "den"), ("plain", "lab"))
        ]  # fmt: skip
        for operation in [daemon.inn.create(spec) for spec in specs]:
            operation.wait()
        yield daemon


def ask(vm, path, token="", method="GET", more="", seconds=20):
    """(status, body) of a request made in the guest; (0, "") where nobody answers."""
    header = f"X-aws-ec2-metadata-token: {token}\\r\\n" if token else ""
    request = f"{method} {path} HTTP/1.1\\r\\nHost: 169.254.169.254\\r\\nConnection: close\\r\\n{header}{more}\\r\\n"
    answer = sh(vm, f"printf '{request}' | timeout {seconds} nc -w {seconds} 169.254.169.254 80 2>/dev/null || true")
    head, _, body = answer.partition("\r\n\r\n")
    return int(head.split()[1]) if head else 0, body


def token(vm, seconds=600):
    status, found = ask(vm, "/latest/api/token", "", "PUT", f"X-aws-ec2-metadata-token-ttl-seconds: {seconds}\\r\\n")
    assert status == 200, found
    return found


def test_a_guest_gets_its_own_data_and_no_other(lab, host):
    web, db = lab.inn.vm("web"), lab.inn.vm("db")
    bridge = lab.inn.network("lab")["bridge"]
    listen = ["nsenter", f"--net=/run/netns/{host}", sys.executable, "-c", LISTEN.replace("BRIDGE", repr(bridge))]
    with subprocess.Popen(listen, stdout=subprocess.PIPE, text=True) as heard:
        try:
            assert heard.stdout.readline() == "hears\n"
            tokens = {"web": token(web), "db": token(db)}
            assert "user-data-of-web" in ask(web, "/latest/user-data", tokens["web"])[1]
            assert heard.stdout.read() == "1\n"  # nothing that a guest routes on gets further
        finally:
            heard.kill()
    for vm in (web, db):
        info = vm.info
        network = lab.inn.network(info["spec"]["nics"][0]["network"])
        own = tokens[info["name"]]
        assert f"# user-data-of-{info['name']}" in ask(vm, "/latest/user-data", own)[1]
        for path, value in {
            "instance-id": f"i-{info['id']}",
            "hostname": f"{info['name']}.inn",
            "local-ipv4": info["address"],
            "mac": info["machine"]["macs"][0],
            f"network/interfaces/macs/{info['machine']['macs'][0]}/subnet-ipv4-cidr-block": network["subnet"],
            "public-keys/0/openssh-key": KEY,
        }.items():
            assert ask(vm, f"/latest/meta-data/{path}", own) == (200, value)
        assert ask(vm, "/latest/user-data")[0] == 401
        assert ask(vm, "/latest/user-data", next(t for name, t in tokens.items() if name != info["name"]))[0] == 401


def test_a_fork_where_there_is_no_way_out_finds_it_and_its_own_data(lab):
    """One of a VM, which its agent tells, and one of a warm image, which what waits in it tells."""
    spec = vm_spec("warming", "tiny", memory="256M", disk="8M", cpus=1, network="lab", metadata=True)
    lab.inn.warm("tiny", spec).wait()
    assert lab.inn.image("tiny-warm")["warm"]["waits"]
    lab.inn.fork("db", name="db-2")
    lab.inn.fork("tiny-warm", name="db-3", network="den")
    try:
        for name in ("db-2", "db-3"):
            fork = lab.inn.vm(name)
            assert "169.254.169.254" in sh(fork, "ip route") and "default" not in sh(fork, "ip route")
            assert ask(fork, "/latest/meta-data/instance-id", token(fork)) == (200, f"i-{fork.info['id']}")
    finally:
        for name in ("db-2", "db-3"):
            lab.inn.vm(name).delete(force=True)
        lab.inn.image_delete("tiny-warm").wait()


def test_nothing_is_answered_to_others(lab, host):
    web, plain = lab.inn.vm("web"), lab.inn.vm("plain")
    forwarded = "X-aws-ec2-metadata-token-ttl-seconds: 60\\r\\nX-Forwarded-For: 10.1.1.1\\r\\n"
    assert ask(web, "/latest/api/token", "", "PUT", forwarded)[0] == 403
    assert ask(plain, "/latest/api/token", "", "PUT", "X-aws-ec2-metadata-token-ttl-seconds: 60\\r\\n", 5)[0] == 0
    gateway = run(host, "ip", "-4", "-o", "addr", "show", lab.inn.network("lab")["bridge"]).split()[3].split("/")[0]
    for vm in (web, plain):  # the port that questions are led to is none that a guest can reach
        assert "open" not in sh(vm, f"timeout 3 nc {gateway} 16925 </dev/null && echo open || true")
    mine = token(web)
    sh(web, "echo 63 >/proc/sys/net/ipv4/ip_default_ttl")  # as if a router in the guest had passed it on
    assert ask(web, "/latest/user-data", mine, seconds=5)[0] == 0
    sh(web, "echo 64 >/proc/sys/net/ipv4/ip_default_ttl")
    assert ask(web, "/latest/user-data", mine)[0] == 200


def test_it_is_there_again_after_the_daemon_and_the_bridge_were_not(lab, host):
    web = lab.inn.vm("web")
    old = token(web)
    lab.kill()
    lab.start()
    assert ask(web, "/latest/user-data", old)[0] == 401  # tokens are of one daemon
    assert ask(web, "/latest/user-data", token(web))[0] == 200
    seen = {event["seq"] for event in lab.inn.events()}
    run(host, "ip", "link", "del", lab.inn.network("lab")["bridge"])
    while not any("listens again" in event["text"] for event in lab.inn.events() if event["seq"] not in seen):
        time.sleep(0.2)
    assert ask(web, "/latest/user-data", token(web))[0] == 200


def test_names_and_addresses_are_served_on_after_a_guest_renewed_and_another_came(lab, host):
    """dnsmasq before 2.91 walks through freed memory there, where a line of its DHCP hosts has a tag."""
    db = lab.inn.vm("db")
    for name in ("db-4", "db-5", "db-6"):
        sh(db, "udhcpc -n -q -i eth0")
        lab.inn.fork("db", name=name)
    try:
        assert "Address" in sh(db, "nslookup db-6.inn")
        assert not [event["text"] for event in lab.inn.events() if "had ended" in event["text"]]
    finally:
        for name in ("db-4", "db-5", "db-6"):
            lab.inn.vm(name).delete(force=True)
