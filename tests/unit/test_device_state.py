"""Saved state of devices, changed before it is loaded: bytes laid out as virtio_save of QEMU does."""

from innkeeper.plan.device_state import ANNOUNCES, FEATURES, without_announcing

MODERN = 1 << 32


def device(name, features, config):
    lower = (features & 0xFFFFFFFF).to_bytes(4, "big") + len(config).to_bytes(4, "big") + config
    more = FEATURES + features.to_bytes(8, "big") if features >> 32 else b""
    return (
        b"\x04\x00\x00\x00\x07\x1b0000:00:02.0/" + name + b"pci" * 50 + b"\x0f\x00\x00\x00" + lower + bytes(30) + more
    )


def state(*features):
    card = [device(b"virtio-net", each, b"\x52\x54\x00\x12\x34\x56" + bytes(6)) for each in features]
    disk = device(b"virtio-blk", MODERN | 0x6654, bytes(60))
    return disk + b"".join(card) + disk


def test_a_card_that_may_announce_may_no_more_and_nothing_else_changes():
    can = MODERN | ANNOUNCES | 0x30FF8024
    assert without_announcing(state(can)) == state(can & ~ANNOUNCES)
    assert without_announcing(state(can, can)) == state(can & ~ANNOUNCES, can & ~ANNOUNCES)
    for quiet in (state(), state(MODERN | 0x24), state(0), b"", b"/virtio-net"):
        assert without_announcing(quiet) == quiet
