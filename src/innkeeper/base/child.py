"""Start a child process from asyncio, safely against cancellation."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from typing import Any


async def start_child(*argv: str, **options: Any) -> asyncio.subprocess.Process:
    """As `asyncio.create_subprocess_exec`; cancelled, it leaves no process behind. Raises `OSError`.

    Until Python 3.13.1 a cancellation in the moment in which pipes are being connected makes asyncio wait for ever
    (github.com/python/cpython/issues/125502), so the start is always brought to its end first.
    """
    starting = asyncio.ensure_future(asyncio.create_subprocess_exec(*argv, **options))
    try:
        return await asyncio.shield(starting)
    except asyncio.CancelledError:
        with suppress(OSError):
            process = await starting
            with suppress(ProcessLookupError):
                process.kill()
            await process.wait()
        raise
