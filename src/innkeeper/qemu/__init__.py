"""Spawn, confine and re-adopt a QEMU process; QMP; the guest agent. The only room that spawns QEMU.
Imports plan, host, spec, base."""
