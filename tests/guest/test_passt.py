"""User-mode NAT by passt, with a real guest: a network namespace plays the host, another one the network outside."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import running_daemon
from inside import begin, ready
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
ASK = "import socket; print(socket.create_connection(('192.0.2.1', 8080), 20).recv(9).decode().strip())"


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


def test_a_published_port_leads_in_and_stays_as_it_is_while_the_vm_runs(lab, outside):
    begin(lab.inn.vm("web"), "while true; do echo hello | nc -l -p 80; done")
    assert run(outside, sys.executable, "-c", ASK) == "hello\n"
    with pytest.raises(ApiError, match="takes its ports when the VM starts"):
        lab.inn.vm("web").publish("8081:81")
    with pytest.raises(ApiError, match="takes its ports when the VM starts"):
        lab.inn.vm("web").unpublish(8080)
    assert [port["host"] for port in lab.inn.ports()][-1] == 8080


def test_it_is_confined_as_its_vm(lab):
    vm = lab.inn.vm("web").info
    (pid,) = passts(lab)
    uids = [Path(f"/proc/{one}/status").read_text().split("Uid:")[1].split()[0] for one in (pid, vm["pid"])]
    assert uids[0] == uids[1] != "0"
    if cgroup.detect().mode != "none":
        groups = [Path(f"/proc/{one}/cgroup").read_text() for one in (pid, vm["pid"])]
        assert groups[0] == groups[1] and vm["id"] in groups[0]


def test_it_outlives_the_daemon_and_ends_with_qemu(lab, outside):
    before = passts(lab)
    lab.kill()
    lab.start()
    assert passts(lab) == before
    assert run(outside, sys.executable, "-c", ASK) == "hello\n"
    pid = lab.inn.vm("web").info["pid"]
    lab.kill()
    os.kill(pid, signal.SIGKILL)
    alive = before[0]
    assert eventually(lambda: not Path(f"/proc/{alive}").exists() or ") Z " in Path(f"/proc/{alive}/stat").read_text())
    lab.start()
    vm = lab.inn.vm("web")
    assert eventually(lambda: vm.state == "crashed")
    vm.start()
    ready(vm)
    assert len(passts(lab)) == 1


def test_a_port_that_is_taken_is_said(lab, host):
    vm = lab.inn.vm("web")
    vm.stop(force=True)
    assert passts(lab) == []
    hold = (
        "import socket, time; s = socket.create_server(('0.0.0.0', 8080)); print('there', flush=True); time.sleep(9)"
    )
    with subprocess.Popen(
        ["nsenter", f"--net=/run/netns/{host}", sys.executable, "-c", hold], stdout=subprocess.PIPE, text=True
    ) as holder:
        holder.stdout.readline()
        with pytest.raises(ApiError, match="host port 8080/tcp of web is in use"):
            vm.start()
        holder.kill()
    vm.start()
    ready(vm)


def test_a_card_comes_and_goes_while_the_guest_runs(lab):
    vm = lab.inn.vm("web")
    vm.nic_add(mode="passt").wait()
    assert [card["backend"] for card in vm.nics] == ["passt", "passt"] and len(passts(lab)) == 2
    sh(lab, "web", "ip link set eth1 up")
    assert eventually(lambda: "2001:db8:" in sh(lab, "web", "ip addr show eth1"))
    vm.nic_remove(1).wait()
    assert eventually(lambda: len(passts(lab)) == 1)


def test_one_that_ends_before_its_qemu_is_said(lab):
    os.kill(passts(lab)[0], signal.SIGKILL)
    assert eventually(lambda: any("its passt has ended" in event["text"] for event in lab.inn.events()))
    vm = lab.inn.vm("web")
    vm.stop(force=True)
    vm.start()
    assert len(passts(lab)) == 1


def test_forks_have_one_each(lab, outside):
    ready(lab.inn.vm("web"))
    lab.inn.fork("web", name="other")
    assert len(passts(lab, "other")) == 1
    assert eventually(lambda: sh(lab, "other", "timeout 8 nc 192.0.2.2 7000 </dev/null") == "::ffff:192.0.2.1")
    lab.inn.vm("other").delete(force=True)
