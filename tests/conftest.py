"""Fixtures: a golden image built once for the whole run, real daemons on folders of their own, real guests."""

from __future__ import annotations

import asyncio
import fcntl
import json
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from innkeeper.base.home import Home
from innkeeper.client import Innkeeper
from innkeeper.client.wishes import vm_spec
from innkeeper.operations.image_make import _fields
from innkeeper.operations.image_verify import digest as _digest
from innkeeper.qemu.capabilities import keep
from innkeeper.qemu.process import Pid, find
from innkeeper.spec.image import Image
from innkeeper.spec.recipe import Recipe, load_recipe
from innkeeper.storage.build import build, recipe_digest
from innkeeper.store.sqlite import SQLiteStore

CACHE = Path(tempfile.gettempdir()) / f"innkeeper-test-images-{os.geteuid()}"


WITH_MORE = {"tiny-net": ("tiny", ["curl", "iperf3"])}
"""Images for tests alone: (the recipe that they are of, programs that they have besides, named as their packages)."""


def recipe_of(name: str) -> Recipe:
    """One that comes with Innkeeper, or one of those with more in it."""
    base, more = WITH_MORE.get(name, (name, []))
    recipe = load_recipe(base)
    if not more:
        return recipe
    assert recipe.initramfs is not None
    initramfs = recipe.initramfs.model_copy(update={"programs": [*recipe.initramfs.programs, *more]})
    return recipe.model_copy(update={"name": name, "packages": [*recipe.packages, *more], "initramfs": initramfs})


def built_image(name: str) -> tuple[Path, dict]:
    """The folder and the record of an image, built at most once per recipe: by whichever worker comes first."""
    recipe = recipe_of(name)
    folder = CACHE / f"{name}-{recipe_digest(recipe)[:16]}"
    CACHE.mkdir(mode=0o711, exist_ok=True)
    with (CACHE / f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not folder.exists():
            work = Path(tempfile.mkdtemp(dir=CACHE))
            try:
                built = asyncio.run(build(recipe, work, job="tests", report=lambda fraction, text: None))
                digests = {file: _digest(work / file) for file in built.files.values()}
                (work / "image.json").write_text(json.dumps(_fields(built) | {"digests": digests}))
                work.chmod(0o711)
                for file in built.files.values():
                    (work / file).chmod(0o644)
                work.rename(folder)
            except BaseException:
                shutil.rmtree(work, ignore_errors=True)
                raise
    return folder, json.loads((folder / "image.json").read_text())


FOUND_OUT = ("accelerator.json", "qemu.json")
"""What a daemon on a new folder finds out about its host, in three seconds."""


class Daemon:
    """A real innkeeperd on a folder of its own."""

    namespace: str | None = None
    """The network namespace it runs in, where that is not the machine's."""

    def __init__(self, folder: Path, pool: Path | None = None) -> None:
        self.home = Home(folder, folder / "run", pool or folder)
        self.inn = Innkeeper(self.home.socket)
        self.process: subprocess.Popen[bytes] | None = None
        self._pool = pool

    def add_image(self, name: str) -> None:
        """Have an image that is built already; only while no daemon runs."""
        source, fields = built_image(name)
        image_id = f"{name.replace('-', '')}00000000000"[:12]
        target = self.home.image(image_id)
        shutil.copytree(source, target, copy_function=_link)
        target.chmod(0o711)
        image = Image(id=image_id, name=name, stored_size=1, created="2026-01-01T00:00:00.000Z", **fields)

        async def record() -> None:
            store = SQLiteStore(self.home.store)
            await store.transact(
                {
                    f"image/{image_id}": image.model_dump(mode="json") | {"operation": None},
                    f"name/image/{name}": {"id": image_id},
                }
            )
            await store.close()

        self.home.data.mkdir(parents=True, exist_ok=True)
        asyncio.run(record())

    def start(self, fault: str = "", wait: bool = True) -> Daemon:
        """`fault` as `INNKEEPER_FAULT` (operations/fault.py)."""
        env = os.environ | {"INNKEEPER_HOME": str(self.home.data), "INNKEEPER_FAULT": fault}
        if self._pool:
            env["INNKEEPER_POOL"] = str(self._pool)
        self.know_the_host()
        command = [sys.executable, "-m", "innkeeper.server.daemon"]
        if self.namespace:  # not `ip netns exec`, which hides the cgroups
            command = ["nsenter", f"--net=/run/netns/{self.namespace}", *command]
        with self.home.daemon_log.open("ab") as log:
            self.process = subprocess.Popen(command, env=env, stdout=log, stderr=log)
        if wait:
            self.wait()
        return self

    def know_the_host(self) -> None:
        """Tell it what the first daemon has found out; it looks for itself where that is no longer so."""
        self.home.data.mkdir(parents=True, exist_ok=True)
        for name in FOUND_OUT:
            if not (self.home.data / name).exists() and (CACHE / name).exists():
                shutil.copyfile(CACHE / name, self.home.data / name)

    def _hand_on(self) -> None:
        for name in FOUND_OUT:
            found, known = self.home.data / name, CACHE / name
            if found.exists() and not (known.exists() and known.read_bytes() == found.read_bytes()):
                keep(known, json.loads(found.read_bytes()))

    def wait(self, seconds: float = 30) -> None:
        """Until it answers."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            with suppress(Exception):
                self.inn.version()
                break
            assert self.process is not None
            if self.process.poll() is not None:
                raise AssertionError(f"the daemon ended:\n{self.log()[-3000:]}")
            time.sleep(0.02)
        else:
            raise AssertionError(f"the daemon does not answer:\n{self.log()[-3000:]}")
        self._hand_on()

    def kill(self) -> None:
        """SIGKILL."""
        assert self.process is not None
        self.process.kill()
        self.process.wait()

    def stop(self) -> None:
        """SIGTERM, and wait."""
        assert self.process is not None
        self.process.send_signal(signal.SIGTERM)
        self.process.wait(30)

    def log(self) -> str:
        return self.home.daemon_log.read_text()

    def documents(self) -> dict[str, dict[str, Any]]:
        """All of the store, read beside the daemon."""
        with sqlite3.connect(f"file:{self.home.store}?mode=ro", uri=True) as db:
            found = dict(db.execute("SELECT key, value FROM document"))
        db.close()
        return {key: json.loads(value) for key, value in found.items()}

    def qemus(self) -> dict[Pid, str]:
        """All QEMU processes of this home, with their VM."""
        return find(self.home)

    def clean(self) -> None:
        """End everything of this home."""
        if self.process is not None and self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        for pid in find(self.home):
            with suppress(ProcessLookupError):
                os.kill(pid.number, signal.SIGKILL)
        deadline = time.monotonic() + 10
        while find(self.home) and time.monotonic() < deadline:
            time.sleep(0.02)

        async def cgroups() -> None:
            from innkeeper.qemu import cgroup

            for vm in await cgroup.list_ours(self.home):
                await cgroup.remove(self.home, vm)

        asyncio.run(cgroups())
        shutil.rmtree(self.home.data, ignore_errors=True)


def _link(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:  # another file system
        shutil.copyfile(source, target)


def _folder() -> Path:
    # QEMU's own user must be able to pass through, which pytest's private tmp_path does not allow.
    folder = Path(tempfile.mkdtemp(prefix=f"inn-test-{os.getpid()}-", dir=CACHE))
    folder.chmod(0o711)
    return folder


def pytest_configure(config):
    if not hasattr(config, "workerinput"):
        signal.signal(signal.SIGTERM, signal.default_int_handler)  # fixtures clean up after ctrl-C, so also after this
        _sweep()


def pytest_unconfigure(config):
    if not hasattr(config, "workerinput"):
        _sweep()


def _sweep() -> None:
    """End what a test process that was killed has left: its daemons, their guests, their folders."""
    for folder in CACHE.glob("inn-test-*-*"):
        if Path(f"/proc/{folder.name.split('-')[2]}").exists():
            continue
        if folder.is_mount():
            subprocess.run(["umount", "--lazy", folder], check=False)
        if folder.is_file():  # what was mounted there
            folder.unlink()
            continue
        mark = b"INNKEEPER_HOME=" + os.fsencode(folder) + b"\0"
        for entry in Path("/proc").glob("[0-9]*"):
            with suppress(OSError):
                if mark in (entry / "environ").read_bytes():
                    os.kill(int(entry.name), signal.SIGKILL)
        Daemon(folder).clean()


@contextmanager
def running_daemon(*images: str, namespace: str | None = None) -> Iterator[Daemon]:
    """A daemon with these images, running; in a network namespace where one is named."""
    CACHE.mkdir(mode=0o711, exist_ok=True)
    daemon = Daemon(_folder())
    daemon.namespace = namespace
    try:
        for image in images:
            daemon.add_image(image)
        yield daemon.start()
    finally:
        daemon.clean()


@contextmanager
def file_system(kind: str, size: str):
    """A file system of its own; taken away again, whatever happens in it."""
    if os.geteuid() != 0:
        pytest.skip("mounting needs root")
    CACHE.mkdir(mode=0o711, exist_ok=True)
    folder = _folder()
    try:
        if kind == "tmpfs":
            mount = ["mount", "-t", "tmpfs", "-o", f"size={size},mode=711", "tmpfs"]
        else:
            image = folder.with_suffix(".img")
            subprocess.run(["truncate", "-s", size, image], check=True)
            try:
                subprocess.run([f"mkfs.{kind}", "-q", image], check=True, capture_output=True)
            except FileNotFoundError:
                pytest.skip(f"mkfs.{kind} is not installed")
            mount = ["mount", "-o", "loop", image]
        done = subprocess.run([*mount, folder], capture_output=True, text=True)
        if done.returncode:
            pytest.skip(f"{kind} cannot be mounted here: {done.stderr.strip()}")
        folder.chmod(0o711)
        yield folder
    finally:
        subprocess.run(["umount", "-l", folder], capture_output=True)  # its loop device goes with it
        folder.with_suffix(".img").unlink(missing_ok=True)
        folder.rmdir()


@pytest.fixture
def bare_daemon():
    """A daemon that is not started yet, with no image: for tests of its own life."""
    CACHE.mkdir(mode=0o711, exist_ok=True)
    daemon = Daemon(_folder())
    yield daemon
    daemon.clean()


@pytest.fixture(scope="session")
def daemon():
    """A running daemon with the tiny image, shared by the tests of one worker: name your own VMs and delete them."""
    with running_daemon("tiny") as made:
        yield made


@pytest.fixture(scope="session")
def guest(daemon):
    """A running tiny guest, shared: leave it as you found it."""
    return daemon.inn.launch("tiny", name="shared", memory="256M", disk="1G")


@pytest.fixture(scope="session")
def warm(daemon):
    """The name of an image to fork: a tiny that was captured with an empty file system of 256 MiB mounted at /data."""
    spec = vm_spec("warming", "tiny", memory="256M", disk="256M")
    fill = "mkfs.ext4 -q /dev/vda && mkdir -p /run /data && mount /dev/vda /data"
    daemon.inn.warm("tiny", spec, until=fill).wait()
    return "tiny-warm"


@pytest.fixture
def tidy(daemon):
    """After the test its daemon runs, even if it was killed, and the VMs that the test has made are gone."""
    before = {one["name"] for one in daemon.inn.vms()}
    yield
    if daemon.process.poll() is not None:
        daemon.start()
    while left := [one["name"] for one in daemon.inn.vms() if one["name"] not in before]:
        for name in left:
            if not daemon.inn.vm(name).info["linked_clones"]:
                daemon.inn.vm(name).delete(force=True)


@pytest.fixture
def vm(daemon, warm, tidy):
    """A running tiny of the test's own, with /data, at once: a fork."""
    return daemon.inn.fork(warm, name="own")
