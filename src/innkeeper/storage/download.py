"""Fetch an image over HTTP, under its digest."""

from __future__ import annotations

import asyncio
import errno
import hashlib
import os
import re
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import httpx2

from innkeeper import __version__
from innkeeper.base.errors import DigestMismatch, DownloadFailed, InvalidInput
from innkeeper.base.units import format_size
from innkeeper.storage.room import full_pool_is
from innkeeper.storage.threads import in_thread

Report = Callable[[float | None, str], None]

ATTEMPTS = 5
"""Broken connections in a row, without a byte between them, after which we give up."""
FIRST_PAUSE = 0.5
"""Seconds before the first new attempt; doubled each time."""
TIMEOUT = httpx2.Timeout(connect=20, read=60, write=20, pool=20)
"""Seconds of silence."""
_RETRIED = {408, 425, 429, 500, 502, 503, 504}


class _Broken(Exception):
    """The connection broke, or the server is busy: worth another attempt."""


@dataclass
class _Progress:
    """What has arrived, and whether the server still has the same file."""

    received: int = 0
    digest: Any = field(default_factory=hashlib.sha256)
    total: int | None = None
    validator: str = ""

    def restart(self, fd: int) -> None:
        os.ftruncate(fd, 0)
        self.received, self.digest, self.total, self.validator = 0, hashlib.sha256(), None, ""


async def download(
    url: str, target: Path, *, sha256: str, limit: int, report: Report, pause: float = FIRST_PAUSE
) -> None:
    """Fetch `url` (http or https) to the new file `target`, which appears, 0600, once it is whole and its SHA-256
    is right.

    A broken connection is taken up again where it broke, if the server can (Range), with growing pauses. At most
    `limit` bytes are taken. The digest is checked, so plain http is as good as https.

    Raises `InvalidInput` (address, digest), `DownloadFailed`, `DigestMismatch`, `PoolFull`, `FileExistsError`. On an
    error or a cancellation nothing is left behind.
    """
    wanted = sha256.strip().lower().removeprefix("sha256:")
    if not re.fullmatch(r"[0-9a-f]{64}", wanted):
        raise InvalidInput(f"{sha256!r} is no SHA-256 digest (64 hex digits)", field="sha256")
    _check_url(url)
    if target.exists():
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(target))
    staged = target.with_name(target.name + ".part")
    fd = os.open(staged, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    try:
        with full_pool_is(f"no room for {url}", target.parent):
            digest = await _fetch(url, fd, limit, report, pause)
            if digest != wanted:
                raise DigestMismatch(
                    f"{url} has the SHA-256 {digest}, not {wanted}",
                    hint="the file at this address changed, or the digest is that of another one",
                    found=digest,
                    wanted=wanted,
                )
            await in_thread(lambda _: os.fsync(fd))
            staged.rename(target)
    finally:
        os.close(fd)
        staged.unlink(missing_ok=True)


async def _fetch(url: str, fd: int, limit: int, report: Report, pause: float) -> str:
    """The digest of what was written, once all of it is there."""
    progress = _Progress()
    failures = 0
    async with httpx2.AsyncClient(
        timeout=TIMEOUT,
        follow_redirects=True,
        max_redirects=5,
        headers={"User-Agent": f"innkeeper/{__version__}", "Accept-Encoding": "identity"},
    ) as client:
        while True:
            before = progress.received
            try:
                await _attempt(client, url, fd, limit, report, progress)
                return str(progress.digest.hexdigest())
            except _Broken as error:
                failures = 0 if progress.received > before else failures + 1
                if failures >= ATTEMPTS:
                    raise DownloadFailed(f"{url}: {error} ({ATTEMPTS} times in a row)") from error
                report(_fraction(progress), f"{error}; trying again")
                await asyncio.sleep(pause * 2**failures)


async def _attempt(
    client: httpx2.AsyncClient, url: str, fd: int, limit: int, report: Report, progress: _Progress
) -> None:
    """One request, from where we are to the end. Raises `_Broken` where another one may help."""
    headers = {}
    if progress.received:
        headers["Range"] = f"bytes={progress.received}-"
        if progress.validator:
            headers["If-Range"] = progress.validator
    async with _response(client, url, headers) as response:
        if response.status_code == 416 or not _continues(response, progress):
            progress.restart(fd)
            if response.status_code in (206, 416):
                raise _Broken("the file changed on the server")
        if response.status_code >= 300:
            text = f"{url}: the server answers {response.status_code} {response.reason_phrase}"
            raise (_Broken if response.status_code in _RETRIED else DownloadFailed)(text)
        length = response.headers.get("Content-Length", "")
        progress.total = progress.received + int(length) if length.isdecimal() else None
        etag = response.headers.get("ETag", "")
        progress.validator = etag if etag and not etag.startswith("W/") else response.headers.get("Last-Modified", "")
        if progress.total is not None and progress.total > limit:
            raise _too_large(url, limit, progress.total)
        async for piece in response.aiter_raw():
            if progress.received + len(piece) > limit:
                raise _too_large(url, limit, None)
            await in_thread(partial(_keep, fd, piece, progress))
            progress.received += len(piece)
            report(_fraction(progress), _line(progress))
    if progress.total is not None and progress.received < progress.total:
        raise _Broken("the connection broke")


def _keep(fd: int, piece: bytes, progress: _Progress, _: threading.Event) -> None:
    done = 0
    while done < len(piece):
        done += os.pwrite(fd, piece[done:], progress.received + done)
    progress.digest.update(piece)


@asynccontextmanager
async def _response(client: httpx2.AsyncClient, url: str, headers: dict[str, str]) -> AsyncIterator[httpx2.Response]:
    try:
        async with client.stream("GET", url, headers=headers) as response:
            yield response
    except (httpx2.UnsupportedProtocol, httpx2.TooManyRedirects, httpx2.InvalidURL) as error:
        raise DownloadFailed(f"{url}: {error}") from error
    except httpx2.RequestError as error:
        raise _Broken(str(error) or type(error).__name__) from error


def _continues(response: httpx2.Response, progress: _Progress) -> bool:
    """Whether the answer goes on where we are; a 200 begins again."""
    if response.status_code == 206:
        return bool(re.match(rf"bytes {progress.received}-", response.headers.get("Content-Range", "")))
    return response.status_code != 200 or not progress.received


def _check_url(url: str) -> None:
    parsed = None
    with suppress(httpx2.InvalidURL):
        parsed = httpx2.URL(url)
    if parsed is None or parsed.scheme not in ("http", "https") or not parsed.host:
        raise InvalidInput(
            f"{url!r} is no http or https address", hint="import a local file with `inn image import`", field="url"
        )


def _too_large(url: str, limit: int, size: int | None) -> DownloadFailed:
    what = format_size(size) if size is not None else f"more than {format_size(limit)}"
    return DownloadFailed(f"{url} has {what}; at most {format_size(limit)} may be fetched", limit=limit)


def _fraction(progress: _Progress) -> float | None:
    return progress.received / progress.total if progress.total else None


def _line(progress: _Progress) -> str:
    total = f" of {format_size(progress.total)}" if progress.total is not None else ""
    return f"{format_size(progress.received)}{total}"
