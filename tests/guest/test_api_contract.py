"""schemathesis on the running API: no 5xx, no undocumented answer, whatever is sent."""

import asyncio
import os
import threading
from contextlib import nullcontext

import pytest
import schemathesis
from conftest import running_daemon
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from namespaces import namespace
from schemathesis.checks import CHECKS, load_all_checks

from innkeeper.server.app import openapi

pytestmark = pytest.mark.guest

EXAMPLES = 40
"""Generated requests per route."""
CHOSEN = [
    "not_a_server_error",
    "status_code_conformance",
    "content_type_conformance",
    "response_headers_conformance",
    "response_schema_conformance",
    "unsupported_method",
]


class Bridge:
    """A loopback TCP port in front of the daemon's UNIX socket: schemathesis speaks TCP only."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._loop = asyncio.new_event_loop()
        self._ready = threading.Event()
        threading.Thread(target=self._run, daemon=True).start()
        assert self._ready.wait(5)

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        server = self._loop.run_until_complete(asyncio.start_server(self._serve, "127.0.0.1", 0))
        self.port = server.sockets[0].getsockname()[1]
        self._ready.set()
        self._loop.run_forever()

    async def _serve(self, reader, writer) -> None:
        there, back = await asyncio.open_unix_connection(self._path)
        await asyncio.gather(_pump(reader, back), _pump(there, writer))

    def close(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)


async def _pump(reader, writer) -> None:
    try:
        while block := await reader.read(65536):
            writer.write(block)
            await writer.drain()
    except ConnectionError:
        pass
    finally:
        writer.close()


@pytest.fixture(scope="module")
def host():
    """A daemon of its own, since what is generated here makes, stops and deletes VMs; and networks, so as root it has
    a network namespace of its own too, which they end with."""
    own = namespace("contract") if os.geteuid() == 0 else nullcontext()
    with own as name, running_daemon("tiny", namespace=name) as daemon:
        yield daemon


@pytest.fixture(scope="module")
def schema(host):
    bridge = Bridge(str(host.home.socket))
    yield schemathesis.openapi.from_url(f"http://127.0.0.1:{bridge.port}/openapi.json")
    bridge.close()


@pytest.fixture
def victim(host):
    """A VM that exists while a route is tried, running an agent."""
    if "victim" not in [vm["name"] for vm in host.inn.vms()]:
        host.inn.launch("tiny", name="victim", memory="256M", disk="1G")
    return "victim"


def _calls():
    for path, methods in openapi()["paths"].items():
        for method in methods:
            yield path, method.upper()


@pytest.mark.parametrize(("path", "method"), list(_calls()), ids=str)
def test_route(schema, host, victim, path, method):
    load_all_checks()

    @settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck), database=None)
    @given(case=schema[path][method].as_strategy(), real=st.booleans())
    def each(case, real):
        if real and "vm" in (case.path_parameters or {}):
            case.path_parameters["vm"] = victim
        if real and "image" in (case.path_parameters or {}):
            case.path_parameters["image"] = "tiny"
        if case.query:
            case.query.pop("follow", None)  # a stream that never ends
        case.call_and_validate(timeout=30, checks=CHECKS.get_by_names(CHOSEN))

    each()
    assert host.inn.version()["pid"] == host.process.pid
