"""Cards on interfaces of the host: what a spec may say, what they are plugged into, and the rules for them."""

import pytest
from pydantic import ValidationError

from innkeeper.base.errors import InvalidInput
from innkeeper.client.wishes import vm_spec
from innkeeper.operations.vm_update import _networks
from innkeeper.plan import macvtap
from innkeeper.plan.clone import plugged_into
from innkeeper.plan.network import OURS, macvtap_name, tap_name
from innkeeper.spec.nic import NicSpec


@pytest.mark.parametrize(
    ("nic", "why"),
    [
        ({"mode": "macvtap"}, "name theirs"),
        ({"mode": "user", "parent": "eth0"}, "do not fit"),
        ({"mode": "macvtap", "parent": "a b"}, "pattern"),
        ({"mode": "macvtap", "parent": "../eth0"}, "pattern"),
        ({"mode": "macvtap", "parent": "eth0", "network": "lab"}, "do not fit"),
        ({"mode": "macvtap", "parent": "eth0", "address": "10.0.0.2"}, "the network outside gives them"),
        ({"mode": "macvtap", "parent": "eth0", "publish": [{"host": 1, "guest": 1}]}, "the guest's own address"),
        ({"mode": "network", "network": "lab", "macvtap_mode": "vepa"}, "has no macvtap_mode"),
        ({"mode": "macvtap", "parent": "eth0", "vlan": 5}, "that is of sriov"),
        ({"mode": "network", "network": "lab", "backend": "passt"}, "that is of user"),
        (
            {"backend": "passt", "publish": [{"host": 1, "guest": 1, "address": "::1"}]},
            "has passt lead in over IPv4 only",
        ),
        ({"backend": "passt", "address": "10.0.2.16"}, "only Innkeeper's networks give them"),
        ({"backend": "passt", "limit": "1mbit"}, "could hold them back"),
        ({"mode": "sriov", "parent": "eth0", "link": "down"}, "QEMU does not have it in hand"),
        ({"mode": "sriov", "parent": "eth0", "vlan": 4095}, "4094"),
        ({"mode": "sriov", "parent": "eth0", "model": "e1000e"}, "leave the model out"),
        ({"mode": "macvtap", "parent": "eth0", "macvtap_mode": "passthru"}, "'bridge', 'vepa' or 'private'"),
    ],
)
def test_what_makes_no_sense_is_refused(nic, why):
    with pytest.raises(ValidationError, match=why):
        NicSpec.model_validate(nic)


def test_a_wish_has_one_way_of_being_plugged_in():
    (card,) = vm_spec("a", macvtap="eth0", macvtap_mode="vepa")["nics"]
    assert NicSpec.model_validate(card).parent == "eth0"
    assert card["mode"] == "macvtap" and card["macvtap_mode"] == "vepa"
    (card,) = vm_spec("a", sriov="eth0", vlan=7)["nics"]
    assert NicSpec.model_validate(card) == NicSpec(mode="sriov", parent="eth0", vlan=7)
    (card,) = vm_spec("a", nic="passt", publish=["8080:80"])["nics"]
    assert NicSpec.model_validate(card).backend == "passt" and card["mode"] == "user"
    assert "nics" not in vm_spec("a")
    for more in ({"network": "lab"}, {"nic": "none"}, {"nic": "user"}):
        with pytest.raises(InvalidInput, match="plugged in twice"):
            vm_spec("a", macvtap="eth0", **more)


def test_names_on_the_host_are_ours_and_fit():
    for name in (macvtap_name("0123456789ab", 7), tap_name("0123456789ab", 7)):
        assert len(name) <= 15 and name.startswith(OURS)
    assert not macvtap_name("0123456789ab", 7).startswith("inn-")  # the bridge's rules are for those


def test_a_running_vm_keeps_its_parent():
    one, other = ({"nics": [{"mode": "macvtap", "parent": parent}]} for parent in ("eth0", "eth1"))
    assert _networks(one) != _networks(other)


def test_a_copy_in_a_network_is_on_no_interface():
    (card,) = plugged_into([{"mode": "macvtap", "parent": "eth0", "macvtap_mode": "vepa"}], "lab")
    assert NicSpec.model_validate(card) == NicSpec(mode="network", network="lab")


def test_the_rules_of_a_macvtap_name_only_its_own_table():
    commands = macvtap.rules("innm-01234567-0", "52:54:00:00:00:01")
    for command in commands:
        ((_, what),) = next(iter(command.values())).items()
        assert what["family"] == "netdev"
        assert what.get("table", what.get("name")) == "innm-01234567-0"
    assert "'52:54:00:00:00:01'" in str(commands)
    assert str(commands).count("'drop': None") == str(commands).count("{'counter': 'dropped'}")
