"""What a VM's NICs are after a change, and what nftables is told of published ports."""

import sys
from pathlib import Path

import pytest

from innkeeper.base.errors import ActionRefused, InvalidInput, NotFound, PortTaken, Unsupported
from innkeeper.network.traffic import Seen, Traffic
from innkeeper.plan import ruleset
from innkeeper.plan.devices import card
from innkeeper.plan.network import Nic
from innkeeper.plan.wiring import changed
from innkeeper.spec.nic import NicSpec, PortForward
from innkeeper.spec.wiring import AddNic, Publish, RemoveNic, Unpublish

sys.path.insert(0, str(Path(__file__).parents[1] / "golden"))
from specs import CASES

BY_NAME = {case.name: case for case in CASES}


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


def test_a_port_needs_a_card_that_is_plugged_in():
    with pytest.raises(ActionRefused, match="no network card that is plugged in"):
        changed(*vm("nic-none"), Publish(forward=port(80)))
    with pytest.raises(ActionRefused, match="of mode none"):
        changed(*vm("nics-three"), Publish(forward=port(80), nic=1))


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


def test_what_is_made_for_a_port_is_what_is_taken_away():
    def nic(*ports):
        return Nic("0123456789ab", "web", 0, "n", "52:54:00:00:00:01", "10.77.0.2", None, ports)

    for before, after in ((nic(), nic(port(80))), (nic(port(80)), nic()), (nic(port(80)), nic(port(81), port(82)))):
        there = ruleset.publish_added(before)
        names = {word for word in ruleset.objects(there) if "-n" in word}
        assert bool(names) == bool(before.publish)
        removed = [c for c in ruleset.publish_changed(before, after) if "delete" in c and "chain" in c["delete"]]
        assert bool(removed) == bool(before.publish)


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
