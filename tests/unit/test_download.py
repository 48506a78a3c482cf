"""Downloads from a real HTTP server on loopback that misbehaves."""

from __future__ import annotations

import asyncio
import hashlib
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from innkeeper.base.errors import DigestMismatch, DownloadFailed, InvalidInput
from innkeeper.storage.download import download

BODY = bytes(range(256)) * 8192  # 2 MiB
DIGEST = hashlib.sha256(BODY).hexdigest()


class Server(ThreadingHTTPServer):
    """Serves BODY by the rules that a test sets."""

    daemon_threads = True
    cut_after: int | None = None  # bytes in each answer before the connection breaks
    ranges = True
    length = True
    statuses: list[int]  # answered first
    etag = '"one"'
    body = BODY
    redirect = ""
    hang: threading.Event | None = None

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.statuses = []
        self.changing = threading.Lock()
        self.requests: list[dict[str, str]] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/disk.img"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that hung up is what the tests are about."""


class Handler(BaseHTTPRequestHandler):
    server: Server
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        server = self.server
        server.requests.append(dict(self.headers))
        if server.statuses:
            return self.send_error(server.statuses.pop(0))
        if server.redirect and self.path != "/target":
            self.send_response(302)
            self.send_header("Location", server.redirect)
            self.send_header("Content-Length", "0")
            return self.end_headers()
        with server.changing:
            body, etag, cut_after = server.body, server.etag, server.cut_after
        start = 0
        asked = self.headers.get("Range")
        if asked and server.ranges and self.headers.get("If-Range", etag) == etag:
            start = int(asked.removeprefix("bytes=").rstrip("-"))
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {start}-{len(body) - 1}/{len(body)}")
        else:
            self.send_response(200)
        data = body[start:]
        if server.length:
            self.send_header("Content-Length", str(len(data)))
        self.send_header("ETag", etag)
        self.send_header("Connection", "close")
        self.end_headers()
        self.close_connection = True
        self.wfile.write(data[:cut_after])
        if server.hang:
            self.wfile.flush()
            server.hang.wait(30)

    def log_message(self, format: str, *args: Any) -> None:
        """Quiet."""


@pytest.fixture
def server() -> Iterator[Server]:
    server = Server()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


async def fetch(server: Server, target: Path, **options: Any) -> list[tuple[float | None, str]]:
    reports: list[tuple[float | None, str]] = []
    options = {"sha256": DIGEST, "limit": 1 << 30, "pause": 0.001, **options}
    url = options.pop("url", server.url)
    await download(url, target, report=lambda *line: reports.append(line), **options)
    return reports


def left(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir()]


async def test_whole_file_with_progress(server: Server, tmp_path: Path) -> None:
    reports = await fetch(server, tmp_path / "image", sha256=f"sha256:{DIGEST.upper()}")
    assert (tmp_path / "image").read_bytes() == BODY
    assert (tmp_path / "image").stat().st_mode & 0o777 == 0o600
    fractions = [fraction for fraction, _ in reports]
    assert fractions == sorted(fractions) and fractions[-1] == 1.0
    assert reports[-1][1] == "2 MiB of 2 MiB"
    assert left(tmp_path) == ["image"]


async def test_without_a_length(server: Server, tmp_path: Path) -> None:
    server.length = False
    reports = await fetch(server, tmp_path / "image")
    assert (tmp_path / "image").read_bytes() == BODY
    assert reports[-1] == (None, "2 MiB")


async def test_broken_connections_are_taken_up_where_they_broke(server: Server, tmp_path: Path) -> None:
    server.cut_after = 300_000
    await fetch(server, tmp_path / "image")
    assert (tmp_path / "image").read_bytes() == BODY
    assert [request.get("Range") for request in server.requests] == [
        None,
        *(f"bytes={300_000 * n}-" for n in range(1, 7)),
    ]
    assert all(request["If-Range"] == '"one"' for request in server.requests[1:])


async def test_a_server_without_ranges_gives_up_in_the_end(server: Server, tmp_path: Path) -> None:
    server.ranges = False
    server.cut_after = 300_000
    with pytest.raises(DownloadFailed, match="in a row"):
        await fetch(server, tmp_path / "image")
    assert left(tmp_path) == []


async def test_a_file_that_changes_between_attempts_is_fetched_anew(server: Server, tmp_path: Path) -> None:
    server.cut_after = 300_000
    server.body = b"old" * 500_000
    task = asyncio.create_task(fetch(server, tmp_path / "image", pause=0.1))
    while len(server.requests) < 2:  # noqa: ASYNC110 (a thread, not a task)
        await asyncio.sleep(0.01)
    with server.changing:
        server.body, server.etag, server.cut_after = BODY, '"two"', None
    await task
    assert (tmp_path / "image").read_bytes() == BODY


async def test_busy_server_is_asked_again(server: Server, tmp_path: Path) -> None:
    server.statuses = [503, 429, 500]
    await fetch(server, tmp_path / "image")
    assert (tmp_path / "image").read_bytes() == BODY


async def test_refusal_is_final(server: Server, tmp_path: Path) -> None:
    server.statuses = [404]
    with pytest.raises(DownloadFailed, match="404"):
        await fetch(server, tmp_path / "image")
    assert len(server.requests) == 1
    assert left(tmp_path) == []


async def test_redirects_are_followed_but_only_to_http(server: Server, tmp_path: Path) -> None:
    server.redirect = "/target"
    await fetch(server, tmp_path / "image")
    assert (tmp_path / "image").read_bytes() == BODY
    server.redirect = "file:///etc/passwd"
    with pytest.raises(DownloadFailed):
        await fetch(server, tmp_path / "other")
    server.redirect = server.url
    with pytest.raises(DownloadFailed, match="redirect"):
        await fetch(server, tmp_path / "other")
    assert left(tmp_path) == ["image"]


async def test_wrong_digest(server: Server, tmp_path: Path) -> None:
    with pytest.raises(DigestMismatch, match=DIGEST) as caught:
        await fetch(server, tmp_path / "image", sha256="0" * 64)
    assert caught.value.facts["found"] == DIGEST
    assert left(tmp_path) == []


@pytest.mark.parametrize("length", [True, False])
async def test_limit(server: Server, tmp_path: Path, length: bool) -> None:
    server.length = length
    with pytest.raises(DownloadFailed, match="at most 1 MiB"):
        await fetch(server, tmp_path / "image", limit=1 << 20)
    assert left(tmp_path) == []


async def test_nobody_there(tmp_path: Path, server: Server) -> None:
    with pytest.raises(DownloadFailed, match="5 times in a row"):
        await fetch(server, tmp_path / "image", url="http://127.0.0.1:9/x")
    assert left(tmp_path) == []


@pytest.mark.parametrize(
    "url", ["file:///etc/passwd", "ftp://host/x", "/etc/passwd", "", "http://", "http://[::1", "https:///x"]
)
async def test_other_addresses_are_refused(server: Server, tmp_path: Path, url: str) -> None:
    with pytest.raises(InvalidInput, match="no http or https address"):
        await fetch(server, tmp_path / "image", url=url)


@pytest.mark.parametrize("digest", ["", "abc", "g" * 64, DIGEST + "0"])
async def test_digest_must_be_one(server: Server, tmp_path: Path, digest: str) -> None:
    with pytest.raises(InvalidInput, match="SHA-256"):
        await fetch(server, tmp_path / "image", sha256=digest)
    assert not server.requests


async def test_an_existing_file_is_not_touched(server: Server, tmp_path: Path) -> None:
    (tmp_path / "image").write_text("mine")
    with pytest.raises(FileExistsError):
        await fetch(server, tmp_path / "image")
    assert (tmp_path / "image").read_text() == "mine"


async def test_cancel_leaves_nothing(server: Server, tmp_path: Path) -> None:
    server.cut_after = 100_000
    server.hang = threading.Event()
    arrived = asyncio.Event()
    task = asyncio.create_task(
        download(
            server.url,
            tmp_path / "image",
            sha256=DIGEST,
            limit=1 << 30,
            report=lambda fraction, line: arrived.set(),
        )
    )
    while not server.requests:  # noqa: ASYNC110 (a thread, not a task)
        await asyncio.sleep(0.01)
    assert left(tmp_path) == ["image.part"]
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    server.hang.set()
    assert left(tmp_path) == []
