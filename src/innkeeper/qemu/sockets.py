"""Connecting to the sockets that QEMU has in a VM's folder."""

from __future__ import annotations

import asyncio
import os
import socket
from pathlib import Path


async def connect(folder: Path, name: str) -> socket.socket:
    """Connects by way of the folder's descriptor, since the path itself may be longer than a socket's 107 bytes.

    Raises OSError."""
    handle = os.open(folder, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        try:
            while True:
                try:
                    connection.connect(f"/proc/self/fd/{handle}/{name}")
                    return connection
                except BlockingIOError:  # the backlog is full: someone else is connected
                    await asyncio.sleep(0.05)
        except BaseException:
            connection.close()
            raise
    finally:
        os.close(handle)
