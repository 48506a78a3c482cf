"""What a VM's NICs are after a change, and what nftables is told of published ports."""

import sys
from pathlib import Path

import pytest

from innkeeper.base.errors import ActionRefused, InvalidInput, NotFound, PortTaken, Unsupported
from innkeeper.network.traffic import Seen, Traffic
from innkeeper.plan import ruleset
from innkeeper.plan.devices import card
from innkeeper.plan.network import Nic
from innkeeper.plan.nft import DROP
from innkeeper.plan.wiring import changed, check_live, replugged
from innkeeper.spec.nic import NicSpec, PortForward
from innkeeper.spec.wiring import AddNic, Publish, RemoveNic, SetNic, Unpublish

sys.path.insert(0, str(Path(__file__).parents[1] / "golden"))
from specs import CASES, ON_HOST

BY_NAME = {case.name: case for case in (*CASES, *ON_HOST)}


def vm(case="default"):
    return BY_NAME[case].vmspec(), BY_NAME[case].identity()


def port(host, guest=80, **more):
    return PortForward(host=host, guest=guest, **more)


def test_a_port_comes_and_goes():
    spec, identity = changed(*vm(), Publish(forward=port(8080)))
    assert spec.nics[0].publish == (port(8080),)
    assert changed(spec, identity, Unpublish(host=8080)) == vm()
    with pytest.raises(NotFound, match="does not publish host port 8080/udp"):
        changed(spec, identity, Unpublish(host=8080, protocol="udp"))
    with pytest.raises(PortTaken, match="leads to port 80 of"):
        changed(spec, identity, Publish(forward=port(8080, 81, address="192.0.2.1")))
    with pytest.raises(PortTaken, match="leads to SSH"):
        changed(spec, identity, Publish(forward=port(identity.ssh_port)))
    with pytest.raises(NotFound, match="has no card 1"):
        changed(spec, identity, Publish(forward=port(81), nic=1))


def test_a_port_of_qemus_own_nat_is_ipv4():
    spec, _ = changed(*vm(), Publish(forward=port(8080, address="::")))
    assert spec.nics[0].publish == (port(8080, address="0.0.0.0"),)
    with pytest.raises(InvalidInput, match="over IPv4 only, not from ::1"):
        changed(*vm(), Publish(forward=port(8080, address="::1")))


@pytest.mark.parametrize(
    ("address", "families"),
    [("::", [4, 6]), ("0.0.0.0", [4]), ("192.0.2.1", [4]), ("2001:db8::1", [6]), ("127.0.0.1", [4])],
)
def test_a_port_leads_in_over_the_ip_versions_of_its_address(address, families):
    def targets(address6):
        nic = Nic(
            "0123456789ab", "web", 0, "n", "52:54:00:00:00:01", "10.77.0.2", address6, (port(80, address=address),)
        )
        rules = [c["add"]["rule"]["expr"] for c in ruleset.publish_added(nic) if "rule" in c.get("add", {})]
        return [rule[-1]["dnat"]["addr"] for rule in rules if "dnat" in rule[-1]]

    to = {4: "10.77.0.2", 6: "fd00::2"}
    assert targets("fd00::2") == [to[version] for version in families]
    assert targets(None) == [to[version] for version in families if version == 4]


def test_a_port_needs_a_card_that_is_plugged_in():
    with pytest.raises(ActionRefused, match="no network card that is plugged in"):
        changed(*vm("nic-none"), Publish(forward=port(80)))
    with pytest.raises(ActionRefused, match="of mode none"):
        changed(*vm("nics-three"), Publish(forward=port(80), nic=1))


@pytest.mark.parametrize("case", ["nic-macvtap", "nic-sriov"])
def test_a_card_on_an_interface_of_the_host_has_no_ports_and_comes_into_no_network(case):
    spec, identity = vm(case)
    spec = spec.model_copy(update={"nics": spec.nics[:1]})
    parent = spec.nics[0].parent
    for change, words in (
        (Publish(forward=port(80)), f"no card of {spec.name} can have a port published; card 0 is of mode"),
        (Publish(forward=port(80), nic=0), f"past this host, and others outside {parent} reach the guest's own"),
        (SetNic(index=0, network="lab"), f"card 0 is on {parent} of the host, past Innkeeper's networks"),
        (SetNic(index=0, limit="1mbit"), "takes no limit: its packets pass nothing of the host's"),
        (SetNic(index=0, address="10.77.0.2"), "cannot be given an address: the network outside gives them"),
    ):
        with pytest.raises((ActionRefused, InvalidInput), match=words):
            changed(spec, identity, change)


def test_a_card_with_passt_is_one_of_user_mode():
    spec, identity = vm("nic-passt")
    new, _ = changed(spec, identity, Publish(forward=port(81, address="::")))
    assert new.nics[0].publish[-1] == port(81, address="0.0.0.0")
    for change, words in (
        (Publish(forward=port(81, address="::1")), "has passt lead in over IPv4 only"),
        (SetNic(index=0, limit="1mbit"), "takes no limit"),
        (SetNic(index=0, address="10.0.2.16"), "only Innkeeper's networks give them"),
    ):
        with pytest.raises(InvalidInput, match=words):
            changed(spec, identity, change)
    change = SetNic(index=0, network="lab")
    assert changed(spec, identity, change)[0].nics[0].backend == "qemu"
    with pytest.raises(ActionRefused, match="the mode of card 0 is user"):
        check_live(spec, identity, change)


def test_cards_keep_their_numbers_and_their_places():
    before, pinned = vm("nics-three")
    spec, identity = changed(before, pinned, RemoveNic(index=1))
    assert [nic.mode for nic in spec.nics] == ["user", "absent", "user"] and identity.cards == 3
    with pytest.raises(NotFound, match="no card 1"):
        changed(spec, identity, RemoveNic(index=1))
    spec, identity = changed(spec, identity, AddNic(nic=NicSpec(mode="none")))
    assert (spec.nics, identity.cards) == (before.nics, 3)
    assert card(1, spec.nics[1], identity)["bus"] == "port-nic1"
    spec, identity = changed(spec, identity, RemoveNic(index=1))
    spec, identity = changed(spec, identity, RemoveNic(index=2))
    assert len(spec.nics) == 1, "empty places at the end are none"


def test_cards_that_are_added_sit_behind_spare_ports():
    spec, identity = vm()
    for index in range(1, 5):
        spec, identity = changed(spec, identity, AddNic(nic=NicSpec()))
        macs = identity.model_copy(update={"macs": ("52:54:00:00:00:01",) * 5})
        assert card(index, spec.nics[index], macs)["bus"] == f"spare{index - 1}"
    with pytest.raises(Unsupported, match="no place for another card"):
        changed(spec, identity, AddNic(nic=NicSpec()))


def test_two_cards_of_a_vm_have_two_macs():
    with pytest.raises(InvalidInput, match="this MAC address already"):
        changed(*vm("nics-three"), AddNic(nic=NicSpec(mac="52:54:00:aa:bb:cc")))


def in_lab(**more):
    spec, identity = vm()
    return spec.model_copy(update={"nics": (NicSpec(mode="network", network="lab", **more),)}), identity


def test_what_a_change_of_a_card_does_not_name_stays():
    before, identity = in_lab(address="10.77.0.9", limit="10mbit", publish=(port(8080),))
    (card,), _ = changed(before, identity, SetNic(index=0, network="den", link="down"))[0].nics, None
    assert card == before.nics[0].model_copy(update={"network": "den", "address": None, "link": "down"})
    spec, _ = changed(before, identity, SetNic(index=0, network="lab", limit="none"))
    assert spec.nics[0] == before.nics[0].model_copy(update={"limit": None})
    spec, _ = changed(*vm(), SetNic(index=0, network="lab", address="10.77.0.3", limit=64000))
    assert (spec.nics[0].mode, spec.nics[0].address, spec.nics[0].limit) == ("network", "10.77.0.3", 64000)


def test_what_a_card_cannot_become():
    for given, change, words in (
        (vm(), SetNic(index=0), "nothing of the card is to change"),
        (vm(), SetNic(index=0, limit="1mbit"), "mode 'user' takes no limit"),
        (vm("nics-three"), SetNic(index=1, link="down"), "no cable to pull out"),
        (in_lab(), SetNic(index=0, mac="52:54:00:12:34"), "not a MAC address"),
    ):
        with pytest.raises(InvalidInput, match=words):
            changed(*given, change)
    with pytest.raises(NotFound, match="no card 1"):
        changed(*vm(), SetNic(index=1, link="down"))


def test_what_a_card_of_a_running_vm_cannot_become():
    lab, identity = in_lab()
    check_live(lab, identity, SetNic(index=0, network="den", model="virtio", mac=identity.macs[0], limit="1gbit"))
    for given, change, words in (
        (lab, SetNic(index=0, model="e1000e"), "the model of card 0 is virtio for as long as"),
        (lab, SetNic(index=0, mac="52:54:00:aa:bb:cc"), "the MAC address of card 0 is 52:54"),
        (vm()[0], SetNic(index=0, network="lab"), "the mode of card 0 is user"),
    ):
        with pytest.raises(ActionRefused, match=words):
            check_live(given, identity, change)


def test_a_guest_has_to_ask_anew_where_its_network_or_its_address_is_another():
    (lab, _), (fixed, _) = in_lab(), in_lab(address="10.77.0.9")
    den, _ = changed(*in_lab(), SetNic(index=0, network="den"))
    assert replugged(lab, den) == replugged(lab, fixed) == [0]
    assert replugged(lab, in_lab(limit="1mbit")[0]) == replugged(lab, vm()[0]) == []


def test_a_limit_is_in_the_rules_of_the_card():
    def rules(limit):
        nic = Nic("0123456789ab", "web", 0, "n", "52:54:00:00:00:01", "10.77.0.2", None, limit=limit)
        return [c["add"]["rule"]["expr"] for c in ruleset.nic_added(nic) if "rule" in c.get("add", {})]

    assert not any("limit" in str(rule) for rule in rules(None))
    (held, drop) = next(rule for rule in rules(100_000_000) if "limit" in str(rule))
    assert held["limit"]["rate"] == 12_500_000 and held["limit"]["rate_unit"] == "bytes" and held["limit"]["inv"]
    assert held["limit"]["burst"] > 65536 and drop == DROP


def test_what_is_made_for_a_port_is_what_is_taken_away():
    def nic(*ports):
        return Nic("0123456789ab", "web", 0, "n", "52:54:00:00:00:01", "10.77.0.2", None, ports)

    for before, after in ((nic(), nic(port(80))), (nic(port(80)), nic()), (nic(port(80)), nic(port(81), port(82)))):
        there = ruleset.publish_added(before)
        names = {word for word in ruleset.objects(there) if "-n" in word}
        assert bool(names) == bool(before.publish)
        removed = [c for c in ruleset.nic_changed(before, after) if "delete" in c and "chain" in c["delete"]]
        assert len(removed) == (2 if before.publish else 0)


def test_traffic_goes_on_over_counters_that_begin_anew():
    traffic, key = Traffic(), ("inn-x-0", "tcp", 80)
    traffic.look({key: (0, 0)})
    assert traffic.of(*key) == Seen()
    traffic.look({key: (3, 180)})
    traffic.look({key: (3, 180)})
    traffic.look({key: (1, 60)})
    seen = traffic.of(*key)
    assert (seen.packets, seen.bytes) == (4, 240) and seen.last
    traffic.look({})
    assert traffic.of(*key) == Seen()
