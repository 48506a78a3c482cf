"""All operations there are. The fault harness, the API and the docs are built from this table."""

from __future__ import annotations

from innkeeper.operations import (
    image_make,
    image_verify,
    network_create,
    network_delete,
    rebirth,
    snapshot_create,
    snapshot_delete,
    snapshot_measure,
    snapshot_restore,
    template_create,
    template_warm,
    vm_clone,
    vm_create,
    vm_delete,
    vm_firewall,
    vm_fork,
    vm_launch,
    vm_nics,
    vm_pause,
    vm_restart,
    vm_stop,
    vm_update,
)
from innkeeper.operations.engine import Verb

VERBS: dict[str, Verb] = {
    verb.kind: verb
    for verb in (
        image_make.BUILD,
        image_make.IMPORT,
        image_make.PULL,
        image_make.DELETE,
        image_verify.VERB,
        vm_create.VERB,
        vm_launch.VERB,
        vm_clone.VERB,
        template_create.VERB,
        template_warm.VERB,
        vm_fork.VERB,
        rebirth.START,
        vm_stop.VERB,
        vm_restart.VERB,
        vm_pause.PAUSE,
        vm_pause.RESUME,
        vm_update.VERB,
        vm_nics.VERB,
        vm_firewall.VERB,
        vm_delete.VERB,
        snapshot_create.VERB,
        snapshot_restore.VERB,
        snapshot_delete.VERB,
        snapshot_measure.VERB,
        network_create.VERB,
        network_delete.VERB,
    )
}
