"""Another process's memory: process_vm_readv(2) and process_vm_writev(2)."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable


class Vector(ctypes.Structure):
    """`struct iovec`."""

    _fields_ = (("base", ctypes.c_void_p), ("length", ctypes.c_size_t))


_libc = ctypes.CDLL(None, use_errno=True)
readv, writev = _libc.process_vm_readv, _libc.process_vm_writev
for _call in (readv, writev):
    _vectors = ctypes.POINTER(Vector), ctypes.c_ulong
    _call.argtypes = [ctypes.c_int, *_vectors, *_vectors, ctypes.c_ulong]
    _call.restype = ctypes.c_ssize_t


def move(call: Callable[..., int], pid: int, ours: int, its: int, length: int) -> None:
    """`call` is `readv`, from its address to ours, or `writev`. Raises `OSError`."""
    while length:
        moved = call(pid, Vector(ours, length), 1, Vector(its, length), 1, 0)
        if moved <= 0:
            raise OSError(ctypes.get_errno(), f"{call.__name__}: {os.strerror(ctypes.get_errno())}")
        ours, its, length = ours + moved, its + moved, length - moved
