"""Real daemons without the time that their imports take: a server that has imported everything forks each of them.

A forked daemon is a process of its own, which SIGKILL ends like any other. Run as a program this file is the server:
it reads one JSON object per line, {"env": {…}, "log": path}, and answers each with the pid of a new innkeeperd.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import json
import os
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

PR_SET_PDEATHSIG, CLONE_NEWNET = 1, 0x40000000
"""prctl(2), setns(2)."""


class Forked:
    """A forked daemon, with what `tests/conftest.py` uses of a Popen."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self._pidfd = os.pidfd_open(pid)
        self._over = False

    def poll(self) -> int | None:
        """None while it lives."""
        return 0 if self._ended(0) else None

    def _ended(self, seconds: float) -> bool:
        if not self._over and select.select([self._pidfd], [], [], seconds)[0]:
            self._over = True
            os.close(self._pidfd)  # a thousand of them are more than select takes
        return self._over

    def send_signal(self, number: int) -> None:
        if not self._over:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._pidfd, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def wait(self, timeout: float = 30) -> int:
        if not self._ended(timeout):
            raise subprocess.TimeoutExpired("innkeeperd", timeout)
        # The server's child is gone from /proc a moment after it is dead.
        while Path(f"/proc/{self.pid}").exists():
            time.sleep(0.001)
        return 0


class ForkServer:
    """Forks daemons on demand."""

    def __init__(self) -> None:
        self._process = subprocess.Popen([sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE)

    def fork(self, env: dict[str, str], log: Path) -> Forked:
        assert self._process.stdin and self._process.stdout
        self._process.stdin.write(json.dumps({"env": env, "log": str(log)}).encode() + b"\n")
        self._process.stdin.flush()
        return Forked(int(self._process.stdout.readline()))

    def close(self) -> None:
        assert self._process.stdin and self._process.stdout
        self._process.stdin.close()
        self._process.stdout.close()
        self._process.wait()


def _serve() -> None:
    from innkeeper.operations import vm_create
    from innkeeper.server import daemon

    app = _warm_app()

    def create_app(context):
        app.state.context = context
        return app

    daemon.create_app = create_app
    gc.freeze()  # else each daemon's first collection goes through all that was imported: 80 ms
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # the kernel reaps
    for line in sys.stdin:
        order = json.loads(line)
        pid = os.fork()
        if pid == 0:
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            os.setsid()
            ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)  # tests that are killed leave no daemon
            null, log = os.open(os.devnull, os.O_RDWR), os.open(order["log"], os.O_WRONLY | os.O_APPEND | os.O_CREAT)
            for source, target in ((null, 0), (log, 1), (log, 2)):
                os.dup2(source, target)
            os.environ.update(order["env"])
            if namespace := order["env"].get("TEST_NAMESPACE"):
                _enter(namespace)
            vm_create.SSH_PORT_BASE = int(order["env"]["TEST_SSH_PORTS"])
            if image := order["env"].get("TEST_BUILT_IMAGE"):
                _quick_build(Path(image))
            os._exit(daemon.main())
        print(pid, flush=True)


def _enter(namespace: str) -> None:
    """Go on in a network namespace; Python has no setns before 3.12."""
    with Path(f"/run/netns/{namespace}").open() as file:
        if ctypes.CDLL(None).setns(file.fileno(), CLONE_NEWNET):
            os._exit(1)


def _warm_app():
    """The API without a context. What its first requests would import, and prepare for each route, it has behind it: a
    third of a second of each daemon's life."""
    import asyncio
    import importlib
    import inspect

    from innkeeper.server.app import create_app

    for name in ("http.h11_impl", "websockets.websockets_sansio_impl"):
        importlib.import_module(f"uvicorn.protocols.{name}")

    async def receive():
        return {"type": "http.request", "body": b"", "more_body": False}

    async def send(message):
        pass

    scope = {"type": "http", "method": "GET", "path": "/v1/nothing", "headers": [], "query_string": b""}
    app = create_app()
    asyncio.run(app(scope, receive, send))
    inspect.getsource(_warm_app)  # compiles what fastapi reads a route's source with
    return app


def _quick_build(folder: Path) -> None:
    """Have `image-build` take an image that was built before instead of 20 seconds; `test_a_build_is_interrupted`
    interrupts the real thing."""
    import shutil

    from innkeeper.operations import image_make
    from innkeeper.storage.build import Built

    record = json.loads((folder / "image.json").read_text())

    async def build(recipe, workspace, *, job, report):
        for name in record["files"].values():
            shutil.copyfile(folder / name, workspace / name)
        report(1.0, "built")
        return Built(
            boot=record["kind"], files=record["files"], virtual_size=record["virtual_size"], cmdline=record["cmdline"],
            user=record["user"], firmware=("bios",), has_agent=record["agent"], has_cloud_init=record["cloud_init"],
            min_memory=0, inputs=record["source"],
        )  # fmt: skip

    image_make.build = build


if __name__ == "__main__":
    _serve()
