"""One live VM: its states, the requests it admits, its events. Imports qemu, storage, network, store and below.

`states.py` is the pure rule of what is admitted when, `reaction.py` the pure rule of what a QMP event means,
`machine.py` the task that owns one QEMU and applies both, `machines.py` all of this host's. States of a VM:

    creating ─▶ stopped ─▶ starting ─▶ running ◀──▶ paused        deleting: from every state
                  ▲   ▲                   │  │         │
                  │   └──── stopping ◀────┘  └─────────┴──▶ crashed ─▶ starting
                  └────────────┘

`paused` has a reason (asked for, pool full, disk error, guest panicked). `crashed`: QEMU ended by itself or was killed.
"""
