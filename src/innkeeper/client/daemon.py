"""Start and stop the daemon of this user's data folder."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from innkeeper.base.home import Home
from innkeeper.client.api import Innkeeper
from innkeeper.client.errors import DaemonUnreachable, SocketForbidden

START_DEADLINE = 10.0
STOP_DEADLINE = 60.0


def running(home: Home) -> dict[str, Any] | None:
    """What the daemon says about itself (`GET /v1/version`), or None where none runs."""
    try:
        return Innkeeper(home.socket).version()
    except SocketForbidden:
        raise
    except DaemonUnreachable:
        return None


def owner(home: Home) -> int:
    """The user id whose data folder this is; of the folder it will be made in, while it does not exist."""
    for folder in (home.data, *home.data.parents):
        try:
            return folder.stat().st_uid
        except OSError:
            continue
    return os.geteuid()


def start(home: Home) -> dict[str, Any]:
    """Start the daemon in its own session and wait until it answers; one that runs already is left alone.

    Returns its version document. Raises `DaemonUnreachable` with the end of its log when it does not come up in 10 s,
    and where the data folder is another user's: a second owner would leave files that the first cannot read.
    """
    if document := running(home):
        return document
    if home.data.exists() and owner(home) != os.geteuid():
        raise DaemonUnreachable(
            f"innkeeperd is not running, and its data folder {home.data} is another user's",
            hint=f"start it as that user: sudo -u '#{owner(home)}' inn daemon start",
        )
    home.data.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(home.daemon_log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    try:
        begin = os.fstat(descriptor).st_size
        process = subprocess.Popen(
            [sys.executable, "-m", "innkeeper.server.daemon"],
            stdin=subprocess.DEVNULL,
            stdout=descriptor,
            stderr=descriptor,
            start_new_session=True,
            cwd="/",
        )
    finally:
        os.close(descriptor)
    deadline = time.monotonic() + START_DEADLINE
    while time.monotonic() < deadline:
        if document := running(home):
            return document
        if process.poll() is not None:  # it failed, or another `inn` was first: that one may need a moment more
            deadline = min(deadline, time.monotonic() + 2)
        time.sleep(0.02)
    ended = process.poll()
    what = f"ended with status {ended}" if ended is not None else f"did not answer within {START_DEADLINE:.0f} s"
    said = _log_since(home.daemon_log, begin)
    raise DaemonUnreachable(
        f"innkeeperd was started but {what}" + (f"; its last words:\n{said}" if said else ""),
        hint=f"its log is {home.daemon_log}",
    )


def stop(home: Home) -> int | None:
    """End the daemon and wait until it is gone; guests go on. Returns the pid it had, None where none ran."""
    document = running(home)
    if document is None:
        return None
    pid = int(document["pid"])
    try:
        handle = os.pidfd_open(pid)
    except ProcessLookupError:
        return pid
    try:
        signal.pidfd_send_signal(handle, signal.SIGTERM)
        if not select.select([handle], [], [], STOP_DEADLINE)[0]:
            raise DaemonUnreachable(
                f"innkeeperd (pid {pid}) did not end within {STOP_DEADLINE:.0f} s",
                hint=f"its log is {home.daemon_log}",
            )
    except PermissionError:
        raise DaemonUnreachable(
            f"innkeeperd (pid {pid}) is another user's process", hint="use sudo, or stop it as that user"
        ) from None
    finally:
        os.close(handle)
    return pid


def _log_since(path: Path, begin: int, lines: int = 15) -> str:
    try:
        with path.open("rb") as log:
            log.seek(begin)
            text = log.read()[-16384:].decode(errors="replace")
    except OSError:
        return ""
    return "\n".join("  " + line for line in text.strip().splitlines()[-lines:])
