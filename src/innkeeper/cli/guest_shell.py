"""Run commands in a guest with pipes to and from them: over the system's ssh, or over the guest agent."""

from __future__ import annotations

import shlex
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO, Any, Protocol

from innkeeper.base.errors import InvalidInput
from innkeeper.client import VM


class Shell(Protocol):
    """Commands in a guest, over SSH or over its agent."""

    def ask(self, argv: list[str]) -> str:
        """What a command prints."""
        ...

    def reading(self, argv: list[str]) -> Any:
        """A context with the stdout of a command as a file."""
        ...

    def writing(self, argv: list[str]) -> Any:
        """A context with the stdin of a command as a file."""
        ...


class SshShell:
    """Over the system's ssh."""

    def __init__(self, command: list[str]) -> None:
        self._command = command

    def _start(self, argv: list[str], **pipes: Any) -> subprocess.Popen[bytes]:
        errors = tempfile.TemporaryFile()  # noqa: SIM115 - read after the process ended
        process = subprocess.Popen([*self._command, shlex.join(argv)], stderr=errors, **pipes)
        process.errors_file = errors  # type: ignore[attr-defined]
        return process

    @staticmethod
    def _finish(process: subprocess.Popen[bytes]) -> None:
        status = process.wait()
        errors: IO[bytes] = process.errors_file  # type: ignore[attr-defined]
        errors.seek(0)
        said = errors.read(4096).decode(errors="replace").strip()
        errors.close()
        if status:
            raise InvalidInput(said or f"ssh ended with status {status}", hint=_hint(said))

    def ask(self, argv: list[str]) -> str:
        process = self._start(argv, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE)
        assert process.stdout
        text = process.stdout.read().decode(errors="replace")
        process.stdout.close()
        self._finish(process)
        return text

    @contextmanager
    def reading(self, argv: list[str]) -> Iterator[IO[bytes]]:
        process = self._start(argv, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE)
        assert process.stdout
        try:
            yield process.stdout
            while process.stdout.read(65536):  # padding after the archive's end
                pass
        except BaseException:
            process.kill()
            process.wait()
            raise
        finally:
            process.stdout.close()
        self._finish(process)

    @contextmanager
    def writing(self, argv: list[str]) -> Iterator[IO[bytes]]:
        process = self._start(argv, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL)
        assert process.stdin
        try:
            yield process.stdin
            process.stdin.close()
        except BrokenPipeError:
            self._finish(process)  # says why
            raise
        except BaseException:
            process.kill()
            process.wait()
            raise
        self._finish(process)


class AgentShell:
    """Over the guest agent; streams go through a temporary file on their way in."""

    def __init__(self, vm: VM) -> None:
        self._vm = vm

    def _output(self, argv: list[str], stdin: Any = None) -> Iterator[bytes]:
        errors = b""
        for kind, value in self._vm.exec_stream(argv, stdin=stdin, cwd="/"):
            if kind == "stdout":
                yield value
            elif kind == "stderr":
                errors = (errors + value)[-4096:]
            elif value or kind == "signal":
                said = errors.decode(errors="replace").strip()
                raise InvalidInput(said or f"{argv[0]} in the guest ended with {kind} {value}", hint=_hint(said))

    def ask(self, argv: list[str]) -> str:
        return b"".join(self._output(argv)).decode(errors="replace")

    @contextmanager
    def reading(self, argv: list[str]) -> Iterator[IO[bytes]]:
        with tempfile.TemporaryFile() as file:
            for block in self._output(argv):
                file.write(block)
            file.seek(0)
            yield file

    @contextmanager
    def writing(self, argv: list[str]) -> Iterator[IO[bytes]]:
        with tempfile.TemporaryFile() as file:
            yield file
            file.seek(0)
            for _ in self._output(argv, stdin=file):
                pass


def _hint(said: str) -> str:
    if "ermission denied" in said:
        return "the login user may not; `--via agent` copies as root where the guest has its agent"
    return "install tar in the guest" if "tar: not found" in said else ""
