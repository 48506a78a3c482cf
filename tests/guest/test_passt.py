"""User-mode NAT by passt, with a real guest: a network namespace plays the host, another one the network outside."""

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import running_daemon
from inside import begin
from namespaces import namespace, run

from innkeeper.client.errors import ApiError
from innkeeper.client.wishes import vm_spec
from innkeeper.network.passt import processes
from innkeeper.qemu import cgroup

pytestmark = [
    pytest.mark.guest,
    pytest.mark.skipif(os.geteuid() != 0, reason="network namespaces are made by root"),
    pytest.mark.skipif(not shutil.which("passt"), reason="passt is not installed"),
]
SERVER = """
import socket
with socket.create_server(("::", 7000), family=socket.AF_INET6, dualstack_ipv6=True) as server:
    while True:
        connection, who = server.accept()
        connection.sendall(who[0].encode())
        connection.close()
"""
ASK = """
import socket, sys
with socket.create_connection((sys.argv[1], int(sys.argv[2])), 20) as line:
    line.sendall(sys.argv[3].encode())  # the guest of Debian 12's passt hears of no connection before that
    try:
        print(line.recv(99).decode(), end="")
    except ConnectionError:  # it does not listen at this moment
        pass
"""


@pytest.fixture(scope="module")
def outside():
    with namespace("out") as name:
        yield name


@pytest.fixture(scope="module")
def host(outside):
    with namespace("host") as name:
        run(name, "ip", "link", "add", "eth0", "type", "veth", "peer", "name", "eth0", "netns", outside)
        for where, last in ((name, 1), (outside, 2)):
            run(where, "ip", "addr", "add", f"192.0.2.{last}/24", "dev", "eth0")
            run(where, "ip", "addr", "add", f"2001:db8::{last}/64", "dev", "eth0", "nodad")
            run(where, "ip", "link", "set", "eth0", "up")
        run(name, "ip", "route", "add", "default", "via", "192.0.2.2")
        run(name, "ip", "route", "add", "default", "via", "2001:db8::2")
        listening = [sys.executable, "-c", SERVER]
        servers = [subprocess.Popen(["nsenter", f"--net=/run/netns/{one}", *listening]) for one in (name, outside)]
        yield name
        for server in servers:
            server.kill()
            server.wait()


@pytest.fixture(scope="module")
def lab(host):
    """A daemon with the guest `web`, whose port 80 is port 8080 of the host."""
    with running_daemon("tiny", namespace=host) as daemon:
        spec = vm_spec("web", "tiny", memory="256M", disk="8M", nic="passt", publish=["0.0.0.0:8080:80"])
        daemon.inn.create(spec).wait()
        yield daemon


def sh(daemon, vm, command):
    done = daemon.inn.vm(vm).exec(["sh", "-c", command + " 2>&1"], timeout=60)
    return done.stdout.decode().strip()


def eventually(look):
    deadline = time.monotonic() + 30
    while not (found := look()) and time.monotonic() < deadline:
        time.sleep(0.1)
    return found


def passts(daemon, vm="web"):
    """Pids that are not on their way out."""
    found = processes(daemon.inn.vm(vm).info["id"], daemon.home.data)
    return [pid for pid in found if ") Z " not in Path(f"/proc/{pid}/stat").read_text()]


def test_a_guest_reaches_out_by_both_versions_and_not_its_host(lab):
    assert eventually(lambda: "10.0.2.15" in sh(lab, "web", "ip addr show eth0"))
    assert sh(lab, "web", "timeout 8 nc 192.0.2.2 7000 </dev/null") == "::ffff:192.0.2.1"
    assert eventually(lambda: sh(lab, "web", "timeout 8 nc 2001:db8::2 7000 </dev/null") == "2001:db8::1")
    assert "192.0.2" not in sh(lab, "web", "timeout 4 nc 10.0.2.2 7000 </dev/null")  # the host's loopback


def test_published_ports_and_the_one_for_ssh_lead_in(lab, host, outside):
    vm = lab.inn.vm("web")
    begin(vm, "while true; do nc -l -p 80 -e cat; done")
    begin(vm, "while true; do nc -l -p 22 -e cat; done")
    assert eventually(lambda: ":80 " in (there := sh(lab, "web", "netstat -ltn")) and ":22 " in there)
    for where, address in ((outside, "192.0.2.1"), (host, "192.0.2.1"), (host, "127.0.0.1")):
        asked = where, sys.executable, "-c", ASK, address, "8080", "hello"
        assert eventually(lambda asked=asked: run(*asked)) == "hello"
    greets = f"from innkeeper.cli.ssh import _greets; print(_greets('127.0.0.1', {vm.info['ssh_port']}))"
    assert eventually(lambda: run(host, sys.executable, "-c", greets) == "True\n")
    with pytest.raises(ApiError, match="takes its ports when the VM starts"):
        vm.publish("8081:81")


def test_it_is_confined_as_its_vm(lab):
    vm = lab.inn.vm("web").info
    (pid,) = passts(lab)
    uids = [Path(f"/proc/{one}/status").read_text().split("Uid:")[1].split()[0] for one in (pid, vm["pid"])]
    assert uids[0] == uids[1] != "0"
    if cgroup.detect().mode != "none":
        groups = [Path(f"/proc/{one}/cgroup").read_text() for one in (pid, vm["pid"])]
        assert groups[0] == groups[1] and vm["id"] in groups[0]
