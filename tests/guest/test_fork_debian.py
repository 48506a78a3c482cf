"""Forks of a Debian, whose systemd-networkd has a mind of its own about addresses."""

import os

import pytest
from conftest import running_daemon
from namespaces import host_beside, namespace

from innkeeper.client.wishes import vm_spec

pytestmark = [
    pytest.mark.guest,
    pytest.mark.slow,
    pytest.mark.timeout(1800),
    pytest.mark.skipif(os.geteuid() != 0, reason="networks are made by root"),
]
NAT = ("10.0.2.15/24", "10.0.2.2", "10.0.2.3")


@pytest.fixture(scope="module")
def lab():
    """A daemon with a warm Debian and the networks `lab` and `other`."""
    with (
        namespace("net") as outside,
        host_beside(outside) as host,
        running_daemon("debian-12", namespace=host) as daemon,
    ):
        for name in ("lab", "other"):
            daemon.inn.network_create(name).wait()
        daemon.inn.warm("debian-12", vm_spec("warming", "debian-12", memory="1G", cpus=2)).wait()
        yield daemon


def says(daemon, vm, command):
    return daemon.inn.vm(vm).exec(["sh", "-c", command]).stdout.decode()


def place(daemon, vm):
    """(address, gateway, name server) as the guest has them, and how it came to the address."""
    assert "routable configured" in " ".join(says(daemon, vm, "networkctl --no-pager | grep ether").split())
    address = says(daemon, vm, "ip -4 -o addr show scope global").split()
    gateway, resolver = says(daemon, vm, "ip route show default").split()[2], says(daemon, vm, "resolvectl dns")
    return (address[3], gateway, resolver.split("):")[1].split()[0]), "dynamic" if "dynamic" in address else "fixed"


def lan(daemon, vm):
    """What it has to have."""
    card = daemon.inn.vm(vm).info
    network = daemon.inn.network(card["spec"]["nics"][0]["network"])
    return f"{card['address']}/24", network["gateway"], network["gateway"]


def test_behind_the_nat_of_qemu_its_address_stays_without_dhcp(lab):
    lab.inn.fork("debian-12", name="one")
    lab.inn.fork("one", name="one-more")
    for name in ("one", "one-more"):
        assert place(lab, name) == (NAT, "fixed")


def test_it_asks_for_the_time_of_day_later(lab):
    lab.inn.fork("debian-12", name="early")
    states = says(lab, "early", "for what in is-enabled is-active; do systemctl $what systemd-timesyncd; done; true")
    assert states.split() == ["enabled", "inactive"]
    (timer,) = says(lab, "early", "systemctl list-timers --no-legend 'run-*' --no-pager").splitlines()
    assert "min left" in timer
    command = says(lab, "early", f"systemctl show -p ExecStart {timer.split()[-1]}")
    assert "start systemd-timesyncd.service" in command


def test_in_a_network_it_has_its_own_at_once_and_keeps_it(lab):
    for parent, name, network in (("debian-12", "two", "lab"), ("two", "two-more", "other"), ("one", "moved", "lab")):
        lab.inn.fork(parent, name=name, network=network)
        pings = says(lab, name, "ping -i 0.1 -c 40 -W 5 $(ip route show default | cut -d' ' -f3) | tail -2")
        assert " 0% packet loss" in pings, pings
        assert place(lab, name) == (lan(lab, name), "fixed")
        assert says(lab, name, f"getent ahostsv4 {name}.inn").split()[0] == lan(lab, name)[0].split("/")[0]


def test_a_card_that_leads_elsewhere_asks_dhcp(lab):
    lab.inn.fork("debian-12", name="three", network="lab")
    lab.inn.vm("three").nic_set(0, network="other").wait()
    wait = "for i in $(seq 60); do networkctl --no-pager | grep -q 'routable *configured' && break; sleep 1; done"
    says(lab, "three", wait)
    assert place(lab, "three") == (lan(lab, "three"), "dynamic")
