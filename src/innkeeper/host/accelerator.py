"""The accelerator verdict as a value: what guests of this host run on, and why (DESIGN.md 2.3).

`qemu/probe.py` reaches the verdict by running guest code; here is only its shape, so that `plan/` can use it.

**CPU models.** A saved state must be loadable on the same host later, so the model is pinned in the plan:

- Under KVM it is `host`: everything the CPU has, at native speed; the same as long as the host is. Where KVM runs
  64-bit code and yet refuses `host`, it is the named model below.
- Under TCG it is a *versioned, named* model of which this QEMU emulates every feature (`QemuFacts.tcg_cpu`,
  found by asking QMP for `unavailable-features`). `max` is not used: it means "all that this QEMU build can
  emulate", so every QEMU upgrade changes it and a saved state would not load; and it has five-level paging
  (LA57), which makes every emulated page walk longer. It says to be AMD's (`vendor=AuthenticAMD,family=20`), so that
  guests do not guard against leaks that emulation has not (`qemu/probe.py`). CMPXCHG16B is taken away (`cx16=off`)
  where this QEMU computes its flags so wrongly that guests die of it (`qemu/flags.S`).
"""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict


class Verdict(BaseModel):
    """Which accelerator every start passes with `-accel`, and why."""

    model_config = ConfigDict(frozen=True)

    name: Literal["kvm", "tcg"]
    reason: str
    """A sentence for a person."""
    hint: str = ""
    """What the user can do to get KVM; empty where there is nothing to do."""
    cpu_model: str
    """What `-cpu` gets, see the module's text."""
    seconds: float
    """How long reaching the verdict took."""
    boot_id: str
    """The kernel boot that the verdict holds for (/proc/sys/kernel/random/boot_id)."""
    qemu_version: str
    """The QEMU that the verdict holds for; empty without one."""
    kvm_device: str
    """Identity of /dev/kvm when it was probed: device number, owner and mode, or why it could not be read."""
    checked: str
    """When, as `base.clock.now` writes it."""
