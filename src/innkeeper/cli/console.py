"""`inn console`: this terminal becomes the guest's serial console until ctrl-]."""

from __future__ import annotations

import os
import select
import sys
import threading
import time
from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from innkeeper.base.errors import ActionRefused
from innkeeper.cli import terminal
from innkeeper.cli.logs import harmless
from innkeeper.client import Innkeeper
from innkeeper.client.vm import VM

LEAVE = b"\x1d"
"""ctrl-], as telnet and virsh have it."""

TAIL = 24
"""Lines of the log to show first, so that a prompt that waits is seen."""


def console(inn: Innkeeper, args: Namespace) -> int:
    """Connect keyboard and screen. The terminal's settings come back however this ends."""
    vm = inn.vm(args.vm)
    answer = vm.info["allowed_actions"]["console"]
    if not answer["allowed"]:
        raise ActionRefused(f"{args.vm}: {answer['reason']}", hint=answer.get("hint") or "")
    with vm.console() as link:
        where = terminal.clean(args.vm)
        terminal.note(f"the serial console of {where}; ctrl-] leaves")
        # tamed: a program in the guest may have asked the terminal something, and the answer would be typed now
        _write(harmless(b"".join(vm.logs(tail=TAIL))))
        with _raw_terminal():
            left = _converse(link)
    terminal.note(f"\r\nleft the console of {where}" if left else f"\r\n{_why_it_ended(vm, where)}")
    return 0


def _converse(link: Any) -> bool:
    """Carry bytes both ways. True when the user left, False when the other side ended it."""
    from websockets.exceptions import ConnectionClosed

    ended_read, ended_write = os.pipe()

    def show() -> None:
        try:
            for message in link:
                _write(message if isinstance(message, bytes) else message.encode())
        except (ConnectionClosed, OSError):
            pass
        finally:
            os.close(ended_write)

    reader = threading.Thread(target=show, daemon=True)
    reader.start()
    keyboard = sys.stdin.fileno()
    sources = [keyboard, ended_read]
    try:
        while True:
            ready, _, _ = select.select(sources, [], [])
            if ended_read in ready:
                return False
            typed = os.read(keyboard, 4096)
            before, leave, _ = typed.partition(LEAVE)
            if before:
                link.send(before)
            if leave or (not typed and sys.stdin.isatty()):
                return True
            if not typed:  # a pipe or file that has been sent; the answer may still come
                sources.remove(keyboard)
    except ConnectionClosed:
        return False
    finally:
        link.close()
        reader.join(timeout=2)
        os.close(ended_read)


def _why_it_ended(vm: VM, name: str) -> str:
    """After the other side closed: what became of the VM."""
    try:
        for _ in range(20):
            info = vm.info
            if info["state"] not in ("stopping", "running"):  # it may be about to be noticed
                break
            time.sleep(0.1)
    except Exception:
        return f"the console of {name} was closed, and the daemon does not answer; the guest may still run"
    if info["state"] in ("running", "paused"):
        return f"the console was closed; {name} is {info['state']}: inn console {name}"
    reason = f" ({terminal.clean(info['reason'])})" if info.get("reason") else ""
    return f"{name} is {info['state']}{reason}"


@contextmanager
def _raw_terminal() -> Iterator[None]:
    """Every key goes through as it is, while this lasts."""
    if not sys.stdin.isatty():
        yield
        return
    import signal
    import termios
    import tty

    keyboard = sys.stdin.fileno()
    before = termios.tcgetattr(keyboard)
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda received, _: sys.exit(128 + received))
    try:
        tty.setraw(keyboard)
        yield
    finally:
        termios.tcsetattr(keyboard, termios.TCSAFLUSH, before)
        # what a full-screen program in the guest may have left behind: colours, a hidden cursor, mouse reports, the
        # alternate screen (xterm control sequences)
        _write(b"\x1b[0m\x1b[?25h\x1b[?1000l\x1b[?1002l\x1b[?1003l\x1b[?1006l\x1b[?2004l\x1b[?1047l")


def _write(data: bytes) -> None:
    sys.stdout.buffer.write(data)
    sys.stdout.buffer.flush()
