"""A list of steps on the terminal: a live line with a bar for the one that runs, a line for each that is done.

Where nobody watches (a pipe, CI) there are plain lines instead. Everything a step's programs print goes to a log file,
which is kept when something fails.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

WIDTH = 22
BAR = 24
PLAIN_EVERY = 15.0
"""Seconds between two lines about the same step where nobody watches live."""
SPINNER = "⠋⠙⠹⠸⠼⠴⠦⠧⠇⠏"
LAST_LINES = 12


class StepFailed(Exception):
    """A step did not work. `why` are a few lines for a person, `hint` is what to do now."""

    def __init__(self, why: str, hint: str) -> None:
        super().__init__(why)
        self.why, self.hint = why, hint


def live() -> bool:
    """Whether a person watches."""
    return sys.stdout.isatty() and not os.environ.get("CI") and os.environ.get("TERM") not in (None, "dumb")


def paint(text: str, code: str) -> str:
    """Text in an ANSI style, where stdout shows one (no-color.org)."""
    if not sys.stdout.isatty() or os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb":
        return text
    return f"\x1b[{code}m{text}\x1b[0m"


def bold(text: str) -> str:
    return paint(text, "1")


def dim(text: str) -> str:
    return paint(text, "2")


def clock(seconds: float) -> str:
    """`3.2s`, `1:05`."""
    return f"{seconds:.1f}s" if seconds < 60 else f"{int(seconds) // 60}:{int(seconds) % 60:02d}"


class Step:
    """The step that runs. Set `fraction` (0..1, None: unknown) and `text` as it goes; `result` is said at its end."""

    def __init__(self, title: str) -> None:
        self.title, self.began = title, time.monotonic()
        self.fraction: float | None = None
        self.text = self.result = ""

    @property
    def took(self) -> str:
        return clock(time.monotonic() - self.began)

    def line(self, frame: int, columns: int) -> str:
        """How it looks now, in at most `columns` columns."""
        if self.fraction is None:
            shown, text = "", self.text
        else:
            full = round(min(1.0, max(0.0, self.fraction)) * BAR)
            shown = paint("━" * full, "36") + dim("━" * (BAR - full)) + f" {min(1.0, self.fraction):4.0%}  "
            text = self.text
        used = 4 + WIDTH + 8 + (BAR + 7 if shown else 0)
        spin = paint(SPINNER[frame % len(SPINNER)], "36")
        return f"  {spin} {self.title:<{WIDTH}}{self.took:>6}  {shown}{dim(text[: max(0, columns - used - 1)])}"


class Steps:
    """Runs steps one after the other; use as a context manager that keeps the log where one failed."""

    def __init__(self) -> None:
        descriptor, name = tempfile.mkstemp(prefix="innkeeper-setup-", suffix=".log")
        self.log_path = Path(name)
        self._log: IO[str] = os.fdopen(descriptor, "w", errors="replace")
        self._failed = False

    def __enter__(self) -> Steps:
        return self

    def __exit__(self, *_: object) -> None:
        self._log.close()
        if not self._failed:
            self.log_path.unlink(missing_ok=True)

    @contextmanager
    def step(self, title: str) -> Iterator[Step]:
        """Show a step while the body runs, and how it ended."""
        step, over = Step(title), threading.Event()
        painter = threading.Thread(target=self._show, args=(step, over), daemon=True)
        painter.start()
        mark = paint("✗", "31")
        try:
            yield step
            mark = paint("✓", "32")
        except BaseException:
            self._failed = True
            raise
        finally:
            over.set()
            painter.join()
            clear = "\r\x1b[K" if live() else ""
            print(
                f"{clear}  {mark} {step.title:<{WIDTH}}{dim(f'{step.took:>6}')}  {dim(step.result)}".rstrip(),
                flush=True,
            )

    def skipped(self, title: str, why: str) -> None:
        """A step that there was no need for."""
        print(f"  {paint('✓', '32')} {title:<{WIDTH}}{'':>6}  {dim(why)}", flush=True)

    def _show(self, step: Step, over: threading.Event) -> None:
        if not live():
            said = ""
            while not over.wait(PLAIN_EVERY):
                percent = f"{step.fraction:4.0%} " if step.fraction is not None else ""
                if (now := f"{percent}{step.text}") != said:
                    said = now
                    print(f"  … {step.title:<{WIDTH}}{step.took:>6}  {now}", flush=True)
            return
        frame = 0
        while not over.wait(0.1):
            with suppress(OSError):
                columns = os.get_terminal_size(sys.stdout.fileno()).columns
                sys.stdout.write("\r\x1b[K" + step.line(frame, columns))
                sys.stdout.flush()
            frame += 1

    def run(
        self,
        command: Sequence[str | Path],
        on_line: Callable[[str], None] = lambda line: None,
        *,
        env: Mapping[str, str] | None = None,
        cwd: Path | None = None,
        status_fd: bool = False,
        hint: Callable[[str], str] = lambda output: "",
    ) -> str:
        """Run a program, its lines to the log and to `on_line`. Returns its output.

        With `status_fd` the program is given the number of a pipe in place of the word `{fd}`, and only what comes
        through that goes to `on_line`. Raises `StepFailed` with its last lines; `hint` makes advice from them.
        """
        words = [os.fspath(word) for word in command]
        reader = writer = -1
        if status_fd:
            reader, writer = os.pipe()
            words = [word.replace("{fd}", str(writer)) for word in words]
        self._log.write(f"\n$ {' '.join(words)}\n")
        self._log.flush()
        try:
            process = subprocess.Popen(
                words, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, cwd=cwd,
                env=os.environ | {"LC_ALL": "C.UTF-8"} | dict(env or {}), pass_fds=[writer] if status_fd else [],
                text=True, errors="replace",
            )  # fmt: skip
        except FileNotFoundError:
            if status_fd:
                os.close(reader)
            raise StepFailed(f"there is no program {words[0]}", "is this Debian?") from None
        finally:
            if status_fd:
                os.close(writer)
        watcher = threading.Thread(target=_each_line, args=(reader, on_line), daemon=True)
        if status_fd:
            watcher.start()
        last: deque[str] = deque(maxlen=400)
        assert process.stdout is not None
        try:
            for line in process.stdout:
                self._log.write(line)
                last.append(line.rstrip())
                if not status_fd:
                    on_line(line.rstrip())
            status = process.wait()
        except BaseException:  # ctrl-C: the program got it too, and is given time to leave things in order
            with suppress(subprocess.TimeoutExpired):
                process.wait(10)
            raise
        if status_fd:
            watcher.join(2)
        self._log.flush()
        output = "\n".join(last)
        if status:
            said = [line for line in last if line.strip()][-LAST_LINES:]
            why = f"`{' '.join(words[:4])}{' …' if len(words) > 4 else ''}` ended with status {status}"
            raise StepFailed("\n".join([*said, why]), hint(output) or "the whole output is in the log")
        return output

    def report(self, failure: StepFailed, again: str) -> None:
        """Say why, what to do, and where the log is."""
        print()
        for line in failure.why.splitlines():
            print(f"    {line}")
        print(f"\n  {paint('→', '33')} {failure.hint}")
        print(f"  {paint('→', '33')} then run {bold(again)} again: what is done already is not done twice")
        print(dim(f"    log: {self.log_path}"), flush=True)


def _each_line(descriptor: int, on_line: Callable[[str], None]) -> None:
    with os.fdopen(descriptor, errors="replace") as lines:
        for line in lines:
            on_line(line.rstrip())


def advice(output: str, table: Sequence[tuple[str, str]]) -> str:
    """The first row's advice whose pattern is in a program's output."""
    return next((text for pattern, text in table if re.search(pattern, output)), "")
