"""An idle minute: the CPU time of a daemon with 20 running guests.

.venv/bin/python bench/idle.py [GUESTS] [SECONDS]
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

from common import running_daemon

GUESTS = int(sys.argv[1]) if len(sys.argv) > 1 else 20
SECONDS = float(sys.argv[2]) if len(sys.argv) > 2 else 60


def cpu(pid: int) -> float:
    """Seconds of user + system time (proc(5), fields 14 and 15)."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def main() -> None:
    with running_daemon("tiny") as daemon:
        assert daemon.process is not None
        for number in range(GUESTS):
            daemon.inn.launch("tiny", name=f"idle-{number}", memory="160M", cpus=1, disk="1G")
        time.sleep(5)
        before = cpu(daemon.process.pid)
        time.sleep(SECONDS)
        used = cpu(daemon.process.pid) - before
        print(f"daemon, {GUESTS} running guests, {SECONDS:.0f} idle seconds: {used:.2f} s of CPU (wanted: below 0.2)")


if __name__ == "__main__":
    main()
