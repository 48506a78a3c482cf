"""An interface taken into a bridge and given back, in a network namespace; what can be no parent."""

import json
import os
import sys

import pytest
from namespaces import namespace, run
from pydantic import ValidationError

from innkeeper.base.errors import Unsupported
from innkeeper.network.uplink import check_wired
from innkeeper.operations.outer_addresses import first_address
from innkeeper.spec.network import NetworkSpec

by_root = pytest.mark.skipif(os.geteuid() != 0, reason="bridges are made by root")

SCRIPT = """
import asyncio, sys
from pathlib import Path
from innkeeper.base.errors import InnkeeperError
from innkeeper.network import links, uplink
from innkeeper.plan.network import Network

lan = Network("0123456789abcdef", "lan", "bridged", None, None, "inn", "eth0")
record = Path(sys.argv[1])

async def main():
    {}

try:
    asyncio.run(main())
except (InnkeeperError, OSError) as error:
    print(error)
"""


@pytest.fixture
def host():
    """A host whose interface carries addresses, an alias of one, and routes of many kinds."""
    with namespace("uplink") as name:
        run(name, "ip", "link", "add", "eth0", "type", "veth", "peer", "name", "outer")
        for words in (
            "addr add 192.0.2.1/24 brd + dev eth0", "addr add 192.0.2.9/24 dev eth0 label eth0:alias",
            "addr add 2001:db8::1/64 dev eth0 nodad", "link set eth0 up", "link set outer up",
            "route add default via 192.0.2.2", "route add default via 2001:db8::2",
            "route add 198.51.100.0/24 dev eth0",
            "route add 203.0.113.0/24 via 192.0.2.2 metric 50 mtu 1300 src 192.0.2.9",
            "route add 198.18.0.0/15 via 192.0.2.3 table 77",
        ):  # fmt: skip
            run(name, "ip", *words.split())
        while "tentative" in run(name, "ip", "addr"):
            pass
        yield name


def state(host):
    looks = ("link", "addr", "route show table all", "-6 route")
    return [json.loads(run(host, "ip", "-j", *look.split())) for look in looks]


def do(host, tmp_path, code):
    """What the code says in the namespace."""
    return run(host, sys.executable, "-c", SCRIPT.format(code), str(tmp_path / "record")).strip()


@by_root
def test_whom_the_host_has_heard_of(host, tmp_path):
    for address, words in (("192.0.2.50", "reachable"), ("192.0.2.51", "stale"), ("192.0.2.52", "failed")):
        mac = f"52:54:00:00:00:{address[-2:]}"
        run(host, "ip", "neigh", "add", address, "lladdr", mac, "dev", "eth0", "nud", words)
    heard = [("52:54:00:00:00:50", "192.0.2.50"), ("52:54:00:00:00:51", "192.0.2.51")]
    assert do(host, tmp_path, "print(sorted((await links.neighbours()).items()))") == str(heard)


@by_root
def test_the_hosts_addresses_and_routes_move_to_the_bridge_and_back(host, tmp_path):
    before = state(host)
    taking = (
        "print(await uplink.check_parent('eth0'), await uplink.ensure(lan, record), await uplink.ensure(lan, record))"
    )
    assert do(host, tmp_path, taking) == "False True False"
    _, addresses, routes, routes6 = state(host)
    on = {link["ifname"]: {at["local"] for at in link["addr_info"] if at["scope"] == "global"} for link in addresses}
    assert on["innlan-01234567"] == {"192.0.2.1", "192.0.2.9", "2001:db8::1"}
    assert on["eth0"] == set()
    assert not [route for route in (*routes, *routes6) if route.get("dev") == "eth0" and "fe80" not in route["dst"]
                and "ff00" not in route["dst"]]  # fmt: skip
    assert "already" in do(host, tmp_path, "await uplink.check_parent('eth0')")
    assert "itself part of a network" in do(host, tmp_path, "await uplink.check_parent('innlan-01234567')")
    do(host, tmp_path, "await uplink.give_back(lan, record); await uplink.give_back(lan, record)")
    assert state(host) == before


@by_root
@pytest.mark.parametrize("part", ["_make", "_strip", "_settle"])
def test_a_host_is_not_cut_off_where_that_fails(host, tmp_path, part):
    before = state(host)
    once = (
        f"real = uplink.{part}\n    async def broken(*arguments, **options):\n"
        f"        uplink.{part} = real\n        await real(*arguments, **options)\n"
        "        raise OSError('in the middle')\n"
        f"    uplink.{part} = broken\n    await uplink.ensure(lan, record)"
    )
    assert do(host, tmp_path, once) == "in the middle"
    assert state(host) == before


@by_root
def test_after_the_death_of_a_daemon_in_the_middle_it_is_finished_or_undone(host, tmp_path):
    before = state(host)
    dying = (
        "import os\n    async def dies(*arguments, **options):\n        os._exit(0)\n    uplink._settle = dies\n    "
    )
    assert do(host, tmp_path, dying + "await uplink.ensure(lan, record)") == ""
    assert "192.0.2.1" not in run(host, "ip", "addr")
    assert do(host, tmp_path, "print(await uplink.ensure(lan, record))") == "True"
    assert "192.0.2.1" in run(host, "ip", "addr", "show", "innlan-01234567")
    assert do(host, tmp_path, dying + "await uplink.give_back(lan, record)") == ""
    do(host, tmp_path, "await uplink.give_back(lan, record)")
    assert state(host) == before


@by_root
def test_what_can_be_no_parent(host, tmp_path):
    refusal = "await uplink.check_parent({!r})"
    assert "no interface 'eth7'" in do(host, tmp_path, refusal.format("eth7"))
    assert "no Ethernet interface" in do(host, tmp_path, refusal.format("lo"))
    run(host, "ip", "addr", "change", "192.0.2.9/24", "dev", "eth0", "valid_lft", "3600", "preferred_lft", "3600")
    assert "192.0.2.9 from DHCP" in do(host, tmp_path, refusal.format("eth0"))


@by_root
def test_a_tap_does_not_lower_the_mtu_of_somebodys_bridge(host, tmp_path):
    run(host, "ip", "link", "add", "br0", "type", "bridge")
    run(host, "ip", "link", "set", "outer", "mtu", "9000", "master", "br0")
    run(host, "ip", "link", "set", "br0", "up")
    plugging = "links.open_tap('inn-012345678-0'); await links.ensure_attached({'inn-012345678-0': 'br0'})\n    "
    seeing = "print(await uplink.check_parent('br0'))"
    mtu = "import subprocess; print(subprocess.run(['ip', '-o', 'link', 'show', 'br0'], capture_output=True).stdout)"
    said = do(host, tmp_path, plugging + seeing + "\n    " + mtu)
    assert said.startswith("True")
    assert "mtu 9000" in said


def test_a_wireless_interface_is_no_parent(tmp_path):
    (tmp_path / "eth0").mkdir()
    check_wired("eth0", tmp_path)
    for name, mark in (("wlan0", "phy80211"), ("wlan1", "wireless")):
        (tmp_path / name / mark).mkdir(parents=True)
        with pytest.raises(Unsupported, match="one MAC only") as refused:
            check_wired(name, tmp_path)
        assert "--mode nat" in refused.value.hint


@pytest.mark.parametrize(
    ("wish", "word"),
    [
        ({"mode": "bridged"}, "has a parent"),
        ({"mode": "nat", "parent": "eth0"}, "no other has one"),
        ({"mode": "bridged", "parent": "eth0", "subnet": "10.77.0.0/24"}, "subnet of a bridged network"),
        ({"mode": "bridged", "parent": "eth0", "mtu": 1400}, "mtu of a bridged network"),
        ({"mode": "bridged", "parent": "eth0", "ipv6": "none"}, "ipv6 of a bridged network"),
        ({"mode": "bridged", "parent": "a/b"}, "parent"),
        ({"mtu": 576}, "mtu"),
    ],
)
def test_what_does_not_fit_a_mode_is_refused(wish, word):
    with pytest.raises(ValidationError, match=word):
        NetworkSpec.model_validate({"name": "lan"} | wish)


@pytest.mark.parametrize(
    ("told", "address"),
    [
        (["fe80::1/64", "192.0.2.7/24"], "192.0.2.7"),
        (["2001:db8::7/64", "fe80::1/64"], "2001:db8::7"),
        (["169.254.3.3/16", "127.0.0.1/8", "; rm -rf /"], None),
    ],
)
def test_the_address_of_a_guest_is_one_that_others_reach(told, address):
    assert first_address({"addresses": told}) == address
