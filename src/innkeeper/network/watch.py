"""Netlink's news of links, addresses and nftables: somebody changes the host's network."""

from __future__ import annotations

import asyncio
import errno
import socket
import struct
from collections.abc import Callable, Iterator

ROUTE, NETFILTER = socket.NETLINK_ROUTE, 12
GROUPS = ((ROUTE, 0x1 | 0x10 | 0x100), (NETFILTER, 1 << 6))
"""(protocol, groups): RTMGRP_LINK, _IPV4_IFADDR, _IPV6_IFADDR; NETLINK_NETFILTER's NFNLGRP_NFTABLES, the seventh."""
NEW_GENERATION, BY_PID = 10 << 8 | 15, 2
"""linux/netfilter/nf_tables.h: NFNL_SUBSYS_NFTABLES and NFT_MSG_NEWGEN, which ends the news of each transaction;
NFTA_GEN_PROC_PID."""


class Watch:
    """`news` is set when something has changed; `rules` when it was nftables, by somebody who is not `own`, a pid of
    ours. Who does not keep up loses news, never the fact."""

    def __init__(self, own: Callable[[int], bool]) -> None:
        self.news = asyncio.Event()
        self.rules = False
        self._own = own
        self._sockets: list[socket.socket] = []

    def begin(self) -> None:
        """Listen from now on, in the network namespace of this process. May be called again."""
        if self._sockets:
            return
        for protocol, groups in GROUPS:
            listener = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_NONBLOCK, protocol)
            listener.bind((0, groups))
            self._sockets.append(listener)
            asyncio.get_running_loop().add_reader(listener, self._read, listener, protocol)

    def end(self) -> None:
        """Stop to."""
        for listener in self._sockets:
            asyncio.get_running_loop().remove_reader(listener)
            listener.close()
        self._sockets = []

    def _read(self, listener: socket.socket, protocol: int) -> None:
        foreign = protocol == ROUTE
        try:
            while data := listener.recv(1 << 16):
                if protocol == NETFILTER:
                    self.rules = self.rules or not all(map(self._own, generations(data)))
        except OSError as error:  # nothing more, or more than fitted
            if protocol == NETFILTER and error.errno == errno.ENOBUFS:
                self.rules = True
        if foreign or self.rules:
            self.news.set()


def generations(data: bytes) -> Iterator[int]:
    """The pids that ended a transaction of nftables in these messages (netlink(7)), 0 for one that is not told."""
    while len(data) >= 16:
        length, kind = struct.unpack_from("=IH", data)
        if kind == NEW_GENERATION:
            yield _attributes(data[20:length]).get(BY_PID, 0)
        data = data[max(length + 3 & ~3, 16) :]


def _attributes(data: bytes) -> dict[int, int]:
    """Those of four bytes, which are numbers in network order."""
    found = {}
    while len(data) >= 4:
        length, kind = struct.unpack_from("=HH", data)
        if length == 8 <= len(data):
            (found[kind & 0x3FFF],) = struct.unpack_from(">I", data, 4)
        data = data[max(length + 3 & ~3, 4) :]
    return found
