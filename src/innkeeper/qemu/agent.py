"""A client of the QEMU guest agent (qemu-ga), over the UNIX socket that QEMU connects to the guest's virtio port.

Everything that comes back was written by the guest: lines are bounded, shapes are checked, each call has a deadline.

The channel outlives its clients, so it may hold what an earlier one left: half a command in the agent's parser, and
answers that nobody fetched. Therefore each connection begins with the byte 0xFF, which flushes the agent's parser
(QEMU, "Guest Agent Protocol Reference", guest-sync-delimited), then `guest-sync` with a random number. Whatever comes
before its answer is dropped, and message ids are unique to the connection: late answers never meet a new question.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import contextlib
import json
import secrets
import socket
from collections.abc import AsyncGenerator
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, TypeVar

from qemu.qmp import ConnectError, ExecInterruptedError, ExecuteError, QMPClient, QMPError
from qemu.qmp.message import Message
from qemu.qmp.protocol import Runstate
from qemu.qmp.qmp_client import BadReplyError

from innkeeper.base.errors import AgentFailed, AgentUnavailable, InvalidInput
from innkeeper.base.units import MIB, format_size
from innkeeper.qemu.sockets import connect

LINE_LIMIT = 8 * MIB
"""Bytes of one answer. asyncio buffers up to twice as much before it stops reading."""

CALL_TIMEOUT = 30.0
"""Seconds for one call. Generous: an emulated guest is slow while it boots, and its agent does one thing at a time."""

CLOSE_TIMEOUT = 1.0
"""Seconds to send what is still queued when a connection is closed."""

SYNC_INTERVAL = 1.0
"""Seconds until the first repetition of guest-sync; doubles up to `SYNC_INTERVAL_MAX`. The agent may start any time."""
SYNC_INTERVAL_MAX = 8.0

_T = TypeVar("_T")


class _Channel(QMPClient):
    """QMP without greeting; forgiving until in sync, and deaf to everything but answers to its own questions."""

    def __init__(self) -> None:
        super().__init__(readbuflen=LINE_LIMIT)
        self.await_greeting = self.negotiate = False
        self.prefix = secrets.token_hex(8)
        self.synced = False
        self.complaint = "it was closed"

    def _get_exec_id(self) -> str:
        self._execute_id += 1
        return f"{self.prefix}-{self._execute_id}"

    async def _establish_session(self) -> None:
        assert self._writer is not None
        self._writer.write(b"\xff")
        await super()._establish_session()

    def _do_send(self, msg: Message) -> None:
        assert self._writer is not None
        self._writer.write(bytes(msg) + b"\n")

    async def _do_recv(self) -> Message:
        while True:
            try:
                line = await self._readline()
            except ValueError:
                self.complaint = f"the agent sent a line of more than {format_size(LINE_LIMIT)}"
                raise
            try:
                reply = json.loads(line.rpartition(b"\xff")[2])
            except (ValueError, RecursionError):
                if self.synced:
                    self.complaint = "the agent sent something that is not JSON"
                    raise
                reply = None
            # Events do not exist in this protocol; QMPClient would queue them without a limit.
            if isinstance(reply, dict) and "event" not in reply:
                number = reply.get("id")
                if isinstance(number, str) and number in self._pending:
                    return Message(reply, eager=False)
            await asyncio.sleep(0)  # a flood of junk must not keep the other tasks from running

    def abort(self) -> None:
        """Drops what is still to be sent, so that a peer that reads nothing cannot keep `disconnect` waiting."""
        if self._writer is not None:
            self._writer.transport.abort()


class Agent:
    """One connection to the agent of one guest. Calls may overlap: the agent answers them in order.

    >>> async with Agent(folder, "agent.sock") as agent:
    ...     await agent.ping()

    Every call raises `AgentUnavailable` if no answer came within its deadline or the connection is gone (then make a
    new `Agent`), and `AgentFailed` if the answer was an error or makes no sense.
    """

    def __init__(self, folder: Path, name: str = "agent.sock") -> None:
        if not name or "/" in name:
            raise InvalidInput(f"{name!r} cannot be a socket's name")
        self.folder, self.name = folder, name
        self._channel = _Channel()
        self.calls = 0
        """Questions asked so far: what a caller wants to keep low."""
        self.may_ask = asyncio.Event()
        """Questions wait while it is not set."""
        self.may_ask.set()
        self.launchers: list[tuple[str, ...]] = [("setsid", "sh"), ("sh",), ()]
        """What `agent_exec` puts before a command, best first; those that this guest turns out to lack are dropped."""

    async def __aenter__(self) -> Agent:
        await self.connect()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def connect(self, timeout: float = CALL_TIMEOUT) -> None:
        """Connects and waits up to `timeout` seconds until the agent answers; it may come up meanwhile."""
        try:
            async with asyncio.timeout(timeout):
                if self._channel.runstate == Runstate.IDLE:
                    await self.dial()
                await self._sync()
        except TimeoutError as error:
            await self.close()
            raise AgentUnavailable(f"the guest agent did not answer within {timeout:g} s") from error
        except (OSError, ConnectError) as error:
            await self.close()
            reason = error.exc if isinstance(error, ConnectError) else error
            raise AgentUnavailable(f"the guest agent's socket cannot be used: {reason}") from error
        except BaseException:
            await self.close()
            raise

    async def dial(self, connection: socket.socket | None = None) -> None:
        """Only the host's half of `connect`, for a guest that does not run yet; over an open `connection` if there is
        one. Raises OSError, `ConnectError`."""
        connection = connection or await connect(self.folder, self.name)
        try:
            await self._channel.connect(connection)
        except BaseException:
            connection.close()
            raise

    @property
    def synced(self) -> bool:
        """Questions may be asked."""
        return self._channel.synced

    async def close(self) -> None:
        """Never raises for what the guest did: a connection that broke is closed as well."""
        with contextlib.suppress(Exception):  # EOFError and whatever ended the reader: the calls it hit have said so
            try:
                async with asyncio.timeout(CLOSE_TIMEOUT):
                    await self._channel.disconnect()
            except TimeoutError:
                self._channel.abort()
                await self._channel.disconnect()

    async def _sync(self) -> None:
        """Asks until any of the questions is answered. The agent may have been started after the first was lost."""
        asked: set[asyncio.Task[None]] = set()
        interval = SYNC_INTERVAL
        try:
            while True:
                asked.add(asyncio.create_task(self._sync_once()))
                done, _ = await asyncio.wait(asked, timeout=interval, return_when=asyncio.FIRST_COMPLETED)
                if done:
                    done.pop().result()
                    self._channel.synced = True
                    return
                interval = min(2 * interval, SYNC_INTERVAL_MAX)
        finally:
            for task in asked:
                task.cancel()
            await asyncio.gather(*asked, return_exceptions=True)

    async def _sync_once(self) -> None:
        number = secrets.randbits(31)
        if await self.call("guest-sync", {"id": number}, timeout=None) != number:
            raise AgentFailed("the guest agent answered guest-sync with another number")

    async def call(
        self, command: str, arguments: dict[str, object] | None = None, *, timeout: float | None = CALL_TIMEOUT
    ) -> object:
        """The agent's answer to any command of its protocol. `timeout` in seconds; None: the caller keeps one."""
        self.calls += 1
        try:
            async with asyncio.timeout(timeout):
                await self.may_ask.wait()
                return await self._channel.execute(command, arguments)
        except TimeoutError as error:
            raise AgentUnavailable(f"the guest agent did not answer {command} within {timeout:g} s") from error
        except ExecuteError as error:
            raise AgentFailed(f"{command}: {str(error)[:1000]}", error_class=str(error.error_class)[:100]) from error
        except ExecInterruptedError as error:
            raise AgentUnavailable(
                f"the connection to the guest agent broke during {command}: {self._channel.complaint}"
            ) from error
        except BadReplyError as error:
            raise AgentFailed(f"{command}: the guest agent's answer makes no sense") from error
        except QMPError as error:
            raise AgentUnavailable(f"{command}: {str(error)[:1000]}") from error

    # --- questions ---

    async def ping(self, timeout: float = CALL_TIMEOUT) -> None:
        await self.call("guest-ping", timeout=timeout)

    async def info(self) -> dict[str, Any]:
        """`version` and `supported_commands`, a list of {name, enabled, success-response}."""
        return shaped(await self.call("guest-info"), dict, "guest-info")

    async def osinfo(self) -> dict[str, str]:
        """What /etc/os-release and uname say: `id`, `version-id`, `pretty-name`, `kernel-release`, `machine`, …"""
        found = shaped(await self.call("guest-get-osinfo"), dict, "guest-get-osinfo")
        return {str(key): str(value) for key, value in found.items()}

    async def hostname(self) -> str:
        found = shaped(await self.call("guest-get-host-name"), dict, "guest-get-host-name")
        return shaped(found.get("host-name"), str, "guest-get-host-name")

    async def interfaces(self) -> list[dict[str, Any]]:
        """One entry per NIC: {"name", "mac", "addresses": ["10.0.2.15/24", …]}, loopback included."""
        answer = shaped(await self.call("guest-network-get-interfaces"), list, "guest-network-get-interfaces")
        try:
            return [
                {
                    "name": str(nic["name"]),
                    "mac": str(nic.get("hardware-address", "")).lower(),
                    "addresses": [f"{ip['ip-address']}/{int(ip['prefix'])}" for ip in nic.get("ip-addresses", [])],
                }
                for nic in answer
            ]
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise AgentFailed("guest-network-get-interfaces: the answer makes no sense") from error

    # --- requests ---

    async def shutdown(self, mode: Literal["powerdown", "halt", "reboot"] = "powerdown", wait: float = 2.0) -> None:
        """Asks the guest to shut down. Success has no answer, so this returns after `wait` seconds without an error, or
        as soon as the connection ends."""
        self.calls += 1
        try:
            async with asyncio.timeout(wait):
                await self._channel.execute("guest-shutdown", {"mode": mode})
        except (TimeoutError, ExecInterruptedError):
            return
        except ExecuteError as error:
            raise AgentFailed(f"guest-shutdown: {str(error)[:1000]}") from error
        except QMPError as error:
            raise AgentUnavailable(f"guest-shutdown: {str(error)[:1000]}") from error

    async def set_time(self, nanoseconds: int | None = None) -> None:
        """Sets the guest's clock, in nanoseconds since 1970 UTC; None: from its own RTC."""
        await self.call("guest-set-time", {} if nanoseconds is None else {"time": nanoseconds})


def shaped(value: object, kind: type[_T], command: str) -> _T:
    """`value`, or `AgentFailed` if the agent answered with another type than its protocol says."""
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise AgentFailed(
            f"{command}: the guest agent answered with {type(value).__name__} where {kind.__name__} belongs"
        )
    return value


def decoded(value: object, limit: int, command: str) -> bytes:
    """Bytes from base64; absent is empty. `AgentFailed` for what is no base64 or more than `limit` bytes."""
    if value is None:
        return b""
    try:
        data = base64.b64decode(shaped(value, str, command), validate=True)
    except (binascii.Error, ValueError) as error:
        raise AgentFailed(f"{command}: the guest agent answered with broken base64") from error
    if len(data) > limit:
        raise AgentFailed(
            f"{command}: the guest agent answered with {len(data)} bytes where at most {limit} were asked for"
        )
    return data


async def open_file(agent: Agent, path: str, mode: str) -> int:
    """A handle on a file of the guest; `mode` as fopen(3)."""
    return shaped(await agent.call("guest-file-open", {"path": path, "mode": mode}), int, "guest-file-open")


async def read_block(agent: Agent, handle: int, count: int) -> tuple[bytes, bool]:
    """The next bytes, and whether the end was reached."""
    command = "guest-file-read"
    answer = shaped(await agent.call(command, {"handle": handle, "count": count}), dict, command)
    return decoded(answer.get("buf-b64"), count, command), answer.get("eof") is True


async def read_ahead(agent: Agent, handle: int, count: int) -> AsyncGenerator[bytes, None]:
    """The rest of a file in blocks of `count` bytes; the next one is always under way. Use it under `aclosing`."""
    pending: list[asyncio.Task[tuple[bytes, bool]]] = []
    try:
        ended = False
        while not ended:
            while len(pending) < 2:
                pending.append(asyncio.create_task(read_block(agent, handle, count)))
            data, ended = await pending.pop(0)
            ended = ended or not data
            if data:
                yield data
    finally:
        for task in pending:
            task.cancel()
        await asyncio.gather(*pending, return_exceptions=True)
