"""The metadata service: HTTP between a guest that may be hostile and what plan/metadata.py shows of it.

Version 2 of EC2's protocol only: a PUT for a token, which is the asking NIC's and nobody else's, then GETs with it. A
program in the guest that can be made to fetch a URL for a stranger cannot send that PUT. What is answered may hold
secrets, and is never logged. Nothing a guest does costs more than its limits below.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import re
import secrets
from dataclasses import dataclass, field
from time import monotonic

import h11

from innkeeper.operations import networks
from innkeeper.operations.world import World
from innkeeper.plan.metadata import look_up, tree
from innkeeper.plan.network import METADATA, Nic

MOST_CONNECTIONS, MOST_REQUESTS, MOST_HEAD = 8, 100, 8192
"""Open at once per NIC; per connection; bytes of a request's line and headers."""
LIFETIME, PAUSE = 30.0, 0.01
"""Seconds until a connection is cut, however busy; after each answer before the NIC's next."""
MOST_TTL = 21600
"""Seconds that a token may be asked for."""
TTL, TOKEN = b"x-aws-ec2-metadata-token-ttl-seconds", b"x-aws-ec2-metadata-token"
HOSTS = (METADATA.encode(), METADATA.encode() + b":80")
Headers = list[tuple[bytes, bytes]]


@dataclass(frozen=True)
class Reply:
    """`text` is what was asked for, or a sentence about what is wrong."""

    status: int
    text: str
    headers: Headers = field(default_factory=list)


@dataclass
class _Guest:
    """One NIC's connections, which take turns."""

    connections: int = 0
    turn: asyncio.Lock = field(default_factory=asyncio.Lock)


class Metadata:
    """The service of one daemon. Tokens are signed by a key of its own, so none is stored, and a new daemon knows none
    of the old one's: clients then get 401 and ask for another."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._key = secrets.token_bytes(32)
        self._guests: dict[str, _Guest] = {}

    async def answer(self, nic: Nic, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Talk until the guest has had enough, or its limits are reached."""
        guest = self._guests.setdefault(nic.tap, _Guest())
        if guest.connections >= MOST_CONNECTIONS:
            return
        guest.connections += 1
        try:
            async with asyncio.timeout(LIFETIME):
                await self._converse(nic, guest.turn, reader, writer)
        except (TimeoutError, OSError):
            writer.transport.abort()  # what it has not read is not kept for it
        finally:
            guest.connections -= 1
            if not guest.connections:
                del self._guests[nic.tap]

    async def _converse(
        self, nic: Nic, turn: asyncio.Lock, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        connection = h11.Connection(h11.SERVER, max_incomplete_event_size=MOST_HEAD)
        for _ in range(MOST_REQUESTS):
            method = b""
            try:
                request = await _next_request(connection, reader)
                if request is None:
                    return
                method = request.method
                async with turn:
                    reply = await self._reply(nic, request, empty=type(connection.next_event()) is h11.EndOfMessage)
                    await asyncio.sleep(PAUSE)
            except h11.RemoteProtocolError as error:
                reply = Reply(error.error_status_hint, "not an HTTP request")
            body = reply.text.encode(errors="replace")
            headers = [*reply.headers, (b"Content-Type", b"text/plain"), (b"Content-Length", b"%d" % len(body))]
            parts: list[h11.Event] = [h11.Response(status_code=reply.status, headers=headers)]
            if method != b"HEAD":
                parts.append(h11.Data(data=body))
            for part in (*parts, h11.EndOfMessage()):
                writer.write(connection.send(part) or b"")
            await writer.drain()
            if connection.our_state is not h11.DONE or connection.their_state is not h11.DONE:
                return  # either side wants no more, or the rest cannot be understood
            connection.start_next_cycle()

    async def _reply(self, nic: Nic, request: h11.Request, *, empty: bool) -> Reply:
        """What a request deserves. `empty`: it has no body."""
        path = request.target.partition(b"?")[0].decode("ascii")
        hosts, ttls, tokens = (_values(request, name) for name in (b"host", TTL, TOKEN))
        if not empty:
            return Reply(413, "no body is taken")
        if any(host not in HOSTS for host in hosts):  # a name of somebody's that leads here: DNS rebinding
            return Reply(403, f"this is {METADATA} and no other host")
        if _values(request, b"x-forwarded-for"):
            return Reply(403, "nothing is answered through a proxy")
        if path == "/latest/api/token":
            if request.method != b"PUT":
                return Reply(405, "PUT asks for a token", [(b"Allow", b"PUT")])
            if len(ttls) != 1 or not re.fullmatch(rb"[0-9]{1,5}", ttls[0]) or not 1 <= int(ttls[0]) <= MOST_TTL:
                return Reply(400, f"{TTL.decode()} must be given, once, from 1 to {MOST_TTL}")
            return Reply(200, self._token(nic, int(monotonic()) + int(ttls[0])), [(TTL, ttls[0])])
        if request.method not in (b"GET", b"HEAD"):
            return Reply(405, "this is only read", [(b"Allow", b"GET, HEAD")])
        if len(tokens) != 1 or not self._is_good(nic, tokens[0]):
            return Reply(401, f"{TOKEN.decode()} must be a token of your own: PUT /latest/api/token")
        text = await self._text(nic, path)
        return Reply(404, "there is nothing here") if text is None else Reply(200, text)

    async def _text(self, nic: Nic, path: str) -> str | None:
        store = self._world.store
        vm, secret = await store.get(f"vm/{nic.vm}"), await store.get(f"secret/vm/{nic.vm}")
        if vm is None or secret is None:
            return None
        known = await networks.networks(self._world)
        by_id = {network.id: network for network in known.values()}
        cards = [(card, by_id[card.network]) for card in await networks.nics(self._world, vm.value, known)]
        return look_up(tree(vm.value, secret.value["first_boot"], cards), path) if cards else None

    def _token(self, nic: Nic, ends: int) -> str:
        mark = f"{nic.vm} {nic.tap} {nic.mac} {nic.address} {ends}"
        return f"{ends:x}-{hmac.new(self._key, mark.encode(), hashlib.sha256).hexdigest()}"

    def _is_good(self, nic: Nic, token: bytes) -> bool:
        found = re.fullmatch(rb"([0-9a-f]{1,15})-[0-9a-f]{64}", token)
        if not found or (ends := int(found[1], 16)) <= monotonic():
            return False
        return hmac.compare_digest(self._token(nic, ends).encode(), token)


async def _next_request(connection: h11.Connection, reader: asyncio.StreamReader) -> h11.Request | None:
    """None where the guest has closed the connection. Raises `h11.RemoteProtocolError`."""
    while (event := connection.next_event()) is h11.NEED_DATA:
        connection.receive_data(await reader.read(4096))
    return event if isinstance(event, h11.Request) else None


def _values(request: h11.Request, name: bytes) -> list[bytes]:
    return [value for found, value in request.headers if found == name]
