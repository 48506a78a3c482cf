"""Published ports and cards that come and go, with a real guest in a network namespace that plays the host."""

import json
import os
import subprocess
import sys
import time

import pytest
from conftest import running_daemon
from inside import ready
from namespaces import host_beside, namespace, run

from innkeeper.client.errors import ApiError
from innkeeper.client.wishes import vm_spec

pytestmark = [pytest.mark.guest, pytest.mark.skipif(os.geteuid() != 0, reason="networks are made by root")]
PAGE = "mkdir -p /srv && printf hello >/srv/index.html && httpd -p 80 -h /srv"
ECHO = "while true; do nc -l -p 7 -e cat; done"
GET = "import urllib.request; print(urllib.request.urlopen('http://{}', timeout=20).read().decode(), end='')"
HOLD = """
import socket, sys
line = socket.create_connection(("192.0.2.1", 7007), 20)
line.settimeout(3)
for word in sys.stdin:
    line.sendall(word.encode())
    try:
        print(line.recv(100).decode().strip() or "closed", flush=True)
    except OSError:
        print("nothing", flush=True)
"""


@pytest.fixture(scope="module")
def outside():
    with namespace("out") as name:
        yield name


@pytest.fixture(scope="module")
def lab(outside):
    """A daemon with networks `lab` (nat) and `vault` (internal), and the guests `web` in lab and `home` in none."""
    with host_beside(outside) as host, running_daemon("tiny", namespace=host) as daemon:
        daemon.inn.network_create("lab").wait()
        daemon.inn.network_create("vault", mode="internal").wait()
        specs = [
            vm_spec("web", "tiny", memory="256M", disk="8M", network="lab"),
            vm_spec("home", "tiny", memory="256M", disk="8M"),
        ]
        for operation in [daemon.inn.create(spec) for spec in specs]:
            operation.wait()
        for name in ("web", "home"):
            sh(daemon, name, f"{PAGE}; ({ECHO}) </dev/null >/dev/null 2>&1 &")
        yield daemon
        for name in ("web", "home"):
            daemon.inn.vm(name).delete(force=True)
        for name in ("lab", "vault"):
            daemon.inn.network_delete(name).wait()
        assert "innkeeper" not in run(host, "nft", "list", "tables")


def sh(daemon, vm, command):
    done = daemon.inn.vm(vm).exec(["sh", "-c", command])
    return done.status, done.stdout.decode()


def cards(vm):
    """Its cards, without what changes by itself."""
    return [{key: value for key, value in card.items() if key != "dropped"} for card in vm.nics]


def get(where, address):
    """The page at an address, as it is seen from a namespace; None where there is none."""
    inside = ["nsenter", f"--net=/run/netns/{where}", sys.executable, "-c", GET.format(address)]
    done = subprocess.run(inside, capture_output=True, text=True)
    return done.stdout if done.returncode == 0 else None


def eventually(look):
    deadline = time.monotonic() + 60
    while not look():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.2)
    return True


def test_a_port_is_visible_at_once_and_gone_at_once_with_the_connections_through_it(lab, outside):
    web = lab.inn.vm("web")
    web.publish("8080:80", note="the page", by="ada").wait()
    web.publish("7007:7").wait()
    assert get(outside, "192.0.2.1:8080") == "hello"
    with pytest.raises(ApiError, match="host port 8080/tcp is published by web"):
        lab.inn.vm("home").publish("8080:80").wait()
    with pytest.raises(ApiError, match="leads to port 80 of web already"):
        web.publish("8080:81")
    inside = ["nsenter", f"--net=/run/netns/{outside}", sys.executable, "-c", HOLD]
    with subprocess.Popen(inside, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1) as line:
        line.stdin.write("one\n")
        assert line.stdout.readline() == "one\n"
        (page,) = [port for port in lab.inn.ports() if port["host"] == 8080]
        assert (page["vm"], page["guest"], page["note"], page["by"]) == ("web", 80, "the page", "ada")
        assert page["network"] == "lab" and page["packets"] >= 3 and page["bytes"] > 100 and page["last"]
        web.unpublish(7007).wait()
        line.stdin.write("two\n")
        assert line.stdout.readline() in ("nothing\n", "closed\n")
        line.stdin.close()
    assert get(outside, "192.0.2.1:8080") == "hello"
    web.unpublish(8080).wait()
    assert get(outside, "192.0.2.1:8080") is None
    assert [port["host"] for port in lab.inn.ports() if port["vm"] == "web"] == []


HOLD6 = HOLD.replace("192.0.2.1", "2001:db8:2::1")


def test_a_port_leads_in_over_both_ip_versions_or_the_one_of_its_address(lab, outside):
    web = lab.inn.vm("web")
    sh(lab, "web", f"({ECHO.replace('-p 7', '-p 8')}) </dev/null >/dev/null 2>&1 &")
    web.publish("8080:80").wait()
    web.publish("7007:8").wait()
    for address in ("192.0.2.1", "[2001:db8:2::1]"):
        assert get(outside, f"{address}:8080") == "hello", address
        assert get(lab.namespace, f"{address}:8080") == "hello", address
    for address in ("127.0.0.1", "localhost"):
        assert get(lab.namespace, f"{address}:8080") == "hello", address
    (page,) = [port for port in lab.inn.ports() if port["host"] == 8080]
    assert page["address"] == "::" and page["packets"] > 6
    inside = ["nsenter", f"--net=/run/netns/{outside}", sys.executable, "-c", HOLD6]
    with subprocess.Popen(inside, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1) as line:
        line.stdin.write("one\n")
        assert line.stdout.readline() == "one\n"
        web.unpublish(7007).wait()
        line.stdin.write("two\n")
        assert line.stdout.readline() in ("nothing\n", "closed\n")
        line.stdin.close()
    web.unpublish(8080).wait()
    for address, there in (("0.0.0.0", (True, False)), ("2001:db8:2::1", (False, True))):
        web.publish("8080:80", address=address).wait()
        found = tuple(get(outside, f"{way}:8080") == "hello" for way in ("192.0.2.1", "[2001:db8:2::1]"))
        assert found == there, address
        web.unpublish(8080).wait()
    with pytest.raises(ApiError, match="2001:db8::99 is no address of this host"):
        web.publish("8080:80", address="2001:db8::99").wait()
    with pytest.raises(ApiError, match="leads in over IPv4 only"):
        lab.inn.vm("home").publish("8080:80", address="2001:db8:2::1")


def test_a_port_of_qemus_own_nat_comes_and_goes_likewise(lab, outside):
    home = lab.inn.vm("home")
    home.publish("8080:80").wait()
    assert get(outside, "192.0.2.1:8080") == "hello"
    (page,) = [port for port in lab.inn.ports() if port["host"] == 8080]
    assert page["packets"] is None and page["network"] is None and page["address"] == "0.0.0.0"
    home.unpublish(8080).wait()
    assert get(outside, "192.0.2.1:8080") is None
    held = ["nsenter", f"--net=/run/netns/{lab.namespace}", sys.executable, "-c"]
    server = "import socket, time; s = socket.create_server(('', 8081)); print(flush=True); time.sleep(600)"
    with subprocess.Popen([*held, server], stdout=subprocess.PIPE) as program:
        try:
            program.stdout.readline()
            with pytest.raises(ApiError, match=rf"in use by python.*\(pid {program.pid}\)"):
                home.publish("8081:80").wait()
        finally:
            program.kill()


def test_a_card_comes_and_goes_while_the_guest_runs_and_the_others_stay(lab, outside):
    web = lab.inn.vm("web")
    (first,) = cards(web)
    with pytest.raises(ApiError, match="no network 'nowhere'"):
        web.nic_add(network="nowhere").wait()
    web.nic_add(network="vault").wait()
    web.nic_add(network="lab", mac="52:54:00:aa:bb:cc", address="10.77.0.77").wait()
    assert web.nics[2]["address"] == "10.77.0.77"
    assert cards(web)[0] == first and [card["index"] for card in web.nics] == [0, 1, 2]
    for card in web.nics[1:]:
        assert eventually(lambda mac=card["mac"]: mac in sh(lab, "web", "cat /sys/class/net/*/address")[1])
    third = cards(web)[2]
    name = sh(lab, "web", "cd /sys/class/net; grep -l 52:54:00:aa:bb:cc */address")[1].partition("/")[0]
    said = sh(lab, "web", f"ip link set {name} up && udhcpc -n -q -f -i {name} 2>&1")[1]
    assert f"lease of {third['address']} obtained" in said
    with pytest.raises(ApiError, match="network vault is internal"):
        web.publish("8082:80", nic=1).wait()
    web.nic_remove(1).wait()
    assert [card["index"] for card in web.nics] == [0, 2] and cards(web)[1] == third
    lab.kill()
    lab.start()
    assert cards(web) == [first, third]
    web.restart(force=True)
    ready(web)
    assert cards(web) == [first, third]
    found = sh(lab, "web", "cat /sys/class/net/*/address")[1]
    assert first["mac"] in found and third["mac"] in found
    web.nic_remove(2).wait()
    assert third["mac"] not in sh(lab, "web", "cat /sys/class/net/*/address")[1]
    assert cards(web) == [first]
    assert json.loads(run(lab.namespace, "ip", "-j", "link", "show", "type", "tun"))[0]["ifname"] == first["tap"]
    with pytest.raises(ApiError, match="web has no card 2"):
        web.nic_remove(2)


def carrier(lab, vm):
    """(whether the cable is in, how often it came and went), as the guest sees it."""
    up, changes = sh(lab, vm, "cd /sys/class/net/eth0; cat carrier carrier_changes")[1].split()
    return up == "1", int(changes)


def asks_anew(lab, vm):
    """Have a guest ask for its address, which busybox does not do by itself when the cable is in again."""
    lease = "udhcpc -n -q -i eth0 -s /usr/lib/innkeeper/dhcp"
    return sh(lab, vm, f"killall udhcpc; ip -4 addr flush dev eth0; {lease} 2>&1; ip -4 addr show eth0")[1]


def master(lab, tap):
    return json.loads(run(lab.namespace, "ip", "-j", "link", "show", "dev", tap))[0]["master"]


def test_a_card_comes_into_another_network_while_the_guest_runs(lab):
    web = lab.inn.vm("web")
    (first,) = cards(web)
    for wish, words in (
        ({"model": "e1000e"}, "the model of card 0 is virtio for as long as web runs"),
        ({"mac": "52:54:00:aa:bb:cc"}, "the MAC address of card 0 is"),
        ({"network": "nowhere"}, "no network 'nowhere'"),
        ({"network": "vault", "address": first["address"]}, "no address for a card in network vault"),
    ):
        with pytest.raises(ApiError, match=words):
            web.nic_set(0, **wish).wait()
    with pytest.raises(ApiError, match="the mode of card 0 is user"):
        lab.inn.vm("home").nic_set(0, network="lab")
    assert cards(web) == [first]
    _, changes = carrier(lab, "web")
    web.nic_set(0, network="vault").wait()
    (card,) = cards(web)
    assert card | {"network": "lab", "address": first["address"], "address6": first["address6"]} == first
    assert eventually(lambda: carrier(lab, "web") == (True, changes + 2))
    assert master(lab, first["tap"]) == lab.inn.network("vault")["bridge"]
    assert card["address"] != first["address"] and f"inet {card['address']}/24" in asks_anew(lab, "web")
    lab.kill()
    lab.start()
    assert cards(web) == [card] and master(lab, first["tap"]) == lab.inn.network("vault")["bridge"]
    web.nic_set(0, network="lab", address=first["address"]).wait()
    assert cards(web) == [first] and f"inet {first['address']}/24" in asks_anew(lab, "web")
    assert sh(lab, "web", "ping -c 1 -W 10 10.77.0.1")[0] == 0


def test_a_cable_is_pulled_out_and_put_in_also_of_a_fork(lab):
    web = lab.inn.vm("web")
    web.nic_set(0, link="down").wait()
    assert eventually(lambda: not carrier(lab, "web")[0]) and web.nics[0]["link"] == "down"
    fork = lab.inn.fork("web", name="likewise")
    try:
        assert not carrier(lab, "likewise")[0]
        fork.nic_set(0, link="up").wait()
        assert eventually(lambda: carrier(lab, "likewise")[0])
        fork.nic_set(0, network="vault").wait()  # where web has been before, at the same address
        assert f"inet {fork.nics[0]['address']}/24" in asks_anew(lab, "likewise")
        fork.nic_set(0, link="down").wait()
        fork.restart(force=True)
        ready(fork)
        assert not carrier(lab, "likewise")[0]
    finally:
        fork.delete(force=True)
        web.nic_set(0, link="up").wait()
    assert eventually(lambda: carrier(lab, "web")[0])


def test_an_address_belongs_to_one_card(lab):
    (first,) = lab.inn.vm("web").nics
    home = lab.inn.vm("home")
    for wish, words in (
        ({"address": first["address"]}, "is the address of web"),
        ({"mac": first["mac"]}, "is the MAC address of web"),
        ({"address": "10.77.0.1"}, "no address for a card in network lab"),
        ({"address": "10.78.0.5"}, "no address for a card in network lab"),
    ):
        with pytest.raises(ApiError, match=words):
            home.nic_add(network="lab", **wish).wait()
    with pytest.raises(ApiError, match="is the MAC address of web"):
        lab.inn.vm("web").clone("twin", keep_identity=True).wait()
    assert [card["index"] for card in home.nics] == [0]
    assert {vm["name"] for vm in lab.inn.vms()} == {"web", "home"}
