"""Runs a command in the guest through its agent, and streams what it prints.

`guest-exec` alone keeps a command's output to itself until the end, and 16 MiB of it at most. On guests with a shell
the command therefore runs under a small wrapper that lets it write into pipes (not files: programs reopen /dev/stderr,
which would truncate a file), and keeps what comes out in private files under /run or /tmp, which are read while they
grow. The start of both outputs also comes back with the exit status, so a short command takes two questions.

The output stays in the guest's memory (/run) until the command ends; a command that prints more than fits there fails.
"""

from __future__ import annotations

import asyncio
import base64
import re
import secrets
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Literal

from innkeeper.base.errors import AgentFailed, AgentUnavailable, InvalidInput
from innkeeper.base.units import KIB, MIB, format_size
from innkeeper.qemu.agent import Agent, decoded, open_file, read_ahead, read_block, shaped

STDIN_LIMIT = 1 * MIB
"""Bytes of input that go with the command; more has to be uploaded first (`stdin_path`)."""

POLL_MIN, POLL_MAX = 0.005, 0.2
"""Seconds between two looks at a running command: doubles from the one to the other, back to the first on output."""

STREAM_AFTER = 0.1
"""Seconds a command runs before its output is read as it grows; until then only its status is asked for."""

LINGER = 1.0
"""Seconds to wait for more output when the command has ended but a process it left behind holds its output."""
LINGER_TRIPS = 30
"""The same, in questions to the agent at their slowest: a guest that is short of CPU may not have passed on yet what
the command printed."""

CLEAN_TIMEOUT = 15.0
"""Seconds to end a command and remove its files."""

HEAD = 64 * KIB
"""Bytes of each output that come back with the status (the wrapper's `dd bs=65536`)."""

BLOCK = 256 * KIB
CAPTURE_LIMIT = 16 * MIB
"""qemu-ga's own limit for one captured output (GUEST_EXEC_MAX_OUTPUT)."""

FILE_PREFIX = "inn-"
"""How the names of the output files in the guest begin."""

_FOLDERS = ("/run", "/tmp")
_FORBIDDEN = ("CommandNotFound", "CommandDisabled")
_WORD_LIMIT = 128 * KIB - 1
"""Bytes of one argument (Linux, MAX_ARG_STRLEN)."""

# $1 name of the files, $2 folder to run in or "", $3 file for stdin or "", $4 number of variables, then NAME=VALUE and
# the command. Positional, so that nothing of it is read as shell code. Pipe A (fd 5) carries stdout, pipe B stderr.
# `set -C` opens with O_EXCL: the files are new and ours. dd tells "0+…" when it met the end before a full block. The
# files go in the background, to not keep the answer waiting; a large output stays until it was read, or for a minute.
_WRAPPER = r"""
d=/run; [ -d $d ] && [ -w $d ] || d=/tmp
f=$d/$1 cwd=$2 in=$3 n=$4
shift 4
umask 077
set -C
: >$f.out && : >$f.err && : >$f.rc || exit 125
set +C
{
  {
    (
      umask 022
      export PATH="${PATH:-/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin}" HOME="${HOME:-/root}"
      while [ $n -gt 0 ]; do export "$1"; shift; n=$((n - 1)); done
      [ -z "$cwd" ] || cd "$cwd" || exit 126
      if [ -n "$in" ]; then exec <"$in"; fi
      exec "$@"
    ) 2>&1 >&5 5>&-
    echo $? >>$f.rc
  } | cat >>$f.err 5>&-
} 5>&1 | cat >>$f.out
exec 3>&1 4>&2
big= rc=
[ ! -s $f.out ] || case $(dd bs=65536 count=1 <$f.out 2>&1 >&3) in 0+*) ;; *) big=1 ;; esac
[ ! -s $f.err ] || case $(dd bs=65536 count=1 <$f.err 2>&1 >&4) in 0+*) ;; *) big=1 ;; esac
read -r rc <$f.rc || echo "innkeeper: the output was lost: no room in the guest's $d" >&2
{ [ -z "$big" ] || sleep 60; rm -f $f.out $f.err $f.rc; } </dev/null >/dev/null 2>&1 3>&- 4>&- &
exit ${rc:-125}
"""

# $1 name of the files, $2 process group to end or "". TERM, two seconds to comply, KILL. There is no group yet if
# setsid has not got that far: then the process itself.
_CLEAN = r"""
if [ -n "$2" ]; then
  kill -TERM -"$2" || kill -TERM "$2"
  kill -CONT -"$2"
  i=0
  while kill -0 -"$2" && [ $i -lt 20 ]; do sleep 0.1; i=$((i + 1)); done
  kill -KILL -"$2"
fi 2>/dev/null
rm -f "/run/$1.out" "/run/$1.err" "/run/$1.rc" "/tmp/$1.out" "/tmp/$1.err" "/tmp/$1.rc"
"""


@dataclass(frozen=True)
class Chunk:
    """Some bytes of one output, in order within it."""

    stream: Literal["stdout", "stderr"]
    data: bytes


@dataclass(frozen=True)
class Exit:
    """How a command ended: `status` as a shell gives it, 0-255. 127: not found, 126: cannot be run, 128 + n: signal n.

    `signal` is set where the agent saw it itself (`capture`); under the wrapper only `status` tells.
    """

    status: int
    signal: int | None = None


async def capture(
    agent: Agent,
    argv: Sequence[str],
    *,
    env: Mapping[str, str] | None = None,
    stdin: bytes | None = None,
    timeout: float = 60.0,
    poll: float = POLL_MAX,
) -> tuple[Exit, bytes, bytes]:
    """Runs a command as the agent itself does: two questions, stdout and stderr at the end (about 6 MB together), no
    working folder. `env` replaces the whole environment, `poll` is the most seconds between two looks whether it ended.

    On time-out the command goes on in the guest; the agent has no way to end it. Raises as `Agent`.
    """
    pid = await _start(agent, _checked(argv, env), stdin, [f"{k}={v}" for k, v in env.items()] if env else None)
    deadline = asyncio.get_running_loop().time() + timeout
    delay = POLL_MIN
    while (status := await _status(agent, pid)) is None:
        if asyncio.get_running_loop().time() > deadline:
            raise AgentFailed(f"{argv[0][:100]!r} did not end within {timeout:g} s in the guest")
        await asyncio.sleep(delay)
        delay = min(2 * delay, poll)
    return status


async def execute(
    agent: Agent,
    argv: Sequence[str],
    *,
    env: Mapping[str, str] | None = None,
    stdin: bytes | None = None,
    stdin_path: str | None = None,
    cwd: str | None = None,
    timeout: float | None = None,
) -> AsyncGenerator[Chunk | Exit, None]:
    """Yields the command's output as it comes, then one `Exit`.

    `env` adds to the agent's environment; `stdin` has at most `STDIN_LIMIT` bytes, `stdin_path` is a file in the guest;
    `cwd` is absolute; `timeout` in seconds. If the caller stops early, is cancelled or the time is over, the command's
    whole process group is ended; so use it under `contextlib.aclosing`. On a guest without a shell all output comes at
    the end and `cwd` and `stdin_path` are refused. Raises as `Agent`, and `InvalidInput` for what cannot be passed on.
    """
    words = _checked(argv, env)
    if stdin is not None and (stdin_path is not None or len(stdin) > STDIN_LIMIT):
        raise InvalidInput(
            f"stdin may have {format_size(STDIN_LIMIT)} at most, and not together with stdin_path",
            hint="upload it to a file in the guest first",
        )
    for name, path in (("cwd", cwd), ("stdin_path", stdin_path)):
        if path is not None and (not path.startswith("/") or "\0" in path):
            raise InvalidInput(f"{name} {path!r} is not an absolute path", field=name)
    variables = [f"{key}={value}" for key, value in (env or {}).items()]
    run = _Run(agent, FILE_PREFIX + secrets.token_hex(16), argv[0], timeout)
    wrapped = ["-c", _WRAPPER, "sh", run.name, cwd or "", stdin_path or "", str(len(variables)), *variables, *words]
    try:
        for launcher in list(agent.launchers):
            if not launcher:
                async for item in _plain(agent, words, env, stdin, stdin_path or cwd, timeout):
                    yield item
                return
            try:
                await run.start([*launcher, *wrapped], stdin)
            except AgentFailed as error:
                if len(agent.launchers) == 1 or error.facts.get("error_class") in _FORBIDDEN:
                    raise
                continue  # this guest has no such program
            agent.launchers = [launcher]
            break
        async for item in run.follow():
            yield item
    finally:
        await run.clean()


async def _plain(
    agent: Agent,
    words: list[str],
    env: Mapping[str, str] | None,
    stdin: bytes | None,
    needs_shell: str | None,
    timeout: float | None,
) -> AsyncGenerator[Chunk | Exit, None]:
    """Without a shell in the guest (Windows)."""
    if needs_shell is not None:
        raise InvalidInput("this guest has no shell: neither cwd nor stdin_path can be used")
    try:
        status, out, err = await capture(agent, words, env=env, stdin=stdin, timeout=timeout or 86400.0)
    except AgentFailed as error:
        if "Failed to execute" not in error.detail:
            raise
        status, out, err = Exit(127), b"", f"innkeeper: cannot run {words[0]!r}: {error.detail}\n".encode()
    if out:
        yield Chunk("stdout", out)
    if err:
        yield Chunk("stderr", err)
    yield status


class _Run:
    """One command under the wrapper."""

    def __init__(self, agent: Agent, name: str, title: str, timeout: float | None) -> None:
        self.agent, self.name, self.title, self.timeout = agent, name, title[:100], timeout
        self.deadline = None if timeout is None else asyncio.get_running_loop().time() + timeout
        self.pid: int | None = None
        self.handles: dict[str, int] = {}
        self.seen = {"out": 0, "err": 0}
        self.rc = b""
        self.leftover = False  # files remain in the guest
        self.own_group = False
        self._starting: asyncio.Task[int] | None = None

    async def start(self, command: list[str], stdin: bytes | None) -> None:
        # Shielded: if we are cancelled now, the process id still has to be learnt, or nobody could end the command.
        self.own_group = command[0] == "setsid"
        self._starting = asyncio.create_task(_start(self.agent, command, stdin, None))
        try:
            self.pid = await asyncio.shield(self._starting)
        except AgentFailed:
            self._starting = None
            raise
        self._starting = None

    async def follow(self) -> AsyncGenerator[Chunk | Exit, None]:
        assert self.pid is not None
        clock = asyncio.get_running_loop().time
        began, delay, ended, trip = clock(), POLL_MIN, None, 0.0
        while True:
            await asyncio.sleep(delay)
            if not self.handles and clock() - began > STREAM_AFTER:
                await self._open()
            names, asked = list(self.handles), clock()
            status, blocks = await asyncio.gather(
                _status(self.agent, self.pid), asyncio.gather(*map(self._read, names))
            )
            trip = max(trip, clock() - asked)
            fresh = dict(zip(names, blocks, strict=True))
            for stream in ("out", "err"):
                if data := fresh.get(stream):
                    yield self._chunk(stream, data)
            self.rc += fresh.get("rc", b"")
            if status is not None:
                exited, *heads = status
                self.pid = None
                self.leftover = exited.signal is not None  # the wrapper was killed before it removed its files
                for stream, head in zip(("out", "err"), heads, strict=True):
                    if len(head) >= HEAD:  # there may be more than fits into the answer
                        self.leftover = True
                        async for data in self._rest(stream):
                            yield self._chunk(stream, data)
                    elif len(head) > self.seen[stream]:
                        yield self._chunk(stream, head[self.seen[stream] :])
                await self.clean()
                yield exited
                return
            full = any(len(data) == BLOCK for data in blocks)
            got = any(fresh.get(stream) for stream in ("out", "err"))
            delay = 0 if full else POLL_MIN if got else min(2 * (delay or POLL_MIN), POLL_MAX)
            if self.rc.strip():  # the command has ended; what still holds its output is a process it left behind
                ended = clock() if ended is None or got else ended
                if clock() - ended > max(LINGER, LINGER_TRIPS * trip):
                    self.pid, self.leftover = None, True
                    await self.clean()
                    yield Exit(int(self.rc) if re.fullmatch(rb"\d{1,3}\n", self.rc) else 125)
                    return
            elif self.deadline is not None and clock() > self.deadline:
                raise AgentFailed(f"{self.title!r} did not end within {self.timeout:g} s in the guest, and was killed")

    def _chunk(self, stream: str, data: bytes) -> Chunk:
        self.seen[stream] += len(data)
        return Chunk("stdout" if stream == "out" else "stderr", data)

    async def _open(self) -> None:
        """Opens the three files, unless the command has just ended and they are gone."""
        for folder in _FOLDERS:
            names = ("out", "err", "rc")
            calls = (open_file(self.agent, f"{folder}/{self.name}.{name}", "r") for name in names)
            found = await asyncio.gather(*calls, return_exceptions=True)
            self.handles |= {name: handle for name, handle in zip(names, found, strict=True) if isinstance(handle, int)}
            for problem in found:
                if isinstance(problem, BaseException) and not isinstance(problem, AgentFailed):
                    raise problem
            if self.handles:
                return

    async def _read(self, name: str) -> bytes:
        return (await read_block(self.agent, self.handles[name], BLOCK))[0]

    async def _rest(self, stream: str) -> AsyncGenerator[bytes, None]:
        if stream not in self.handles:
            await self._open()
        if stream not in self.handles:
            raise AgentFailed(f"the output of {self.title!r} is gone from the guest")
        async with aclosing(read_ahead(self.agent, self.handles[stream], BLOCK)) as blocks:
            async for data in blocks:
                yield data

    async def clean(self) -> None:
        """Closes what is open in the guest, ends the command if it still runs, removes its files. May be repeated."""
        if not self.handles and not self.leftover and self.pid is None and self._starting is None:
            return
        # On its own, so that it is done even when the caller has been cancelled; bounded by the calls' own deadlines.
        task = asyncio.create_task(self._clean())
        _cleaning.add(task)
        task.add_done_callback(_cleaning.discard)
        await asyncio.shield(task)

    async def _clean(self) -> None:
        try:
            async with asyncio.timeout(CLEAN_TIMEOUT):
                await self._clean_guest()
        except (AgentFailed, AgentUnavailable, TimeoutError):
            pass  # the guest is going away, and its /run with it

    async def _clean_guest(self) -> None:
        if self._starting is not None:
            starting, self._starting = self._starting, None
            self.pid = await starting
        handles, self.handles = list(self.handles.values()), {}
        closing = (self.agent.call("guest-file-close", {"handle": handle}) for handle in handles)
        await asyncio.gather(*closing, return_exceptions=True)
        if self.pid is not None or self.leftover:
            pid, self.pid, self.leftover = self.pid, None, False
            if pid is not None and await _status(self.agent, pid) is not None:
                pid = None  # it has just ended: its number may be someone else's by now
            # Without setsid the command is in the agent's own process group, which must live.
            group = str(pid) if pid is not None and self.own_group else ""
            await capture(self.agent, ["sh", "-c", _CLEAN, "sh", self.name, group], timeout=CLEAN_TIMEOUT)
            if pid is not None:
                await _status(self.agent, pid)  # or the agent would keep its record for ever


_cleaning: set[asyncio.Task[None]] = set()  # asyncio itself keeps weak references to tasks only


def _checked(argv: Sequence[str], env: Mapping[str, str] | None) -> list[str]:
    if not argv or not argv[0]:
        raise InvalidInput("there is no command to run")
    for name in env or {}:
        if not re.fullmatch("[A-Za-z_][A-Za-z0-9_]*", name):
            raise InvalidInput(f"{name!r} cannot be the name of an environment variable", field="env")
    for word in (*argv, *(env or {}).values()):
        if "\0" in word or any("\ud800" <= char <= "\udfff" for char in word):
            raise InvalidInput(f"{word[:60]!r} cannot be passed to a guest", hint="UTF-8 text without NUL bytes")
        if len(word.encode()) > _WORD_LIMIT:
            raise InvalidInput(f"{word[:60]!r}… is too long for an argument", hint="pass it as stdin or as a file")
    return list(argv)


async def _start(agent: Agent, command: list[str], stdin: bytes | None, env: list[str] | None) -> int:
    arguments: dict[str, object] = {"path": command[0], "arg": command[1:], "capture-output": True}
    if stdin is not None:
        arguments["input-data"] = base64.b64encode(stdin).decode()
    if env is not None:
        arguments["env"] = env
    answer = shaped(await agent.call("guest-exec", arguments), dict, "guest-exec")
    return shaped(answer.get("pid"), int, "guest-exec")


async def _status(agent: Agent, pid: int) -> tuple[Exit, bytes, bytes] | None:
    """None while it runs, then its end and the captured stdout and stderr."""
    command = "guest-exec-status"
    answer = shaped(await agent.call(command, {"pid": pid}), dict, command)
    if not shaped(answer.get("exited"), bool, command):
        return None
    signal = answer.get("signal")
    if signal is not None:
        end = Exit(128 + (shaped(signal, int, command) & 0x7F), shaped(signal, int, command))
    else:
        end = Exit(shaped(answer.get("exitcode", 0), int, command) & 0xFF)
    out, err = (decoded(answer.get(name), CAPTURE_LIMIT, command) for name in ("out-data", "err-data"))
    return end, out, err
