"""Admission: is there memory on this host for one more guest? Pure."""

from __future__ import annotations

from innkeeper.base.errors import NotEnoughMemory
from innkeeper.base.units import GIB, MIB, format_size
from innkeeper.host.facts import Memory


def kept_for_host(total: int) -> int:
    """Bytes that guests do not get: a twelfth of the host's, within 512 MiB and 8 GiB."""
    return min(max(total // 12, 512 * MIB), 8 * GIB)


def available_for_guests(memory: Memory, promised: int = 0) -> int:
    """Bytes that a new guest can have.

    MemAvailable sees only the pages that guests have touched. `promised` is what running guests may still touch:
    the sum of their configured memory minus what they hold now, in bytes.
    """
    return max(0, memory.available - promised - kept_for_host(memory.total))


def check_memory(needed: int, memory: Memory, promised: int = 0) -> None:
    """Raise `NotEnoughMemory`, with the numbers, where `needed` bytes are not there. Swap never counts."""
    room = available_for_guests(memory, promised)
    if needed <= room:
        return
    kept = kept_for_host(memory.total)
    taken = f", {format_size(promised)} of it promised to running VMs" if promised else ""
    raise NotEnoughMemory(
        f"needs {format_size(needed)}, host has {format_size(memory.available)} available of "
        f"{format_size(memory.total)}{taken}, and {format_size(kept)} are kept for the host",
        needed=needed,
        available=memory.available,
        total=memory.total,
        promised=promised,
        kept=kept,
        room=room,
    )
