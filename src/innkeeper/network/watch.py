"""Netlink's news of links, addresses and nftables: somebody changes the host's network."""

from __future__ import annotations

import asyncio
import socket

GROUPS = ((socket.NETLINK_ROUTE, 0x1 | 0x10 | 0x100), (12, 1 << 6))
"""(protocol, groups): RTMGRP_LINK, _IPV4_IFADDR, _IPV6_IFADDR; NETLINK_NETFILTER's NFNLGRP_NFTABLES, the seventh."""


class Watch:
    """`news` is set when something has changed, by whomever. Who does not keep up loses news, never the fact."""

    def __init__(self) -> None:
        self.news = asyncio.Event()
        self._sockets: list[socket.socket] = []

    def begin(self) -> None:
        """Listen from now on, in the network namespace of this process. May be called again."""
        if self._sockets:
            return
        for protocol, groups in GROUPS:
            listener = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_NONBLOCK, protocol)
            listener.bind((0, groups))
            self._sockets.append(listener)
            asyncio.get_running_loop().add_reader(listener, self._read, listener)

    def end(self) -> None:
        """Stop to."""
        for listener in self._sockets:
            asyncio.get_running_loop().remove_reader(listener)
            listener.close()
        self._sockets = []

    def _read(self, listener: socket.socket) -> None:
        self.news.set()
        try:
            while listener.recv(1 << 16):
                pass
        except OSError:  # nothing more, or more than fitted
            return
