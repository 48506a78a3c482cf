"""The metadata service's ear in one network. Who asks is told by the source address, which nobody can forge: the rules
of each NIC (plan/ruleset.py) let only its own through, and only guests that want the service are led here."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Awaitable, Callable, Iterable

from innkeeper.base.errors import NetworkFailed
from innkeeper.plan.network import METADATA_PORT, Network, Nic

Answer = Callable[[Nic, asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]
"""Talks with a NIC until the connection is over."""
HOPS = 1
"""The TTL of what is sent, the handshake included: it reaches the guest, and nothing that the guest routes it to."""
BACKLOG = 16


class Listener:
    """Bound to the bridge, so that it hears no other network, nor the host's own programs or neighbours."""

    def __init__(self, network: Network, answer: Answer) -> None:
        self._network, self._answer = network, answer
        self._nics: dict[str, Nic] = {}
        self._server: asyncio.Server | None = None
        self._open: set[asyncio.StreamWriter] = set()
        self._bridge = 0

    async def ensure(self, nics: Iterable[Nic]) -> bool:
        """It listens, to these. True where it did not, or to a bridge that is gone. Raises `NetworkFailed`."""
        self._nics = {nic.address: nic for nic in nics if nic.metadata and nic.address}
        try:
            bridge = socket.if_nametoindex(self._network.bridge)
            if self._server is not None and self._bridge == bridge:
                return False
            self.end()
            self._server = await asyncio.start_server(self._connected, sock=self._bound())
        except OSError as error:
            where = f"port {METADATA_PORT} of {self._network.bridge}"
            raise NetworkFailed(f"the metadata service cannot listen on {where}: {error.strerror}") from None
        self._bridge = bridge
        return True

    def end(self) -> None:
        """Hear nobody any more."""
        if self._server is not None:
            self._server.close()
            self._server = None
        for writer in self._open:
            writer.transport.abort()

    def _bound(self) -> socket.socket:
        listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, self._network.bridge.encode())
            listener.setsockopt(socket.IPPROTO_IP, socket.IP_TTL, HOPS)
            listener.bind((self._network.gateway, METADATA_PORT))
            listener.listen(BACKLOG)
        except BaseException:
            listener.close()
            raise
        return listener

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._open.add(writer)
        try:
            if nic := self._nics.get(writer.get_extra_info("peername")[0]):
                await self._answer(nic, reader, writer)
        finally:
            self._open.discard(writer)
            writer.close()
