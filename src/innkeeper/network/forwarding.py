"""The host forwards packets as long as a nat network is there: switched on for it, and put back as it was.

What is changed is written down before, with the id of this boot: after a restart the kernel has its own values again.
Switching ip_forward also sets other values (Documentation/networking/ip-sysctl.rst), so those are kept too. A host that
learns its own IPv6 routes from advertisements stops to when it forwards, unless accept_ra is 2.
"""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path

from innkeeper.host.gather import boot_id
from innkeeper.plan.network import BRIDGE, TAP

SYSCTLS = Path("/proc/sys/net")
SWITCHES = ("ipv4/ip_forward", "ipv6/conf/all/forwarding")
TOUCHED = ("ipv4/conf/*/forwarding", "ipv4/conf/*/accept_redirects", "ipv6/conf/*/forwarding", "ipv6/conf/*/accept_ra")


def is_on() -> bool:
    """Whether both switches are on, as far as this kernel has them."""
    return all(_read(name) in ("1", None) for name in SWITCHES)


def switch_on(record: Path) -> None:
    """Have the host forward; what was before is in `record`, unless it did so already."""
    if is_on():
        return
    if _recorded(record) is None:
        before = {name: _read(name) for name in SWITCHES} | {name: _read(name) for name in _touched()}
        staged = record.with_name(f"{record.name}.new")
        staged.write_text(json.dumps({"boot": boot_id(), "before": before}))
        staged.replace(record)
    listening = [name for name in _touched() if name.endswith("/accept_ra") and _read(name) == "1"]
    for name in SWITCHES:
        _write(name, "1")
    for name in listening:
        _write(name, "2")


def put_back(record: Path) -> None:
    """As it was before `switch_on`."""
    for name, value in (_recorded(record) or {}).items():
        if value is not None and _read(name) != value:
            _write(name, value)
    record.unlink(missing_ok=True)


def _recorded(record: Path) -> dict[str, str | None] | None:
    try:
        found = json.loads(record.read_text())
    except (OSError, ValueError):
        return None
    before: dict[str, str | None] = found["before"]
    return before if found["boot"] == boot_id() else None


def _touched() -> list[str]:
    paths = [str(path.relative_to(SYSCTLS)) for pattern in TOUCHED for path in sorted(SYSCTLS.glob(pattern))]
    return [path for path in paths if not path.split("/")[2].startswith((BRIDGE, TAP))]


def _read(name: str) -> str | None:
    try:
        return (SYSCTLS / name).read_text().strip()
    except OSError:
        return None


def _write(name: str, value: str) -> None:
    with suppress(OSError):  # the device is gone
        (SYSCTLS / name).write_text(value)
