"""HTTP over a UNIX socket, in as little as it takes.

Why not a library: `inn ls` must feel instant, and importing a client costs more than the whole request
(measured beyond a bare interpreter: socket + json 12 ms, `http.client` 45 ms, `httpx2` 136 ms). One request per
connection over a local socket needs no pool, no TLS, no redirects and no cookies. HTTP/1.1 rather than 1.0, because a
stream then comes in chunks (RFC 9112, 7.1), whose missing end tells a broken stream from a finished one.
"""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, cast
from urllib.parse import quote

from innkeeper.base.errors import InvalidInput
from innkeeper.client.errors import ApiError, DaemonUnreachable, SocketForbidden

if TYPE_CHECKING:
    from io import BufferedReader

BLOCK = 256 * 1024
"""Bytes read or sent at a time."""

TIMEOUT = 90.0
"""Seconds without a byte after which an answer is given up; longer than any long poll (30 s)."""

_MAX_HEADERS = 200


class Response:
    """An answer whose body has not been read yet. Use as a context manager, or read it to its end."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._file = cast("BufferedReader", connection.makefile("rb", BLOCK))
        self.headers: dict[str, str] = {}
        self.status = self._read_head()
        length = self.headers.get("content-length")
        self.length: int | None = int(length) if length and length.isdigit() else None
        self._chunked = "chunked" in self.headers.get("transfer-encoding", "").lower()

    def _read_head(self) -> int:
        parts = self._line().split(None, 2)
        if len(parts) < 2 or not parts[0].startswith(b"HTTP/1.") or not parts[1].isdigit():
            raise DaemonUnreachable(
                "what answers on the socket does not speak HTTP", hint="is another program using this path?"
            )
        for _ in range(_MAX_HEADERS):
            line = self._line().strip()
            if not line:
                return int(parts[1])
            name, _, value = line.decode("latin-1").partition(":")
            self.headers[name.strip().lower()] = value.strip()
        raise DaemonUnreachable("the answer has too many headers")

    def _line(self) -> bytes:
        with _lost_connections():
            line = self._file.readline(65536)
        if not line.endswith(b"\n"):
            raise _lost()
        return line

    def blocks(self) -> Iterator[bytes]:
        """The body as it comes. Raises `DaemonUnreachable` when the connection ends before the body does."""
        try:
            if self._chunked:
                while size := int(self._line().split(b";")[0], 16):
                    yield from self._exactly(size)
                    self._line()
            elif self.length is not None:
                yield from self._exactly(self.length)
            else:
                while block := self._some(BLOCK):
                    yield block
        finally:
            self.close()

    def _exactly(self, count: int) -> Iterator[bytes]:
        while count:
            block = self._some(min(count, BLOCK))
            if not block:
                raise _lost()
            count -= len(block)
            yield block

    def _some(self, count: int) -> bytes:
        with _lost_connections():
            return self._file.read1(count)

    def lines(self) -> Iterator[bytes]:
        """The body line by line, without the line ends, each as soon as it is whole."""
        rest = bytearray()
        for block in self.blocks():
            rest += block
            *whole, last = rest.split(b"\n")
            rest = bytearray(last)
            for line in whole:
                yield bytes(line)
        if rest:
            yield bytes(rest)

    def read(self) -> bytes:
        """The whole body."""
        return b"".join(self.blocks())

    def json(self) -> Any:
        """The body as JSON; None for an empty one."""
        body = self.read()
        return json.loads(body) if body else None

    def close(self) -> None:
        """Give the connection up; what was not read is lost."""
        self._file.close()
        self._connection.close()

    def __enter__(self) -> Response:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def request(
    connection: socket.socket,
    method: str,
    target: str,
    *,
    query: dict[str, Any] | None = None,
    document: Any = None,
    body: bytes | Iterable[bytes] | None = None,
    length: int | None = None,
    timeout: float | None = TIMEOUT,
) -> Response:
    """Send one request; the answer's head has been read when this returns, and the connection is the answer's.

    `document` is sent as JSON; `body` as it is: bytes, or blocks of which `length` gives the sum if it is known.
    `timeout` counts seconds of silence, None for a stream that may be silent. Raises `ApiError` for an answer of
    400 and above, `DaemonUnreachable` where the connection ends or falls silent.
    """
    kind = "application/octet-stream"
    if document is not None:
        body, kind = json.dumps(document).encode(), "application/json"
    if isinstance(body, bytes):
        length = len(body)
    chunked = body is not None and length is None
    head = [
        f"{method} {_target(target, query)} HTTP/1.1",
        "Host: innkeeper",
        "Connection: close",
    ]
    if body is not None:
        head += [f"Content-Type: {kind}", "Transfer-Encoding: chunked" if chunked else f"Content-Length: {length}"]
    try:
        connection.settimeout(timeout)
        with _lost_connections():
            _send(connection, "\r\n".join([*head, "", ""]).encode("ascii"), body, length)
        response = Response(connection)
        if response.status >= 400:
            raise ApiError(_problem(response), response.status)
        return response
    except BaseException:
        connection.close()
        raise


def connect(path: str | os.PathLike[str]) -> socket.socket:
    """A connection to the socket at `path`, however long that path is (the kernel's limit is 107 bytes)."""
    folder, name = os.path.split(os.fspath(path))
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        connection.settimeout(10)
        if len(os.fsencode(path)) < 107:
            connection.connect(os.fspath(path))
        else:
            descriptor = os.open(folder, os.O_PATH | os.O_DIRECTORY)
            try:
                connection.connect(f"/proc/self/fd/{descriptor}/{name}")
            finally:
                os.close(descriptor)
    except OSError as error:
        connection.close()
        if isinstance(error, PermissionError):
            raise SocketForbidden(
                f"you may not connect to the daemon's socket {os.fspath(path)}", hint=_way_in(path)
            ) from None
        reason = "does not answer" if isinstance(error, TimeoutError) else "is not running"
        raise DaemonUnreachable(
            f"innkeeperd {reason} (socket {os.fspath(path)})", hint="start it with `inn daemon start`"
        ) from None
    return connection


def _way_in(path: str | os.PathLike[str]) -> str:
    """Who may connect to this socket, as advice."""
    import grp

    try:
        group = grp.getgrgid(Path(path).stat().st_gid)
    except (OSError, KeyError):
        return "use sudo"
    if group.gr_gid == 0 or group.gr_gid in os.getgroups():
        return "use sudo"
    return f"join its group with `sudo usermod -aG {group.gr_name} $USER` and log in again, or use sudo"


def _target(target: str, query: dict[str, Any] | None) -> str:
    pairs = [(name, value) for name, value in (query or {}).items() if value is not None]
    if not pairs:
        return target
    return target + "?" + "&".join(f"{name}={quote(_text(value), safe='')}" for name, value in pairs)


def _text(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _send(connection: socket.socket, head: bytes, body: bytes | Iterable[bytes] | None, length: int | None) -> None:
    if body is None or isinstance(body, bytes):
        connection.sendall(head + (body or b""))
        return
    connection.sendall(head)
    sent = 0
    for block in filter(None, body):
        sent += len(block)
        if length is not None and sent > length:
            break
        try:
            connection.sendall(b"%x\r\n%b\r\n" % (len(block), block) if length is None else block)
        except ConnectionError:
            return  # refused before its end was read: the answer says why
    if length is None:
        connection.sendall(b"0\r\n\r\n")
    elif sent != length:
        raise InvalidInput(f"{length} bytes were to be sent, but the file changed its size meanwhile")


def _problem(response: Response) -> dict[str, Any]:
    body = response.read()
    try:
        problem = json.loads(body)
    except ValueError:
        problem = None
    if isinstance(problem, dict):
        return problem
    return {"detail": f"the daemon answered {response.status}: {body[:200].decode(errors='replace')}"}


def _lost() -> DaemonUnreachable:
    return DaemonUnreachable(
        "innkeeperd ended the connection in the middle of its answer",
        hint="it may have been stopped: see `inn daemon status`, then try again",
    )


class _lost_connections:
    """Turns a socket's errors into `DaemonUnreachable`."""

    def __enter__(self) -> None:
        return None

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if isinstance(error, TimeoutError):
            raise DaemonUnreachable(
                "innkeeperd did not answer in time", hint="see `inn daemon status` and its log"
            ) from None
        if isinstance(error, ConnectionError):
            raise _lost() from None
