"""The commands for a VM's firewall rules and tags."""

from __future__ import annotations

from innkeeper.cli.arguments import BETWEEN, NO_WAIT, VM
from innkeeper.cli.table import Argument as A
from innkeeper.cli.table import Command as C

DIRECTION = A(("direction",), "in: what others open to the guest; out: what it opens", {"choices": ("in", "out")})
PEERS = "an address, a subnet, vm:NAME, tag:NAME, network:NAME, or host"
TAGS = A(("tags",), "words", {"metavar": "TAG", "nargs": "+"})
RULE = (
    VM,
    DIRECTION,
    A(
        ("protocol",),
        "any by default",
        {"choices": ("any", "tcp", "udp", "icmp"), "nargs": "?", "default": "any"},
    ),
    A(("ports",), "the receiver's, like 80 or 22,8000-8100; all by default", {"metavar": "PORTS", "nargs": "?"}),
    A(("--from",), f"in: who opens it: {PEERS}; anybody by default", {"metavar": "PEER", "dest": "source"}),
    A(("--to",), f"out: to whom: {PEERS}; anybody by default", {"metavar": "PEER"}),
    A(("--at",), "the number it gets; the last by default", {"metavar": "N", "type": int}),
    A(("--note",), "why, for people", {"metavar": "TEXT", "default": ""}),
    NO_WAIT,
)
FIRST_COUNTS = (
    "Of the rules for a direction the first that fits counts. It is in force at once; open connections go on."
)

FIREWALL: tuple[C, ...] = (
    C(
        "firewall ls",
        BETWEEN,
        "list the firewall rules of a VM, and how much each has judged",
        "firewall:ls",
        (VM,),
        ("inn firewall ls web",),
        "document",
    ),
    C(
        "firewall allow",
        BETWEEN,
        "let something into a VM, or out of it",
        "firewall:allow",
        RULE,
        (
            "inn firewall allow db in tcp 5432 --from tag:web",
            "inn firewall allow web in tcp 22 --from 192.0.2.0/24 --note 'the office'",
            "inn firewall allow web out udp 53 --to host",
        ),
        "document",
        FIRST_COUNTS + " What the network's mode keeps out comes in where a rule names it, in nat networks: guests of"
        " other networks, and whoever is outside and has a route. docs/networks-firewall.md.",
    ),
    C(
        "firewall deny",
        BETWEEN,
        "keep something out of a VM, or in it",
        "firewall:deny",
        RULE,
        ("inn firewall deny web out any --to 10.0.0.0/8", "inn firewall deny web in tcp 22 --from tag:guests --at 1"),
        "document",
        FIRST_COUNTS,
    ),
    C(
        "firewall default",
        BETWEEN,
        "say what becomes of what no rule of a VM fits",
        "firewall:default",
        (VM, DIRECTION, A(("action",), "what is done", {"choices": ("allow", "deny")}), NO_WAIT),
        ("inn firewall default db in deny", "inn firewall default sandbox out deny"),
        "document",
    ),
    C(
        "firewall rm",
        BETWEEN,
        "remove a firewall rule of a VM",
        "firewall:remove",
        (VM, A(("rule",), "its number", {"metavar": "N", "type": int}), NO_WAIT),
        ("inn firewall rm web 2",),
        "document",
    ),
    C(
        "firewall log",
        BETWEEN,
        "tell what the rules of a VM have denied within a day",
        "firewall:log",
        (VM,),
        ("inn firewall log web",),
        "document",
        "Each attempt once, with the number of its packets and the rule that denies it, as the rules are now.",
    ),
    C(
        "tag add",
        BETWEEN,
        "give a VM tags, by which firewall rules know it",
        "firewall:tag",
        (VM, TAGS, NO_WAIT),
        ("inn tag add web-1 web",),
        "document",
    ),
    C(
        "tag rm",
        BETWEEN,
        "take tags away from a VM",
        "firewall:untag",
        (VM, TAGS, NO_WAIT),
        ("inn tag rm web-1 web",),
        "document",
    ),
)
