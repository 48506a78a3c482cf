"""A disk's chain opened by a QEMU without a machine, so that layers of a VM that does not have them open can be merged
by the same jobs as of one that runs."""

from __future__ import annotations

import os
import socket
from collections.abc import AsyncIterator
from contextlib import ExitStack, asynccontextmanager
from dataclasses import replace

from innkeeper.base.errors import QemuFailed
from innkeeper.plan.chain import Chain
from innkeeper.plan.devices import volume
from innkeeper.plan.options import SANDBOX, Option
from innkeeper.qemu.errand import errand
from innkeeper.qemu.monitor import Monitor


@asynccontextmanager
async def opened(binary: str, chain: Chain, uid: int | None) -> AsyncIterator[Monitor]:
    """The QMP of a QEMU that has the chain open, all paths absolute, its top for writing. It lives as long as the
    block, and never longer than its asker. `uid` is the user it runs as; None for ours. Raises `QemuFailed`."""
    with ExitStack() as files:
        ours, theirs = socket.socketpair()
        files.callback(ours.close)
        files.callback(theirs.close)
        fds = [theirs.fileno()]
        arguments = [
            binary,
            *("-nodefaults", "-no-user-config", "-display", "none", "-machine", "none", "-accel", "tcg", "-S"),
            *SANDBOX.words(),
            *("-chardev", f"socket,id=qmp,fd={theirs.fileno()}", "-mon", "chardev=qmp,mode=control"),
        ]
        below: str | None = None
        for number, layer in enumerate(chain, start=1):
            if layer.handed:
                fd = os.open(layer.path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
                files.callback(os.close, fd)
                fds.append(fd)
                arguments += Option("-add-fd", f"fd={fd},set={number}").words()
                layer = replace(layer, path=f"/dev/fdset/{number}")
            arguments += Option("-blockdev", volume(layer, below, read_only=layer is not chain[-1])).words()
            below = layer.node
        try:
            async with errand(arguments, pass_fds=fds, account=None if uid is None else (uid, ()), cpu=None) as process:
                theirs.close()
                try:
                    monitor = await Monitor.over(ours)
                except Exception as error:
                    process.kill()
                    assert process.stderr
                    said = (await process.stderr.read()).decode(errors="replace").strip()
                    raise QemuFailed(f"the disk's layers cannot be opened: {said or error}", stderr=said) from None
                try:
                    yield monitor
                    await monitor.execute("quit")  # closes the files, with all that is in memory
                    await process.wait()
                finally:
                    await monitor.close()
        except OSError as error:
            raise QemuFailed(f"{binary} cannot be started: {error}", hint="reinstall QEMU") from None
