"""What `inn apply` would change: the difference between a manifest and what is there, as a pure function."""

from __future__ import annotations

from typing import Any

from innkeeper.plan.record import public_spec
from innkeeper.spec.manifest import VMManifest
from innkeeper.store.contract import Value

MADE_ONCE = ("image", "disks", "iso", "first_boot")
"""Fields that only take effect when the VM is made: a change needs a new VM, and is never done silently."""


def differences(manifest: VMManifest, vm: Value, secret: Value) -> list[dict[str, Any]]:
    """Field by field, the old value and the new; values that may be secret are named and not shown."""
    wanted, actual = public_spec(manifest.spec()), vm["spec"]
    found = [
        {"field": field, "old": actual[field], "new": wanted[field]}
        for field in wanted
        if field not in ("name", "first_boot") and wanted[field] != actual[field]
    ]
    old_boot = secret["first_boot"]
    for field, value in manifest.first_boot.model_dump(mode="json").items():
        if value != old_boot[field]:
            found.append({"field": f"first_boot.{field}", "old": "(not shown)", "new": "(not shown)"})
    return found


def needs_new_vm(changes: list[dict[str, Any]]) -> list[str]:
    """Those of the changed fields that cannot change on a VM that exists."""
    return [c["field"] for c in changes if c["field"].split(".")[0] in MADE_ONCE]
