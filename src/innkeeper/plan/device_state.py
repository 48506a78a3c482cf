"""What is changed in the saved state of a machine's devices before it is loaded into another QEMU."""

from __future__ import annotations

import re

CARD, FEATURES = b"/virtio-net", b"\x05\x15virtio/64bit_features\x00\x00\x00\x01"
"""What a virtio card's section is called after its place; the subsection of a virtio device with all its features,
which follow in eight bytes (hw/virtio/virtio.c: virtio_save; migration/vmstate.c)."""
ANNOUNCES = 1 << 21
"""VIRTIO_NET_F_GUEST_ANNOUNCE (Virtual I/O Device 1.1, 5.1.3)."""
_CONFIG = rb"\x00\x00\x00[\x06-\x40]"
"""Its features' lower half is followed by how many bytes of configuration it has."""


def without_announcing(state: bytes) -> bytes:
    """The state with no virtio card that can have its guest announce it to the network, as it would when it is loaded.

    To tell QEMU 7.2 so (announce-rounds 0) makes it crash at the card's next reset, when the guest powers off, say. The
    guest goes on knowing the feature, and is never asked.
    """
    changed = bytearray(state)
    for found in re.finditer(re.escape(CARD), state):
        at = state.find(FEATURES, found.end())
        if at < 0:
            break
        at += len(FEATURES)
        features = int.from_bytes(state[at : at + 8], "big")
        lower = (features & 0xFFFFFFFF).to_bytes(4, "big")
        where = [each.start() for each in re.finditer(re.escape(lower) + _CONFIG, state[found.end() : at])]
        if features & ANNOUNCES and where:
            changed[at : at + 8] = (features & ~ANNOUNCES).to_bytes(8, "big")
            for each in where:
                begin = found.end() + each
                changed[begin : begin + 4] = (features & 0xFFFFFFFF & ~ANNOUNCES).to_bytes(4, "big")
    return bytes(changed)
