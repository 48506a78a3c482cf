"""The guest agent's client against a real qemu-ga on a UNIX socket, and against agents that lie.

qemu-ga runs on this host with our rights, so every command here is harmless and stays in a temporary folder.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import hashlib
import json
import math
import os
import secrets
import shutil
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing
from pathlib import Path

import pytest

from innkeeper.base.errors import AgentFailed, AgentUnavailable, InnkeeperError, InvalidInput
from innkeeper.qemu import agent as agent_module
from innkeeper.qemu import agent_exec
from innkeeper.qemu.agent import LINE_LIMIT, Agent
from innkeeper.qemu.agent_exec import POLL_MAX, POLL_MIN, STDIN_LIMIT, Chunk, Exit, capture, execute
from innkeeper.qemu.agent_files import read_file, write_file

SLEEP = f"60.{os.getpid()}"
"""Seconds; told apart from other tests' sleeps."""

QEMU_GA = shutil.which("qemu-ga") or shutil.which("/usr/sbin/qemu-ga")


@pytest.fixture
async def folder(tmp_path: Path) -> AsyncIterator[Path]:
    """A folder with a living agent.sock, and a path too long for a socket's address."""
    if QEMU_GA is None:
        pytest.skip("qemu-ga is not installed (package qemu-guest-agent)")
    deep = tmp_path / ("long" * 30)
    deep.mkdir()
    arguments = ["--method=unix-listen", "--path=agent.sock", "-t", str(deep)]
    process = await asyncio.create_subprocess_exec(
        QEMU_GA, *arguments, cwd=deep, stdin=asyncio.subprocess.DEVNULL, stderr=asyncio.subprocess.DEVNULL
    )
    try:
        await until(lambda: listening(deep) or process.returncode is not None)
        yield deep
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await process.wait()


def listening(folder: Path) -> bool:
    """A socket has its name a moment before anyone can connect to it."""
    handle = os.open(folder, os.O_PATH)
    try:
        with socket.socket(socket.AF_UNIX) as connection, contextlib.suppress(OSError):
            connection.connect(f"/proc/self/fd/{handle}/agent.sock")
            return True
        return False
    finally:
        os.close(handle)


@pytest.fixture(autouse=True)
async def own_files(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[None]:
    """No test leaves a file in the "guest", which here is this host, and none meets those of another."""
    monkeypatch.setattr(agent_exec, "FILE_PREFIX", f"inn-test-{secrets.token_hex(8)}-")
    yield
    await until(lambda: leftovers() == [])


@pytest.fixture
async def agent(folder: Path) -> AsyncIterator[Agent]:
    async with Agent(folder) as agent:
        yield agent


async def run(agent: Agent, *argv: str, **options: object) -> tuple[Exit, bytes, bytes]:
    out, err, end = b"", b"", None
    async for item in execute(agent, argv, **options):  # type: ignore[arg-type]
        assert end is None, "Exit comes last"
        if isinstance(item, Exit):
            end = item
        elif item.stream == "stdout":
            out += item.data
        else:
            err += item.data
    assert end is not None
    return end, out, err


def leftovers() -> list[Path]:
    """Files of this test in the "guest"."""
    return [path for place in ("/run", "/tmp") for path in Path(place).glob(agent_exec.FILE_PREFIX + "*")]


async def raw(folder: Path, data: bytes) -> None:
    """What a client leaves behind that is killed at a bad moment."""
    handle = os.open(folder, os.O_PATH)
    try:
        _, writer = await asyncio.open_unix_connection(f"/proc/self/fd/{handle}/agent.sock")
    finally:
        os.close(handle)
    writer.write(data)
    await writer.drain()
    await asyncio.sleep(0.05)
    writer.close()
    await asyncio.sleep(0.05)


# --- questions -------------------------------------------------------------------------------------------------


async def test_questions(agent: Agent) -> None:
    await agent.ping()
    names = {command["name"] for command in (await agent.info())["supported_commands"]}
    assert {"guest-exec", "guest-sync"} <= names
    assert (await agent.osinfo())["kernel-release"] == os.uname().release
    assert await agent.hostname() == socket.gethostname()
    loopback = [nic for nic in await agent.interfaces() if nic["name"] == "lo"]
    assert not loopback or "127.0.0.1/8" in loopback[0]["addresses"]


async def test_an_error_of_the_agent_is_told(agent: Agent) -> None:
    with pytest.raises(AgentFailed, match="guest-nonsense"):
        await agent.call("guest-nonsense")
    await agent.ping()


@pytest.mark.parametrize(
    "remains",
    [
        b'{"execute":"guest-file-write","arguments":{"handle":1,"buf-b64":"AAAA',
        b'{"execute":"guest-ping","id":"x"}\n{"exec',
        b"\xff\xfe\x00garbage }}}]]] \n \n",
        b"[[[[[[[[[[" * 10,
    ],
)
async def test_what_an_earlier_client_left_does_not_confuse(folder: Path, remains: bytes) -> None:
    await raw(folder, remains)
    async with Agent(folder) as agent:
        assert await agent.hostname() == socket.gethostname()
        assert (await run(agent, "echo", "hi"))[1] == b"hi\n"


async def test_calls_may_overlap(agent: Agent) -> None:
    results = await asyncio.gather(*(run(agent, "sh", "-c", f"sleep 0.0{n}; echo {n}") for n in range(8)))
    assert [out for _, out, _ in results] == [f"{n}\n".encode() for n in range(8)]


# --- exec ------------------------------------------------------------------------------------------------------


async def test_status_and_both_outputs(agent: Agent) -> None:
    assert await run(agent, "true") == (Exit(0), b"", b"")
    assert await run(agent, "sh", "-c", "echo out; echo err >&2; exit 7") == (Exit(7), b"out\n", b"err\n")
    assert (await run(agent, "sh", "-c", "kill -9 $$"))[0].status == 137


async def test_a_short_command_takes_few_questions(agent: Agent, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(agent_exec, "STREAM_AFTER", 60.0)  # how long "short" takes here is a matter of load
    asked: list[str] = []
    call, loop = agent.call, asyncio.get_running_loop()

    async def counted(command: str, *arguments: object, **options: object) -> object:
        asked.append(command)
        return await call(command, *arguments, **options)  # type: ignore[arg-type]

    await run(agent, "true")
    monkeypatch.setattr(agent, "call", counted)
    for command in (capture(agent, ["true"]), run(agent, "true")):
        asked.clear()
        began = loop.time()
        await command
        took = loop.time() - began
        looks = len(asked) - 1
        assert asked == ["guest-exec"] + ["guest-exec-status"] * looks, "start, then nothing but status"
        # Each look is twice as long after the last one as that was, up to POLL_MAX.
        assert looks <= 2 + math.log2(1 + took / POLL_MIN) + took / POLL_MAX


@pytest.mark.parametrize(
    ("argv", "status"), [(["no-such-program"], 127), (["/etc"], 126), (["/etc/passwd"], 126), (["/no/such"], 127)]
)
async def test_a_command_that_cannot_run_ends_as_in_a_shell(agent: Agent, argv: list[str], status: int) -> None:
    end, out, err = await run(agent, *argv)
    assert end.status == status and out == b"" and argv[0].encode() in err


async def test_no_word_is_read_by_a_shell(agent: Agent, tmp_path: Path) -> None:
    words = ["$(id)", "`id`", "; id", "a b", "", "*", "'", '"', "\n", "-n", "\\", "é", "$1", "${HOME}"]
    assert (await run(agent, "printf", "%s\\0", *words))[1].split(b"\0")[:-1] == [word.encode() for word in words]
    end, out, _ = await run(agent, "env", env={"A": "$(id) 'x' \"y\"\nz", "B": ""}, cwd=str(tmp_path))
    assert end.status == 0 and b"A=$(id) 'x' \"y\"\nz\n" in out and b"\nB=\n" in b"\n" + out
    odd = tmp_path / "a $(b) 'c"
    odd.mkdir()
    assert (await run(agent, "pwd", cwd=str(odd)))[1].decode() == f"{odd}\n"


async def test_a_missing_folder_is_an_error(agent: Agent) -> None:
    end, _, err = await run(agent, "true", cwd="/no/such/folder")
    assert end.status == 126 and b"/no/such/folder" in err


async def test_stdin(agent: Agent, tmp_path: Path) -> None:
    data = os.urandom(STDIN_LIMIT)
    assert await run(agent, "cat", stdin=data) == (Exit(0), data, b"")
    assert (await run(agent, "true", stdin=data))[0].status == 0
    assert await run(agent, "cat") == (Exit(0), b"", b"")
    file = tmp_path / "input"
    file.write_bytes(data + b"x")
    assert (await run(agent, "cat", stdin_path=str(file)))[1] == data + b"x"


@pytest.mark.parametrize("size", [65535, 65536, 65537, 3_000_000])
async def test_outputs_of_all_sizes_are_whole(agent: Agent, tmp_path: Path, size: int) -> None:
    """Around the limit of what comes back with the status, and NUL bytes only, which shells lose."""
    end, out, err = await run(agent, "sh", "-c", f"head -c {size} /dev/zero; head -c {size} /dev/zero >&2")
    assert (end, len(out), len(err)) == (Exit(0), size, size)
    file = tmp_path / "data"
    file.write_bytes(os.urandom(size))
    end, out, _ = await run(agent, "sh", "-c", f"cat {file}; sleep 0.3; cat {file}")
    assert out == file.read_bytes() * 2


async def test_output_comes_while_the_command_runs(agent: Agent, tmp_path: Path) -> None:
    flag = tmp_path / "flag"
    script = f"echo first; while [ ! -e {flag} ]; do sleep 0.02; done; echo last"
    seen = []
    async with aclosing(execute(agent, ["sh", "-c", script])) as items:
        async for item in items:
            seen.append(item)
            flag.touch()  # the command cannot end before its first line has arrived
    assert seen == [Chunk("stdout", b"first\n"), Chunk("stdout", b"last\n"), Exit(0)]


async def test_reopening_the_outputs_loses_nothing(agent: Agent) -> None:
    script = "echo a >/dev/stdout; echo b >/dev/stdout; echo c >/dev/stderr; echo d >/dev/stderr"
    assert await run(agent, "sh", "-c", script) == (Exit(0), b"a\nb\n", b"c\nd\n")


async def test_a_process_left_behind_does_not_hold_the_caller(agent: Agent, tmp_path: Path) -> None:
    end, out, _ = await run(agent, "sh", "-c", f"sleep 60 & echo $! >{tmp_path}/pid; echo started; exit 3")
    assert (end.status, out) == (3, b"started\n")
    pid = int((tmp_path / "pid").read_text())
    os.kill(pid, 0)  # it lives on, as it would after a login
    os.kill(pid, 9)


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(60):
        while not condition():  # noqa: ASYNC110  (other processes set no asyncio.Event)
            await asyncio.sleep(0.02)


def gone(pid: int) -> bool:
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        return ") Z " in Path(f"/proc/{pid}/stat").read_text()
    return True


@pytest.mark.parametrize("script", ["sleep 60", "trap '' TERM; sleep 60 & wait; sleep 60"])
async def test_a_cancelled_command_is_ended_with_its_children(agent: Agent, tmp_path: Path, script: str) -> None:
    pids = tmp_path / "pids"
    task = asyncio.create_task(run(agent, "sh", "-c", f"echo $$ >{pids}; {script}"))
    await until(lambda: pids.exists() and bool(pids.read_text().strip()))
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await until(lambda: gone(int(pids.read_text())))
    await agent.ping()


async def test_cancelling_at_any_moment_leaves_nothing(agent: Agent) -> None:
    for step in range(6):
        task = asyncio.create_task(run(agent, "sleep", SLEEP))
        await asyncio.sleep(step * 0.03)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
    assert (await run(agent, "pgrep", "-f", f"^sleep {SLEEP}"))[1] == b""


async def test_a_deadline_ends_the_command(agent: Agent) -> None:
    with pytest.raises(AgentFailed, match="killed"):
        await run(agent, "sleep", SLEEP, timeout=0.3)
    assert (await run(agent, "pgrep", "-f", f"^sleep {SLEEP}"))[1] == b""


async def test_kill_0_in_a_script_spares_the_agent(agent: Agent) -> None:
    await run(agent, "sh", "-c", "kill 0; sleep 5", timeout=20)
    await agent.ping()


async def test_without_a_shell_the_output_comes_at_the_end(agent: Agent) -> None:
    agent.launchers = [("no-such-setsid", "sh"), ("no-such-sh",), ()]
    assert await run(agent, "echo", "hi") == (Exit(0), b"hi\n", b"")
    end, _, err = await run(agent, "no-such-program")
    assert end.status == 127 and b"no-such-program" in err
    with pytest.raises(InvalidInput, match="no shell"):
        await run(agent, "pwd", cwd="/")


async def test_what_cannot_be_passed_is_refused_before(agent: Agent) -> None:
    before = agent.calls
    for argv, options in (
        ([], {}),
        ([""], {}),
        (["a\0b"], {}),
        (["\udcff"], {}),
        (["x" * 200_000], {}),
        (["true"], {"env": {"A=B": ""}}),
        (["true"], {"cwd": "relative"}),
        (["true"], {"stdin": b"x" * (STDIN_LIMIT + 1)}),
    ):
        with pytest.raises(InvalidInput):
            await run(agent, *argv, **options)
    assert agent.calls == before


# --- files -----------------------------------------------------------------------------------------------------


async def pieces(data: bytes, size: int = 100_000) -> AsyncIterator[bytes]:
    for start in range(0, len(data), size):
        yield data[start : start + size]


async def test_files_go_in_and_out_unchanged(agent: Agent, tmp_path: Path) -> None:
    target = tmp_path / 'a file\'s "name" $(x)'
    for data in (b"", b"x", os.urandom(3_500_000)):
        assert await write_file(agent, str(target), pieces(data), 0o640) == len(data)
        assert target.read_bytes() == data and target.stat().st_mode & 0o7777 == 0o640
        digest = hashlib.sha256()
        async for block in read_file(agent, str(target)):
            digest.update(block)
        assert digest.digest() == hashlib.sha256(data).digest()
    assert [path.name for path in tmp_path.iterdir() if path.is_file()] == [target.name]


async def test_a_broken_upload_leaves_the_old_file(agent: Agent, tmp_path: Path) -> None:
    target = tmp_path / "file"
    target.write_text("old")

    async def breaks() -> AsyncIterator[bytes]:
        yield b"x" * 2_000_000
        raise RuntimeError("the source is gone")

    with pytest.raises(RuntimeError):
        await write_file(agent, str(target), breaks())
    assert target.read_text() == "old"
    assert [path.name for path in tmp_path.iterdir() if path.is_file()] == ["file"]


async def test_file_errors_name_what_is_wrong(agent: Agent, tmp_path: Path) -> None:
    with pytest.raises(AgentFailed, match="No such file"):
        async for _ in read_file(agent, str(tmp_path / "none")):
            pass
    with pytest.raises(AgentFailed):
        await write_file(agent, str(tmp_path / "none" / "x"), pieces(b"x"))
    with pytest.raises(AgentFailed, match="folder"):
        await write_file(agent, str(tmp_path), pieces(b"x"))
    for path in ("relative", "", "/tmp/", "/a\0b"):
        with pytest.raises(InvalidInput):
            await write_file(agent, path, pieces(b"x"))


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
async def test_a_full_disk_is_told(agent: Agent) -> None:
    agent.launchers = [()]  # in place: a device cannot be replaced
    with pytest.raises(AgentFailed, match="space"):
        await write_file(agent, "/dev/full", pieces(b"x" * 10))


async def test_stopping_a_download_early_closes_the_file(agent: Agent, tmp_path: Path) -> None:
    (tmp_path / "big").write_bytes(bytes(4_000_000))
    async with aclosing(read_file(agent, str(tmp_path / "big"))) as blocks:
        async for _ in blocks:
            break
    with pytest.raises(AgentFailed, match="handle"):
        await agent.call("guest-file-flush", {"handle": 1000})
    await agent.ping()


# --- agents that lie -------------------------------------------------------------------------------------------

Behaviour = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


@contextlib.asynccontextmanager
async def hostile(tmp_path: Path, behaviour: Behaviour) -> AsyncIterator[Path]:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
            await behaviour(reader, writer)
        writer.close()

    server = await asyncio.start_unix_server(serve, tmp_path / "agent.sock")
    try:
        yield tmp_path
    finally:
        server.close()


def answers(answer: Callable[[dict[str, object]], bytes]) -> Behaviour:
    """An agent that plays by the rules for guest-sync and answers everything else with `answer`."""

    async def behave(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while line := await reader.readline():
            question = json.loads(line.lstrip(b"\xff"))
            if question["execute"] == "guest-sync":
                reply = {"return": question["arguments"]["id"], "id": question["id"]}
                writer.write(json.dumps(reply).encode() + b"\n")
            else:
                writer.write(answer(question))
            await writer.drain()

    return behave


def reply(value: object) -> Callable[[dict[str, object]], bytes]:
    return lambda question: json.dumps({"return": value, "id": question["id"]}).encode() + b"\n"


async def silent(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    await reader.read()


async def deaf(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    await asyncio.sleep(60)


async def chatty(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while True:
        writer.write(b'{"return": {}, "id": "__qmp#00000"}\n{"event": "X", "data": {}}\n[]\nnull\n}\n\n' * 100)
        await writer.drain()


async def endless(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while True:
        writer.write(b"x" * 1_000_000)
        await writer.drain()


@pytest.mark.parametrize("behaviour", [silent, deaf, chatty])
async def test_an_agent_that_never_comes_into_step(tmp_path: Path, behaviour: Behaviour) -> None:
    async with hostile(tmp_path, behaviour) as folder:
        with pytest.raises(AgentUnavailable, match="did not answer"):
            await Agent(folder).connect(timeout=0.3)


async def test_an_endless_line_is_cut(tmp_path: Path) -> None:
    async with hostile(tmp_path, endless) as folder:
        with pytest.raises(AgentUnavailable, match="8 MiB"):
            await Agent(folder).connect(timeout=20)


async def test_an_agent_that_hangs_up(tmp_path: Path) -> None:
    async def hangs_up(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readline()

    async with hostile(tmp_path, hangs_up) as folder:
        with pytest.raises(AgentUnavailable):
            await Agent(folder).connect(timeout=5)
    (tmp_path / "agent.sock").unlink(missing_ok=True)
    with pytest.raises(AgentUnavailable, match="socket"):
        await Agent(tmp_path).connect(timeout=5)


@pytest.mark.parametrize(
    "answer",
    [
        lambda question: b"garbage\n",
        lambda question: b"[" * 100_000 + b"\n",
        lambda question: b"x" * (3 * LINE_LIMIT),
        lambda question: json.dumps({"id": question["id"]}).encode() + b"\n",
        lambda question: json.dumps({"id": question["id"], "error": "no"}).encode() + b"\n",
        lambda question: json.dumps({"id": question["id"], "error": {"class": 1}}).encode() + b"\n",
        reply(None),
        reply([]),
        reply({"pid": "1"}),
        reply({"pid": True}),
        reply({"pid": 1}),
        reply({"pid": 1, "exited": "yes"}),
        reply({"pid": 1, "exited": True, "exitcode": "0"}),
        reply({"pid": 1, "exited": True, "exitcode": 0, "out-data": "***"}),
        reply({"pid": 1, "exited": True, "exitcode": 0, "out-data": 7}),
        reply({"pid": 1, "exited": True, "signal": [9]}),
    ],
)
async def test_answers_that_make_no_sense(tmp_path: Path, answer: Callable[[dict[str, object]], bytes]) -> None:
    async with hostile(tmp_path, answers(answer)) as folder, Agent(folder) as agent:
        with pytest.raises((AgentFailed, AgentUnavailable)):
            await run(agent, "true")
        for question in (agent.hostname, agent.interfaces, agent.info, agent.osinfo):
            with contextlib.suppress(InnkeeperError):
                await question()


async def test_ids_of_others_are_not_believed(tmp_path: Path) -> None:
    def answer(question: dict[str, object]) -> bytes:
        names: list[object] = ["__qmp#00001", None, 1, [], {}]
        lies = [{"return": {"host-name": "liar"}, "id": name} for name in names]
        truth = {"return": {"host-name": "truth"}, "id": question["id"]}
        return b"".join(json.dumps(message).encode() + b"\n" for message in (*lies, truth, truth))

    async with hostile(tmp_path, answers(answer)) as folder, Agent(folder) as agent:
        assert [await agent.hostname() for _ in range(3)] == ["truth"] * 3


async def test_more_bytes_than_asked_for_are_refused(tmp_path: Path) -> None:
    def answer(question: dict[str, object]) -> bytes:
        value: object = {"buf-b64": base64.b64encode(bytes(2_000_000)).decode(), "count": 2_000_000, "eof": False}
        return reply(1 if question["execute"] == "guest-file-open" else value)(question)

    async with hostile(tmp_path, answers(answer)) as folder, Agent(folder) as agent:
        with pytest.raises(AgentFailed, match="at most"):
            async for _ in read_file(agent, "/x"):
                pass


async def test_an_agent_that_stops_answering(tmp_path: Path) -> None:
    async with hostile(tmp_path, answers(lambda question: b"")) as folder, Agent(folder) as agent:
        with pytest.raises(AgentUnavailable, match="guest-ping"):
            await agent.ping(timeout=0.1)


async def test_closing_does_not_wait_for_one_that_reads_nothing(tmp_path: Path) -> None:
    async def stops_reading(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        question = json.loads((await reader.readline()).lstrip(b"\xff"))
        writer.write(json.dumps({"return": question["arguments"]["id"], "id": question["id"]}).encode() + b"\n")
        await writer.drain()
        await asyncio.sleep(60)

    async with hostile(tmp_path, stops_reading) as folder:
        agent = Agent(folder)
        await agent.connect()
        with pytest.raises(AgentUnavailable):
            await agent.call("guest-file-write", {"buf-b64": "A" * 5_000_000}, timeout=0.1)
        await agent.close()


async def test_an_agent_that_comes_up_late_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As during boot: QEMU listens, the guest loses the first question, then its agent starts."""
    monkeypatch.setattr(agent_module, "SYNC_INTERVAL", 0.05)

    async def late(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readline()
        await reader.readline()
        await answers(reply({}))(reader, writer)

    async with hostile(tmp_path, late) as folder, Agent(folder) as agent:
        await agent.ping()


async def test_shutdown_needs_no_answer(tmp_path: Path) -> None:
    async with hostile(tmp_path, answers(lambda question: b"")) as folder, Agent(folder) as agent:
        await agent.shutdown(wait=0.05)
    (other := tmp_path / "other").mkdir()

    def refuse(question: dict[str, object]) -> bytes:
        error = {"class": "GenericError", "desc": "not now"}
        return json.dumps({"id": question["id"], "error": error}).encode() + b"\n"

    async with hostile(other, answers(refuse)) as folder, Agent(folder) as agent:
        with pytest.raises(AgentFailed, match="not now"):
            await agent.shutdown()
