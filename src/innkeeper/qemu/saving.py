"""Whether a guest's memory can be saved behind its back here: asked of a QEMU that runs as those of VMs do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from innkeeper.base.errors import InnkeeperError
from innkeeper.host.users import errand_uid
from innkeeper.qemu.memory import behind_its_back, otherwise
from innkeeper.qemu.offline import opened

ALLOWED_TO_ALL = Path("/proc/sys/vm/unprivileged_userfaultfd")
DEVICE = Path("/dev/userfaultfd")
"""userfaultfd(2) tells what each of the two means."""

_HINT = (
    "sysctl vm.unprivileged_userfaultfd=1 allows it, to every program of this host: it makes some kernel bugs easier "
    "to exploit, so that is yours to weigh"
)
_answers: dict[tuple[object, ...], str | None] = {}


async def how_memory_is_saved(binary: str, accelerator: str) -> dict[str, Any]:
    """{how, reason, hint}: `background`, or `rounds` or `stopped` and why. Asked again when what it depends on has
    changed."""
    key = (binary, _text(ALLOWED_TO_ALL), _mode(DEVICE))
    if key not in _answers:
        try:
            async with opened(binary, (), errand_uid()) as monitor:
                _answers[key] = await behind_its_back(monitor)
        except InnkeeperError as error:
            return {"how": otherwise(accelerator), "reason": error.detail, "hint": ""}
    why_not = _answers[key]
    if why_not is None:
        return {"how": "background", "reason": "QEMU may write-protect its guest's memory", "hint": ""}
    return {"how": otherwise(accelerator), "reason": why_not, "hint": _HINT if key[1] == "0" else ""}


def _text(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""


def _mode(path: Path) -> tuple[int, int, int] | None:
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_mode, found.st_uid, found.st_gid
