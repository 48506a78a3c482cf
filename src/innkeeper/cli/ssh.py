"""`inn ssh`, and the ssh command line that `inn cp` uses too.

The guest's host key comes from the daemon, which made it and handed it in at first boot. It goes into a known_hosts
file of its own under an alias, so a port that another guest gets later raises no false alarm and hides no true one.
"""

from __future__ import annotations

import os
import shlex
import shutil
import socket
import time
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from innkeeper.base.errors import ActionRefused, InvalidInput, ToolMissing
from innkeeper.cli import identity, terminal
from innkeeper.cli.keys import private_keys
from innkeeper.client import VM, Innkeeper

SSHD_DEADLINE = 60.0
"""Seconds to wait for a guest that is still booting."""
HELLO = b"SSH-2.0-innkeeper\r\n"
"""Either side may greet first (RFC 4253, 4.2); behind a passt of 2023 the guest hears of nobody who waits for it to."""


def ssh(inn: Innkeeper, args: Namespace) -> int:
    """Become the system's ssh; its exit status is the command's (255 where ssh itself failed)."""
    way = reachable(inn.vm(args.vm))
    command = command_line(way, args.identity)
    if args.tty:
        command.append("-t")
    command += [_destination(way, args.login)]
    if args.argv:
        command += ["--", args.argv[0] if len(args.argv) == 1 else shlex.join(args.argv)]
    wait_for_sshd(way)
    os.execvp(command[0], command)


def reachable(vm: VM) -> dict[str, Any]:
    """How to reach its SSH server. Raises `ActionRefused` where it does not run, `ApiError` where it has none."""
    way = vm.ssh()
    if (state := vm.state) not in ("running", "starting"):
        hint = f"inn {'resume' if state == 'paused' else 'start'} {vm.name}"
        raise ActionRefused(f"{vm.name} is {state}", hint=hint)
    return way


def command_line(way: dict[str, Any], identities: Sequence[str] | None = None) -> list[str]:
    """`ssh` with every option that reaching this guest takes; the destination is not in it yet.

    `way` is what `VM.ssh` answered. Raises `ToolMissing` without ssh, `InvalidInput` for an identity that is not there.
    """
    if not shutil.which("ssh"):
        raise ToolMissing("ssh is not installed", hint="apt-get install openssh-client", package="openssh-client")
    for name in identities or ():
        if not Path(name).is_file():
            raise InvalidInput(f"there is no SSH key {name}")
    vm_id = str(way["alias"])
    known = identity.known_hosts(vm_id, vm_id, str(way["host_key"]))
    keys = [Path(name) for name in identities or ()] or [*identity.remembered(vm_id), *private_keys()]
    options = {
        "Port": way["port"],
        "HostKeyAlias": vm_id,
        "UserKnownHostsFile": _quoted(known),
        "GlobalKnownHostsFile": "/dev/null",
        "StrictHostKeyChecking": "yes",
        "UpdateHostKeys": "no",
        "CheckHostIP": "no",
        "LogLevel": "ERROR",
        "ServerAliveInterval": "30",
    }
    command = ["ssh"]
    for name, value in options.items():
        command += ["-o", f"{name}={value}"]
    for key in dict.fromkeys(keys):
        command += ["-o", f"IdentityFile={_quoted(key)}"]
    return command


def _destination(way: dict[str, Any], login: str | None = None) -> str:
    return f"{login or way['user']}@{way['address']}"


def full_command_line(way: dict[str, Any], identities: Sequence[str] | None = None) -> list[str]:
    """The same with the destination: what follows is the guest's command line."""
    return [*command_line(way, identities), _destination(way), "--"]


def _quoted(path: Path) -> str:
    """A path as ssh_config(5) reads it: spaces quoted, `%` not a token."""
    return '"' + str(path).replace("%", "%%").replace('"', '\\"') + '"'


def wait_for_sshd(way: dict[str, Any], deadline: float = SSHD_DEADLINE) -> None:
    """Wait until something greets as SSH does (RFC 4253, 4.2). After the deadline ssh may try and say why not."""
    end = time.monotonic() + deadline
    said = False
    while not _greets(str(way["address"]), int(way["port"])):
        if time.monotonic() > end:
            return
        if not said:
            terminal.note("waiting for the guest's SSH server …")
            said = True
        time.sleep(0.5)


def _greets(address: str, port: int) -> bool:
    try:
        with socket.create_connection((address, port), timeout=5) as connection:
            connection.sendall(HELLO)
            return connection.recv(4) == b"SSH-"
    except OSError:
        return False
