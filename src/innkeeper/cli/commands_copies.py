"""The commands that make machines from machines: clones, templates, forks."""

from __future__ import annotations

from innkeeper.cli.arguments import (
    COPIES_OF,
    CPUS,
    DISK,
    FIRMWARE,
    IMAGE,
    NETWORK,
    NO_WAIT,
    SSH_KEY,
    TIMEOUT,
    USER_DATA,
    VM,
)
from innkeeper.cli.parser import duration, size
from innkeeper.cli.table import Argument as A
from innkeeper.cli.table import Command as C

TEMPLATE = A(("image",), "name of the template, or T:V for one version", {"metavar": "T"}, "image")

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
        "template create",
        COPIES_OF,
        "seal the disks of a stopped VM as a template",
        "templates:create",
        (
            VM,
            A(("--name",), "name of the template", {"metavar": "T", "required": True}),
            A(("--version",), "version; the next number by default", {"metavar": "V"}),
            A(
                ("--clean",),
                "remove host keys, machine-id, histories and what cloud-init left; VM keeps them",
                {"action": "store_true"},
            ),
            A(("--accept",), "seal it with whatever is found in it", {"action": "store_true"}),
            A(("--note",), "free text for people", {"metavar": "TEXT", "default": ""}),
            NO_WAIT,
        ),
        ("inn template create web --name web --clean", "inn template create web --name web --version 2026-11"),
        "document",
        "The disks are scanned for what must not be in an image: private keys, host keys, machine-id, histories, what "
        "cloud-init left, password hashes, tokens. What is found is listed, and refused without --accept. "
        "inn launch T starts from the newest version, T:V from that one.",
    ),
    C("template ls", COPIES_OF, "list templates", "templates:ls", (), ("inn template ls",), "list"),
    C(
        "template info",
        COPIES_OF,
        "everything about a template, the newest version or one of them",
        "images:info",
        (TEMPLATE,),
        ("inn template info web", "inn template info web:2"),
        "document",
    ),
    C(
        "template history",
        COPIES_OF,
        "the versions of a template, and what it stands on",
        "templates:history",
        (TEMPLATE,),
        ("inn template history web",),
        "document",
    ),
    C(
        "template verify",
        COPIES_OF,
        "prove that nobody has changed a template, or any image",
        "templates:verify",
        (A(("images",), "templates or images", {"metavar": "T", "nargs": "+"}, "image"), NO_WAIT),
        ("inn template verify web", "inn template verify debian-12"),
        "list",
        "Reads all of it and compares digests. An image that was changed by hand starts nothing any more.",
    ),
    C(
        "template rm",
        COPIES_OF,
        "remove versions of templates on which nothing stands",
        "images:remove",
        (A(("images",), "T:V; of T the newest version", {"metavar": "T", "nargs": "+"}, "image"), NO_WAIT),
        ("inn template rm web:1",),
        "list",
    ),
    C(
        "template warm",
        COPIES_OF,
        "boot an image, and capture the running guest to fork it",
        "forks:warm",
        (
            IMAGE,
            A(("--name",), "name of the warm image; IMAGE-warm by default", {"metavar": "N"}),
            CPUS,
            A(("--memory",), "RAM, like 1G (default 1G)", {"metavar": "SIZE", "type": size, "default": 1 << 30}),
            DISK,
            FIRMWARE,
            SSH_KEY,
            USER_DATA,
            NETWORK,
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
        "make running copies of a warm image, or of a VM that runs",
        "forks:fork",
        (
            A(("source",), "warm image, or running VM", {"metavar": "IMAGE|VM"}, "image"),
            A(("--snapshot",), "of the VM: go on from this one, which has memory", {"metavar": "SNAP"}),
            A(("--name",), "its name; with --count its beginning; a friendly one by default", {"metavar": "N"}),
            A(("--network",), "network that they come into", {"metavar": "NETWORK"}, "network"),
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
            "inn fork web --name web-try --network lab",
        ),
        "list",
        "Every fork is a machine of its own: hostname, machine-id, SSH host key, MAC, random seed.",
        rest=True,
    ),
)
