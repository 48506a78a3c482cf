"""Let others go first."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

LAST = 19
"""The lowest priority there is (setpriority(2)); on Linux each thread has one."""

LITTLE = 10
"""Of a session: a tenth of what another one gets (sched(7): 1.25 for each step). With the lowest, a copy beside guests
that want all the CPU time there is takes twice as long."""


def step_back() -> None:
    """This process, which leads a session, gets little CPU time from here on where others want it.

    Linux shares the CPU among sessions first and among threads then (sched(7), «The autogroup feature»): the priority
    of one thread of many counts for nothing beside a guest, which is in another session."""
    os.setpriority(os.PRIO_PROCESS, 0, LAST)
    with contextlib.suppress(OSError):  # a kernel without autogroups
        Path("/proc/self/autogroup").write_text(str(LITTLE))
