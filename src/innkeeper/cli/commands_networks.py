"""The commands for networks."""

from __future__ import annotations

from innkeeper.cli.arguments import ADDRESS, BETWEEN, LIMIT, MACVTAP, MACVTAP_MODE, NETWORK, NO_WAIT, SRIOV, VLAN, VM
from innkeeper.cli.parser import new_rate, ports
from innkeeper.cli.table import Argument as A
from innkeeper.cli.table import Command as C

CARD = A(("card",), "its number or its MAC address", {"metavar": "CARD"})

NETWORKS: tuple[C, ...] = (
    C(
        "network create",
        BETWEEN,
        "make a network for VMs to join",
        "networks:create",
        (
            A(("name",), "its name", {"metavar": "NAME"}),
            A(
                ("--mode",),
                "nat: guests reach out (default); host-only: they and the host; internal: they alone; bridged: they are"
                " on the network outside",
                {"choices": ("nat", "host-only", "internal", "bridged")},
            ),
            A(
                ("--parent",),
                "bridged: the host's interface or bridge that leads outside, like eth0 or br0",
                {"metavar": "INTERFACE"},
            ),
            A(("--subnet",), "private IPv4, like 10.77.0.0/24; one that is free by default", {"metavar": "SUBNET"}),
            A(("--no-ipv6",), "IPv4 only", {"action": "store_true"}),
            A(("--dns-domain",), "guests find each other as NAME.DOMAIN; inn by default", {"metavar": "DOMAIN"}),
            A(("--mtu",), "bytes that a packet has at most", {"metavar": "BYTES", "type": int}),
            A(("--note",), "free text for people", {"metavar": "TEXT", "default": ""}),
            NO_WAIT,
        ),
        (
            "inn network create lab",
            "inn network create vault --mode internal --no-ipv6",
            "inn network create lan --parent eth0",
        ),
        "document",
        "Needs a daemon that runs as root. Guests get their address by DHCP and find each other as NAME.inn; in a "
        "bridged network, from the DHCP server outside. docs/networks.md tells which mode fits.",
    ),
    C("network ls", BETWEEN, "list networks", "networks:ls", (), ("inn network ls",), "list"),
    C(
        "network info",
        BETWEEN,
        "everything about one network, and who is in it",
        "networks:info",
        (A(("network",), "name of the network", {"metavar": "NETWORK"}, "network"),),
        ("inn network info lab",),
        "document",
    ),
    C(
        "network doctor",
        BETWEEN,
        "find what keeps guests from the network: firewalls, routes, names",
        "network_doctor:doctor",
        (
            A(("network",), "name of one network; all by default", {"metavar": "NETWORK", "nargs": "?"}, "network"),
            A(("--fix",), "put right what is safe to", {"action": "store_true"}),
        ),
        ("inn network doctor", "inn network doctor lab --fix"),
        "document",
        "Ends with 1 where something is wrong. What belongs to other programs is never changed: the command is shown.",
    ),
    C(
        "network check",
        BETWEEN,
        "follow a connection from a guest to a target, and say where it ends",
        "network_check:check",
        (
            VM,
            A(("target",), "address or name, and port: example.com:443, [fd00::1]:80", {"metavar": "HOST:PORT"}),
            A(("--udp",), "UDP instead of TCP", {"action": "store_true"}),
        ),
        ("inn network check web example.com:443", "inn network check web db.inn:53 --udp"),
        "document",
        "The guest's agent sends the probe. Ends with 1 where the target is not reached.",
    ),
    C(
        "publish",
        BETWEEN,
        "have a port of the host lead into a VM, running or not",
        "ports:publish",
        (
            VM,
            A(("mapping",), "HOST:GUEST, of UDP with /udp", {"metavar": "PORTS", "type": ports}),
            A(
                ("--bind",),
                "address of the host that listens; :: (default) is all, 0.0.0.0 all of IPv4",
                {"metavar": "ADDR"},
            ),
            A(("--nic",), "number of the card; the first that is plugged in by default", {"metavar": "N", "type": int}),
            A(("--note",), "why, for people", {"metavar": "TEXT", "default": ""}),
            NO_WAIT,
        ),
        ("inn publish web 8080:80", "inn publish dns 53:53/udp --bind 192.0.2.1 --note 'for the lab'"),
        "document",
        "Into networks of mode nat, over IPv4 and IPv6; and through the user-mode NAT of a card without network, which "
        "does IPv4 only.",
    ),
    C(
        "unpublish",
        BETWEEN,
        "have a port of the host lead nowhere again",
        "ports:unpublish",
        (VM, A(("port",), "port on the host, of UDP with /udp", {"metavar": "PORT"}), NO_WAIT),
        ("inn unpublish web 8080", "inn unpublish dns 53/udp"),
        "document",
        "Connections into a network end at once; those through a user-mode NAT go on until they end by themselves.",
    ),
    C(
        "ports",
        BETWEEN,
        "every port of the host that leads into a VM: where to, who made it, why, when it was last used",
        "ports:ls",
        (),
        ("inn ports", "inn ports -o markdown > ports.md"),
        "report",
    ),
    C(
        "nic ls",
        BETWEEN,
        "list the network cards of a VM",
        "nics:ls",
        (VM,),
        ("inn nic ls web",),
        "list",
    ),
    C(
        "nic add",
        BETWEEN,
        "plug one more network card into a VM, running or not",
        "nics:add",
        (
            VM,
            NETWORK,
            MACVTAP,
            MACVTAP_MODE,
            SRIOV,
            VLAN,
            A(
                ("--mode",),
                "without --network: user (default), QEMU's NAT; passt; or none for no cable",
                {"choices": ("user", "passt", "none")},
            ),
            A(("--model",), "virtio (default) or e1000e", {"choices": ("virtio", "e1000e"), "default": "virtio"}),
            A(("--mac",), "its MAC address; by default made from the VM's id", {"metavar": "MAC"}),
            ADDRESS,
            LIMIT,
            NO_WAIT,
        ),
        ("inn nic add web --network lab", "inn nic add web --network lab --address 10.77.0.80"),
        "document",
    ),
    C(
        "nic set",
        BETWEEN,
        "change a network card of a VM, running or not",
        "nics:change",
        (
            VM,
            CARD,
            A(("--network",), "another network, where it gets another address", {"metavar": "NETWORK"}, "network"),
            A(("--address",), "another IPv4 address in its network", {"metavar": "ADDRESS"}),
            A(
                ("--limit",),
                "most that it sends, and most that it receives, per second, like 100mbit; or none",
                {"metavar": "RATE", "type": new_rate},
            ),
            A(("--link",), "down: as if its cable had been pulled out", {"choices": ("up", "down")}),
            A(("--model",), "of a stopped VM", {"choices": ("virtio", "e1000e")}),
            A(("--mac",), "of a stopped VM: its MAC address", {"metavar": "MAC"}),
            NO_WAIT,
        ),
        ("inn nic set web 0 --network lab", "inn nic set web 0 --limit 100mbit", "inn nic set web 1 --link down"),
        "document",
        "A guest that comes into another network sees its cable out for a second, so that it asks for an address anew.",
    ),
    C(
        "nic rm",
        BETWEEN,
        "take a network card away from a VM, running or not",
        "nics:remove",
        (VM, CARD, NO_WAIT),
        ("inn nic rm web 1",),
        "document",
        "The other cards keep their numbers, MACs and addresses. The guest has to let go of it.",
    ),
    C(
        "network rm",
        BETWEEN,
        "remove networks that no VM is in",
        "networks:remove",
        (A(("networks",), "names of networks", {"metavar": "NETWORK", "nargs": "+"}, "network"), NO_WAIT),
        ("inn network rm lab",),
        "list",
    ),
)
