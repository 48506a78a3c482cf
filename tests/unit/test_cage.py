"""The tool cage: limits bite, and nothing survives its caller."""

from __future__ import annotations

import asyncio
import json
import os
import select
import subprocess
import sys
from pathlib import Path
from secrets import token_hex

import pytest

from innkeeper.base.errors import InvalidInput, ToolFailed, ToolMissing, ToolTimeout, Unsupported
from innkeeper.storage.cage import KEPT_OUTPUT, Limits, run_tool, sweep

SOON = Limits(seconds=30)
FACTS = """
import json, os, resource, sys
print(json.dumps({
    "env": dict(os.environ), "uid": os.getuid(), "gid": os.getgid(), "groups": os.getgroups(),
    "sid_is_pid": os.getsid(0) == os.getpid(), "stdin": sys.stdin.read(), "cwd": os.getcwd(),
    "core": resource.getrlimit(resource.RLIMIT_CORE),
    "status": dict(line.split(":\\t") for line in open("/proc/self/status").read().splitlines()),
}))
"""


def alive(pid: int) -> bool:
    """Neither gone nor a zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in ("Z", "X")
    except FileNotFoundError:
        return False


async def pids_in(path: Path, count: int) -> list[int]:
    """The pids that a script under test wrote there."""
    while not path.exists() or len(path.read_text().split()) < count:  # noqa: ASYNC110 (a file, not a task)
        await asyncio.sleep(0.01)
    return [int(word) for word in path.read_text().split()]


async def test_stdout_is_returned_and_lines_are_handed_on() -> None:
    lines: list[str] = []
    script = r"printf 'a\n(1/100%%)\r(2/100%%)\r'; printf 'warn\n' >&2; printf 'end'"
    out = await run_tool(["sh", "-c", script], limits=SOON, on_line=lines.append)
    assert out == "a\n(1/100%)\r(2/100%)\rend"
    assert sorted(lines) == sorted(["a", "(1/100%)", "(2/100%)", "end", "warn"])


async def test_environment_is_minimal_and_marked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET", "from the daemon")
    out = await run_tool([sys.executable, "-c", FACTS], limits=SOON, cwd=tmp_path, env={"EXTRA": "1"}, job="op1")
    facts = json.loads(out)
    env = facts["env"]
    assert env.pop("INNKEEPER_RUN")
    assert env == {
        "PATH": env["PATH"],
        "LANG": "C.UTF-8",
        "LC_ALL": "C.UTF-8",
        "TZ": "UTC",
        "EXTRA": "1",
        "INNKEEPER_JOB": "op1",
    }
    assert facts["cwd"] == str(tmp_path)
    assert facts["stdin"] == ""
    assert facts["sid_is_pid"]
    assert facts["core"] == [0, 0]
    assert facts["status"]["NoNewPrivs"] == "1"


async def test_stdin_of_any_size() -> None:
    text = b"x" * 3_000_000
    assert await run_tool(["wc", "-c"], limits=SOON, stdin=text) == "3000000\n"


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root")
async def test_unprivileged_user(tmp_path: Path) -> None:
    facts = json.loads(await run_tool(["/usr/bin/python3", "-c", FACTS], limits=SOON, user=65534))
    assert (facts["uid"], facts["gid"], facts["groups"]) == (65534, 65534, [])
    assert int(facts["status"]["CapEff"], 16) == 0
    secret = tmp_path / "secret"
    secret.write_text("x")
    secret.chmod(0o600)
    with pytest.raises(ToolFailed, match="Permission denied"):
        await run_tool(["cat", secret], limits=SOON, user=65534)


async def test_only_root_changes_the_user(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    with pytest.raises(Unsupported, match="only root"):
        await run_tool(["true"], limits=SOON, user=65534)


async def test_failure_carries_program_status_and_last_lines() -> None:
    with pytest.raises(ToolFailed, match="sh ended with status 3: no such luck") as caught:
        await run_tool(["sh", "-c", "echo fine; echo no such luck >&2; exit 3"], limits=SOON)
    assert caught.value.facts == {"program": "sh", "output": "no such luck", "exit": 3}


async def test_signal_is_named() -> None:
    with pytest.raises(ToolFailed, match="sh was killed by SIGSEGV"):
        await run_tool(["sh", "-c", "kill -SEGV $$"], limits=SOON)


async def test_missing_program_names_the_package() -> None:
    with pytest.raises(ToolMissing) as caught:
        await run_tool(["mcopy", "-V"], limits=SOON, env={"PATH": "/nonexistent"})
    assert caught.value.facts["package"] == "mtools"
    assert caught.value.hint == "apt install mtools"
    with pytest.raises(ToolMissing):
        await run_tool(["/nonexistent/qemu-img"], limits=SOON)


async def test_what_cannot_start_is_an_error_of_ours(tmp_path: Path) -> None:
    with pytest.raises(ToolFailed, match="could not be started"):
        await run_tool(["true"], limits=SOON, cwd=tmp_path / "absent")
    with pytest.raises(ToolFailed, match="could not be started"):
        await run_tool(["true", "x" * 10_000_000], limits=SOON)
    with pytest.raises(InvalidInput):
        await run_tool(["true", "a\0b"], limits=SOON)


async def test_file_size_limit(tmp_path: Path) -> None:
    target = tmp_path / "big"
    with pytest.raises(ToolFailed, match=r"file size limit|File too large"):
        await run_tool(["sh", "-c", f"exec head -c 2M /dev/zero > {target}"], limits=Limits(30, file_size=1 << 20))
    assert target.stat().st_size == 1 << 20


async def test_memory_limit() -> None:
    with pytest.raises(ToolFailed, match="MemoryError"):
        await run_tool(["/usr/bin/python3", "-c", "b'x' * (1 << 30)"], limits=Limits(30, memory=512 << 20))


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root")
async def test_process_limit() -> None:
    limits = Limits(30, processes=5)
    script = "for i in 1 2 3 4 5 6 7 8 9; do sleep 20 & done; wait"
    with pytest.raises(ToolFailed, match="fork"):
        await run_tool(["sh", "-c", script], limits=limits, user=61234)


async def test_timeout_kills_children_of_children(tmp_path: Path) -> None:
    pids = tmp_path / "pids"
    script = f"sh -c 'sleep 600 & echo $! >> {pids}; wait' & echo $! >> {pids}; echo waiting; wait"
    with pytest.raises(ToolTimeout, match=r"did not end within 0.7 s: waiting"):
        await run_tool(["sh", "-c", script], limits=Limits(0.7))
    assert not any(alive(pid) for pid in await pids_in(pids, 2))


async def test_cancel_kills_also_what_left_the_group(tmp_path: Path) -> None:
    pids = tmp_path / "pids"
    script = f"echo $$ >> {pids}; setsid sh -c 'echo $$ >> {pids}; sleep 600' & sleep 600"
    task = asyncio.create_task(run_tool(["sh", "-c", script], limits=SOON))
    started = await pids_in(pids, 2)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert not any(alive(pid) for pid in started)
    assert not Path(f"/proc/{started[0]}").exists(), "reaped, not a zombie"


async def test_a_second_cancel_does_not_leave_a_process(tmp_path: Path) -> None:
    pids = tmp_path / "pids"
    task = asyncio.create_task(run_tool(["sh", "-c", f"echo $$ > {pids}; sleep 600"], limits=SOON))
    (pid,) = await pids_in(pids, 1)
    task.cancel()
    asyncio.get_running_loop().call_soon(task.cancel)
    with pytest.raises(asyncio.CancelledError):
        await task
    assert not Path(f"/proc/{pid}").exists()


async def test_background_children_do_not_outlive_a_good_run(tmp_path: Path) -> None:
    pids = tmp_path / "pids"
    out = await run_tool(["sh", "-c", f"sleep 600 & echo $! > {pids}; echo done"], limits=SOON)
    assert out == "done\n"
    assert not alive((await pids_in(pids, 1))[0])


async def test_an_escaped_child_that_holds_the_pipe_does_not_hang(tmp_path: Path) -> None:
    pids = tmp_path / "pids"
    script = f"setsid sh -c 'echo $$ > {pids}; sleep 600' & while [ ! -s {pids} ]; do sleep 0.01; done; echo done"
    assert await run_tool(["sh", "-c", script], limits=SOON) == "done\n"
    assert not alive((await pids_in(pids, 1))[0])


async def test_output_flood_is_bounded() -> None:
    longest = 0

    def measure(line: str) -> None:
        nonlocal longest
        longest = max(longest, len(line))

    out = await run_tool(["sh", "-c", "head -c 8M /dev/zero | tr '\\0' x; echo end"], limits=SOON, on_line=measure)
    assert len(out) == KEPT_OUTPUT
    assert out.endswith("xend\n")
    assert 0 < longest <= 3 << 16


async def test_a_failing_callback_does_not_stop_the_run() -> None:
    def fail(line: str) -> None:
        raise RuntimeError(line)

    assert await run_tool(["echo", "x"], limits=SOON, on_line=fail) == "x\n"


async def test_no_descriptor_leaks() -> None:
    await run_tool(["true"], limits=SOON)
    before = len(list(Path("/proc/self/fd").iterdir()))
    for _ in range(5):
        await run_tool(["true"], limits=SOON)
        with pytest.raises(ToolFailed):
            await run_tool(["false"], limits=SOON)
        with pytest.raises(ToolTimeout):
            await run_tool(["sleep", "60"], limits=Limits(0.05))
    assert len(list(Path("/proc/self/fd").iterdir())) == before


def marked(job: str) -> subprocess.Popen[bytes]:
    """A process as a killed daemon would have left it."""
    environ = {**os.environ, "INNKEEPER_JOB": job}
    script = "env -i sleep 600 & echo $!; wait"
    return subprocess.Popen(["sh", "-c", script], env=environ, start_new_session=True, stdout=subprocess.PIPE)


def test_sweep_finds_leftovers_and_only_them() -> None:
    interrupted = token_hex(8)
    dead, foreign, unmarked = processes = [marked(interrupted), marked(token_hex(8)), marked("")]
    try:
        children = [int(process.stdout.readline()) for process in processes if process.stdout]
        swept = sweep({interrupted})
        assert dead.pid in swept
        assert set(swept) <= {dead.pid, children[0]}, "the child is marked until it clears its environment"
        assert dead.wait(10) == -9
        assert not alive(children[0]), "the group dies, also a child that cleared its environment"
        assert [process.poll() for process in (foreign, unmarked)] == [None] * 2
        assert sweep({interrupted}) == sweep(set()) == []
    finally:
        for process in processes:
            if process.poll() is None:
                os.killpg(process.pid, 9)
            process.wait()
            if process.stdout:
                process.stdout.close()


@pytest.mark.parametrize("user", [None, 65534])
def test_a_tool_dies_with_its_daemon(tmp_path: Path, user: int | None) -> None:
    if user is not None and os.geteuid() != 0:
        pytest.skip("needs root")
    daemon = f"""
import asyncio
from innkeeper.storage.cage import Limits, run_tool
asyncio.run(run_tool(["sh", "-c", "echo $$; exec sleep 600"], limits=Limits(600), user={user},
                     on_line=lambda line: print(line, flush=True)))
"""
    with subprocess.Popen([sys.executable, "-c", daemon], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        pidfd = os.pidfd_open(int(process.stdout.readline()))
        process.kill()
    assert select.select([pidfd], [], [], 10)[0]
    os.close(pidfd)
