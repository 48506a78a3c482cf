"""A QEMU that lives for one question: it boots nothing of a user's, has limits, and never outlives its asker."""

from __future__ import annotations

import asyncio
import os
import resource
import shutil
from collections.abc import AsyncIterator, Iterable, Sequence
from contextlib import asynccontextmanager, suppress
from typing import Any

from innkeeper.base.child import start_child

CPU_SECONDS = 10
"""The kernel ends an errand that computes longer, should nobody be left to do so."""

Account = tuple[int, tuple[int, ...]]
"""(uid = gid, supplementary groups) that a process runs as."""


@asynccontextmanager
async def errand(
    arguments: Sequence[str],
    *,
    pass_fds: Iterable[int] = (),
    account: Account | None = None,
    cpu: int | None = CPU_SECONDS,
) -> AsyncIterator[asyncio.subprocess.Process]:
    """Run a QEMU, stdout and stderr piped, for the length of the block; then it is killed and reaped.

    Also when the block fails or is cancelled; if this process itself is killed, the kernel ends QEMU (setpriv's
    --pdeathsig, where util-linux is there). `account` needs root; `cpu` limits its
    computing, in seconds. Raises `OSError` where QEMU cannot be started.
    """
    setpriv = shutil.which("setpriv")
    prefix = [setpriv, "--pdeathsig", "KILL", "--no-new-privs"] if setpriv else []
    drop: dict[str, Any] = {}
    if account:
        drop = {"user": account[0], "group": account[0], "extra_groups": account[1]}
    process = await start_child(
        *prefix,
        *arguments,
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        start_new_session=True,
        pass_fds=tuple(pass_fds),
        cwd="/",
        env={"PATH": os.defpath, "LC_ALL": "C"},
        **drop,
    )
    try:
        if cpu is not None:
            with suppress(OSError):
                resource.prlimit(process.pid, resource.RLIMIT_CPU, (cpu, cpu))
        yield process
    finally:
        with suppress(ProcessLookupError):
            process.kill()
        await process.wait()
