"""The metadata service over real sockets: what it answers, what it refuses, and what a hostile guest gets of it."""

from __future__ import annotations

import asyncio
import ipaddress
import re
from dataclasses import replace

import pytest
import pytest_asyncio

from innkeeper.base.home import Home
from innkeeper.operations.world import World
from innkeeper.plan import resolver, ruleset
from innkeeper.plan.metadata import VERSIONS, look_up
from innkeeper.plan.network import Nic, network_of, network_record
from innkeeper.server import metadata
from innkeeper.server.metadata import Metadata
from innkeeper.spec.network import NetworkSpec
from innkeeper.store.events import EventLog
from innkeeper.store.memory import MemoryStore

SUBNET = ipaddress.IPv4Network("10.77.0.0/24")
NETWORK = network_of(network_record("0" * 32, NetworkSpec(name="lab"), SUBNET, "now"))
WEB, DB = (
    Nic(name, name, 0, NETWORK.id, f"52:54:00:00:00:0{at}", f"10.77.0.{at}", None, (), True)
    for at, name in ((2, "web"), (3, "db"))
)
TTL = "X-aws-ec2-metadata-token-ttl-seconds"


@pytest_asyncio.fixture
async def service(tmp_path) -> Metadata:
    store = MemoryStore()
    network = network_record(NETWORK.id, NetworkSpec(name="lab"), SUBNET, "now")
    await store.transact({f"network/{NETWORK.id}": network | {"state": "active"}})
    for nic in (WEB, DB):
        spec = {"nics": [{"network": "lab", "publish": []}], "metadata": True}
        secret = {"ssh_keys": ["ssh-ed25519 AAAA me"], "user_data": f"secret of {nic.name}"}
        await store.transact(
            {
                f"vm/{nic.vm}": {
                    "id": nic.vm, "name": nic.name, "spec": spec, "identity": {"macs": [nic.mac]}, "created": "now",
                    "image": {"id": "1", "name": "tiny"},
                },
                f"secret/vm/{nic.vm}": {"first_boot": secret},
                f"address/{NETWORK.id}/{nic.address}": {"id": nic.vm, "name": nic.name, "nic": 0},
            }
        )  # fmt: skip
    return Metadata(World(Home(tmp_path, tmp_path, tmp_path), store, EventLog(store), None, None, None))  # type: ignore[arg-type]


class Guest:
    """One connection of a NIC to the service."""

    def __init__(self, service: Metadata, nic: Nic) -> None:
        self._service, self._nic = service, nic

    async def __aenter__(self) -> Guest:
        async def connected(reader, writer):
            await self._service.answer(self._nic, reader, writer)
            writer.close()

        self._server = await asyncio.start_server(connected, "127.0.0.1", 0)
        self.reader, self.writer = await asyncio.open_connection(*self._server.sockets[0].getsockname())
        return self

    async def __aexit__(self, *_) -> None:
        self.writer.close()
        self._server.close()

    async def rest(self) -> bytes:
        """What is answered until the service closes."""
        try:
            return await self.reader.read()
        except ConnectionError:
            return b""


async def say(service: Metadata, nic: Nic, text: str) -> tuple[int, str]:
    async with Guest(service, nic) as guest:
        guest.writer.write(text.encode("latin-1"))
        answer = (await guest.rest()).decode()
    head, _, body = answer.partition("\r\n\r\n")
    return int(head.split()[1]), body


async def ask(service: Metadata, nic: Nic, path: str, method: str = "GET", **headers: str) -> tuple[int, str]:
    lines = {"Host": "169.254.169.254", "Connection": "close"} | {n.replace("_", "-"): v for n, v in headers.items()}
    text = f"{method} {path} HTTP/1.1\r\n" + "".join(f"{name}: {value}\r\n" for name, value in lines.items())
    return await say(service, nic, text + "\r\n")


async def token(service: Metadata, nic: Nic, seconds: int = 60) -> dict[str, str]:
    status, found = await ask(service, nic, "/latest/api/token", "PUT", **{TTL: str(seconds)})
    assert status == 200
    return {"X-aws-ec2-metadata-token": found}


async def test_all_that_is_listed_is_there(service):
    mine, seen, open_paths = await token(service, WEB), {}, ["/"]
    while open_paths:
        path = open_paths.pop()
        status, text = await ask(service, WEB, path, **mine)
        assert status == 200, path
        seen[path] = text
        if path.endswith("/"):
            names = [re.sub("^([0-9]+)=.*", r"\1/", name) for name in text.splitlines()]
            open_paths += [path + name + ("/" if path == "/" else "") for name in names]
    assert seen["/latest/user-data"] == "secret of web"
    assert seen["/2021-03-23/meta-data/public-keys/0/openssh-key"] == "ssh-ed25519 AAAA me"
    assert seen[f"/latest/meta-data/network/interfaces/macs/{WEB.mac}/local-ipv4s"] == WEB.address
    assert not any("db" in text or DB.address in text for text in seen.values())
    assert len([path for path in seen if path.endswith("/user-data")]) == len(VERSIONS)


@pytest.mark.parametrize("ttl", ["", "0", "21601", "-1", "1.5", "99999999999", "²"])
async def test_a_token_lives_from_a_second_to_six_hours(service, ttl):
    assert (await ask(service, WEB, "/latest/api/token", "PUT", **{TTL: ttl}))[0] == 400


async def test_a_token_is_its_guests_and_ends(service, monkeypatch):
    mine = await token(service, WEB, 60)
    assert await ask(service, WEB, "/latest/user-data", **mine) == (200, "secret of web")
    assert (await ask(service, DB, "/latest/user-data", **mine))[0] == 401
    longer = re.sub("^[0-9a-f]+", "7fffffff", mine["X-aws-ec2-metadata-token"])
    for wrong in ("", "x", longer, longer[:-1]):
        assert (await ask(service, WEB, "/latest/user-data", **{"X-aws-ec2-metadata-token": wrong}))[0] == 401
    assert (await ask(service, WEB, "/latest/user-data"))[0] == 401
    now = metadata.monotonic()
    monkeypatch.setattr(metadata, "monotonic", lambda: now + 61)
    assert (await ask(service, WEB, "/latest/user-data", **mine))[0] == 401


async def test_what_came_through_others_is_refused(service):
    mine = await token(service, WEB)
    assert (await ask(service, WEB, "/latest/user-data", Host="evil.example", **mine))[0] == 403
    assert (await ask(service, WEB, "/latest/user-data", X_Forwarded_For="10.0.0.1", **mine))[0] == 403
    assert (await ask(service, WEB, "/latest/api/token", "PUT", X_Forwarded_For="10.0.0.1", **{TTL: "60"}))[0] == 403


@pytest.mark.parametrize(
    ("path", "method", "status"),
    [
        ("/latest/meta-data/../user-data", "GET", 404),
        ("/latest/%75ser-data", "GET", 404),
        ("/latest/meta-data/instance-id/", "GET", 404),
        ("/2999-01-01/meta-data/", "GET", 404),
        ("http://169.254.169.254/latest/user-data", "GET", 404),
        ("/latest/user-data", "POST", 405),
        ("/latest/api/token", "GET", 405),
    ],
)
async def test_no_other_way_leads_anywhere(service, path, method, status):
    assert (await ask(service, WEB, path, method, **await token(service, WEB)))[0] == status


@pytest.mark.parametrize(
    "text",
    [
        "\0\1\2\3\r\n\r\n",
        "GET /latest/user-data\r\n\r\n",
        "GET / HTTP/1.1\r\n\r\n",  # no Host
        "GET / HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n",
        "GET /\x80 HTTP/1.1\r\nHost: 169.254.169.254\r\n\r\n",
        "GET / HTTP/1.1\r\nHost: 169.254.169.254\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\n",
        "GET /" + "x" * 70000 + " HTTP/1.1\r\n",
        "GET / HTTP/1.1\r\n" + "A: b\r\n" * 20000,
        "PUT /latest/api/token HTTP/1.1\r\nHost: 169.254.169.254\r\nTransfer-Encoding: chunked\r\n\r\nffffffff\r\n",
        "PUT /latest/api/token HTTP/1.1\r\nHost: 169.254.169.254\r\nContent-Length: 9999999999\r\n\r\nmuch",
        "PUT /latest/api/token HTTP/1.1\r\nHost: 169.254.169.254\r\nContent-Length: 9\r\nExpect: 100-continue\r\n\r\n",
    ],
)
async def test_what_is_no_request_is_refused_and_the_connection_closed(service, text):
    async with Guest(service, WEB) as guest:
        guest.writer.write(text.encode("latin-1"))
        answer = await guest.rest()
    assert re.match(rb"HTTP/1.1 4(00|13|31) ", answer) or (len(text) > 8192 and not answer)
    assert await ask(service, WEB, "/latest/user-data", **await token(service, WEB)) == (200, "secret of web")


async def test_requests_in_one_go_are_answered_in_turn_up_to_a_limit(service, monkeypatch):
    monkeypatch.setattr(metadata, "PAUSE", 0)
    own = (await token(service, WEB))["X-aws-ec2-metadata-token"]
    one = f"GET /latest/meta-data/mac HTTP/1.1\r\nHost: 169.254.169.254:80\r\nX-aws-ec2-metadata-token: {own}\r\n\r\n"
    async with Guest(service, WEB) as guest:
        guest.writer.write(one.encode() * 3)
        guest.writer.write_eof()
        assert (await guest.rest()).count(WEB.mac.encode()) == 3
    async with Guest(service, WEB) as guest:
        guest.writer.write(one.encode() * (metadata.MOST_REQUESTS + 5))
        assert (await guest.rest()).count(WEB.mac.encode()) <= metadata.MOST_REQUESTS


async def test_head_has_no_body(service):
    assert await ask(service, WEB, "/latest/user-data", "HEAD", **await token(service, WEB)) == (200, "")


async def test_slow_guests_are_cut_off_and_many_connections_hinder_no_other_guest(service, monkeypatch):
    monkeypatch.setattr(metadata, "LIFETIME", 2.0)
    slow = [await Guest(service, WEB).__aenter__() for _ in range(metadata.MOST_CONNECTIONS)]
    for guest in slow:
        guest.writer.write(b"GET / HTTP/1.1\r\nHost")
    async with Guest(service, WEB) as guest:
        assert await guest.rest() == b""  # one too many
    assert await ask(service, DB, "/latest/user-data", **await token(service, DB)) == (200, "secret of db")
    for guest in slow:
        assert await guest.rest() == b""
        await guest.__aexit__()
    assert await ask(service, WEB, "/latest/user-data", **await token(service, WEB)) == (200, "secret of web")


def test_nothing_is_below_what_is_not_there():
    assert look_up({}, "/latest/meta-data/") is None
    assert look_up({"user-data": "x"}, "latest/user-data") is None


def test_the_firewall_leads_only_those_to_it_that_want_it():
    plain = replace(WEB, metadata=False)
    element = f"element inet innkeeper metadata {NETWORK.bridge} . {WEB.address}"
    with_it, without = (ruleset.objects(ruleset.everything([NETWORK], [nic])) for nic in (WEB, plain))
    assert with_it - without == {element}
    assert without <= with_it
    assert ruleset.metadata_removed(WEB) == [{"delete": command["add"]} for command in ruleset.metadata_added(WEB)]
    assert ruleset.metadata_added(WEB)[0] in ruleset.nic_added(WEB)
    assert ruleset.metadata_removed(WEB)[0] in ruleset.nic_removed(WEB)
    assert not ruleset.metadata_added(plain) and not ruleset.metadata_removed(plain)


def test_dhcp_shows_the_way_where_there_is_no_other():
    den = network_of(network_record("1" * 32, NetworkSpec(name="den", mode="internal"), SUBNET, "now"))
    assert f"{resolver.ASKS},option:classless-static-route,169.254.169.254/32,10.77.0.1" in resolver.config(den, "", "")
    assert "classless" not in resolver.config(NETWORK, "", "")
    cards = [WEB, replace(DB, metadata=False)]
    tagged = resolver.dhcp_hosts(den, cards)
    assert tagged == f"{WEB.mac},set:metadata,{WEB.address}\n{DB.mac},{DB.address}\n"
    assert resolver.has_tags(tagged)
    assert not resolver.has_tags(resolver.dhcp_hosts(NETWORK, cards))
