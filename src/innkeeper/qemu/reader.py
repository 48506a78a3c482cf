"""A guest of ours that has the disks of another attached, to look into their file systems: no kernel but the guest's
own, in a QEMU without network and as an unprivileged user, reads what a stranger may have made."""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import AsyncIterator, Sequence
from contextlib import ExitStack, asynccontextmanager
from dataclasses import replace
from pathlib import Path

from innkeeper.base.errors import AgentUnavailable, QemuFailed
from innkeeper.host.facts import HostFacts
from innkeeper.plan.chain import Chain
from innkeeper.plan.devices import AGENT_PORT, volume
from innkeeper.plan.options import SANDBOX, Constants, Option
from innkeeper.qemu.agent import Agent
from innkeeper.qemu.errand import errand

BOOT = 180.0
"""Seconds that the guest gets to come up: it takes three under software emulation on an idle host."""
COMPUTING = 1800
"""Seconds of CPU time, and the kernel ends it."""
MEMORY = 384
"""MiB."""


@asynccontextmanager
async def reading(
    host: HostFacts, kernel: Path, initrd: Path, cmdline: str, disks: Sequence[Chain], *, user: int | None, write: bool
) -> AsyncIterator[Agent]:
    """The agent of a guest that sees `disks`, paths absolute, as /dev/vda, /dev/vdb, … It lives as long as the block.

    `write`: their top layers may be written to, else nothing. `user` is the uid it runs as. All layers go in as
    descriptors. Raises `QemuFailed`, `AgentUnavailable`.
    """
    assert host.qemu is not None
    with ExitStack() as files:
        ours, theirs = socket.socketpair()
        files.callback(ours.close)
        files.callback(theirs.close)
        fds = [theirs.fileno()]
        accelerator = host.accelerator
        options = [
            *(Option(word) for word in ("-nodefaults", "-no-user-config", "-no-reboot")),
            Option("-display", "none"),
            Option("-machine", Constants(host.qemu.machine)),
            Option("-accel", Constants(accelerator.name)),
            Option("-cpu", accelerator.cpu_model),
            Option("-m", Constants(keys={"size": f"{MEMORY}M"})),
            SANDBOX,
            Option("-kernel", str(kernel)),
            Option("-initrd", str(initrd)),
            Option("-append", cmdline),
            Option("-device", {"driver": "virtio-serial-pci", "id": "serial"}),
            Option("-chardev", Constants("socket", {"id": "agent", "fd": theirs.fileno()})),
            Option("-device", {"driver": "virtserialport", "chardev": "agent", "name": AGENT_PORT}),
        ]
        number = 0
        for disk in disks:
            below: str | None = None
            for layer in disk:
                number += 1
                writable = write and layer is disk[-1]
                fd = os.open(layer.path, (os.O_RDWR if writable else os.O_RDONLY) | os.O_CLOEXEC | os.O_NOFOLLOW)
                files.callback(os.close, fd)
                fds.append(fd)
                options.append(Option("-add-fd", f"fd={fd},set={number}"))
                handed = replace(layer, path=f"/dev/fdset/{number}", own=False)
                options.append(Option("-blockdev", volume(handed, below, read_only=not writable)))
                below = layer.node
            options.append(Option("-device", {"driver": "virtio-blk-pci", "drive": below}))
        groups = (host.kvm_group,) if host.kvm_group is not None and accelerator.name == "kvm" else ()
        arguments = [host.qemu.path, *(word for option in options for word in option.words())]
        account = None if user is None else (user, groups)
        async with errand(arguments, pass_fds=fds, account=account, cpu=COMPUTING) as process:
            theirs.close()
            agent = Agent(Path("/"))
            try:
                await agent.dial(ours)
                await agent.connect(BOOT)
                yield agent
            except AgentUnavailable as error:
                said = await _last_words(process)
                raise QemuFailed(
                    f"the guest that looks into the disks does not answer: {said or error.detail}"
                ) from None
            finally:
                await agent.close()


async def _last_words(process: asyncio.subprocess.Process) -> str:
    if process.returncode is None:
        return ""
    assert process.stderr is not None
    return (await process.stderr.read()).decode(errors="replace").strip()[-1000:]
