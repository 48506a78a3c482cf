"""The commands that make machines from machines: clones, templates, forks."""

from __future__ import annotations

from innkeeper.cli.arguments import COPIES_OF, IMAGE, NO_WAIT, TIMEOUT, VM
from innkeeper.cli.parser import duration, size
from innkeeper.cli.table import Argument as A
from innkeeper.cli.table import Command as C

COPIES: tuple[C, ...] = (
    C(
        "clone",
        COPIES_OF,
        "make a VM of its own with the disks of another, running or not",
        "clones:clone",
        (
            VM,
            A(("name",), "name of the clone, which is also its hostname", {"metavar": "NEW"}),
            A(("--full",), "copy the disks (default)", {"action": "store_true"}),
            A(("--linked",), "share them: made at once, and VM stays for as long as NEW", {"action": "store_true"}),
            A(
                ("--keep-identity",),
                "UUID, MACs, hostname, machine-id and SSH host keys stay those of VM",
                {"action": "store_true"},
            ),
            A(("--quiesce",), "have the guest freeze its file systems for the moment", {"action": "store_true"}),
            NO_WAIT,
        ),
        ("inn clone web web-2", "inn clone db db-test --linked --quiesce"),
        "document",
        "The clone is stopped, has no snapshots and publishes no ports. At its first start it becomes a machine of its "
        "own, also inside.",
    ),
    C(
        "template warm",
        COPIES_OF,
        "boot an image, and capture the running guest to fork it",
        "forks:warm",
        (
            IMAGE,
            A(("--name",), "name of the warm image; IMAGE-warm by default", {"metavar": "N"}),
            A(("--cpus",), "vCPUs (default 2)", {"metavar": "N", "type": int}),
            A(("--memory",), "RAM, like 1G (default 1G)", {"metavar": "SIZE", "type": size, "default": 1 << 30}),
            A(
                ("--disk",),
                "size of the first disk, like 20G (default 20G); repeat for more disks",
                {"metavar": "SIZE", "action": "append", "type": size},
            ),
            A(("--firmware",), "bios (default) or uefi", {"choices": ("bios", "uefi")}),
            A(
                ("--ssh-key",),
                "public key, or private key beside its .pub; by default those in ~/.ssh, or one that is made",
                {"metavar": "FILE", "action": "append"},
                "file",
            ),
            A(("--user-data",), "cloud-init user-data; - is stdin", {"metavar": "FILE"}, "file"),
            A(("--until",), "shell command in the guest that has to end well before", {"metavar": "CMD"}),
            A(("--refresh",), "make it anew where there is one", {"action": "store_true"}),
            TIMEOUT,
            NO_WAIT,
        ),
        (
            "inn template warm debian-12",
            "inn template warm debian-12 --name ci --user-data ci.yaml --until 'systemctl is-active docker'",
        ),
        "document",
        "Each fork goes on where the captured guest was. Forks cannot publish ports; their SSH is forwarded.",
    ),
    C(
        "fork",
        COPIES_OF,
        "make running copies of a warm image",
        "forks:fork",
        (
            IMAGE,
            A(("--name",), "its name; with --count its beginning; a friendly one by default", {"metavar": "N"}),
            A(("--count",), "how many (default 1)", {"metavar": "N", "type": int, "default": 1}),
            A(("--rm",), "delete it when the command has ended", {"action": "store_true"}),
            A(("--ttl",), "delete it by itself after this time, like 10m", {"metavar": "TIME", "type": duration}),
            A(("--force",), "even where the host has too little memory", {"action": "store_true"}),
            A(
                ("--env", "-e"),
                "environment variable of the command, K=V, or K with its value here; may be repeated",
                {"metavar": "K[=V]", "action": "append"},
            ),
            A(("--cwd",), "folder to run the command in", {"metavar": "DIR"}),
            A(("--timeout",), "how long the command may take, like 90s", {"metavar": "TIME", "type": duration}),
            A(("--no-stdin",), "do not pass our stdin on", {"action": "store_true"}),
            NO_WAIT,
        ),
        (
            "inn fork debian-12 --rm -- python3 -c 'print(6*7)'",
            "inn fork debian-12-warm --count 20 --ttl 1h",
        ),
        "list",
        "Every fork is a machine of its own: hostname, machine-id, SSH host key, MAC, random seed.",
        rest=True,
    ),
)
