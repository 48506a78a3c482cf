"""Stop, then start: QEMU begins anew, so it comes up with a changed spec or a newer QEMU."""

from __future__ import annotations

from innkeeper.operations import vm_start, vm_stop
from innkeeper.operations.engine import Verb
from innkeeper.operations.rebirth import FIRST_START

VERB = Verb("vm-restart", (*vm_stop.STEPS, *vm_start.STEPS, FIRST_START))
