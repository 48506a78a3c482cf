"""The private Python environment in `.venv`: what a lock names, and Innkeeper itself from this checkout.

The locks (`requirements/*.txt`) name every package with its hashes and no index: pip's own configuration says where
from. A stamp in the environment tells which locks are installed, so that a second run has nothing to do.
"""

from __future__ import annotations

import hashlib
import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from first_steps.steps import Step, Steps, advice

ROOT = Path(__file__).resolve().parents[2]
VENV = ROOT / ".venv"
PYTHON = VENV / "bin/python"
STAMP = VENV / "innkeeper-locks.json"
ENV = {"PIP_DISABLE_PIP_VERSION_CHECK": "1", "PIP_NO_INPUT": "1", "PIP_ROOT_USER_ACTION": "ignore"}

_ADVICE = (
    (r"DO NOT MATCH THE HASHES|do not match the hashes",
     "the package index served other bytes than requirements/*.txt names: use another index, or look into it"),
    (r"No matching distribution|Could not find a version",
     "the package index that pip is configured with lacks a locked version: see pip config list"),
    (r"(?i)temporary failure|max retries|connection|timed out|certificate|proxy",
     "pip cannot reach the package index: check the network and pip config list (index, proxy, certificate)"),
    (r"No space left on device", "make room on the disk"),
    (r"ensurepip is not available", "apt-get install python3-venv"),
)  # fmt: skip


def locked(lock: str) -> list[str]:
    """Names of the packages that a lock has for this platform."""
    lines = (ROOT / "requirements" / f"{lock}.txt").read_text().splitlines()
    found = (re.match(r"([A-Za-z0-9_.-]+)==[^ ]+(.*)", line) for line in lines)
    return [m[1] for m in found if m and not re.search(r"== '(emscripten|win32|darwin|Windows|cygwin)'", m[2])]


def installed(lock: str) -> bool:
    """Whether this lock, as it is now, is what the environment has."""
    try:
        stamps = json.loads(STAMP.read_text())
    except (OSError, ValueError):
        return False
    return stamps.get(lock) == _digest(lock) and PYTHON.exists()


def install(steps: Steps, lock: str) -> None:
    """Bring `.venv` to what the lock says. Raises `StepFailed`."""

    def hint(output: str) -> str:
        return advice(output, _ADVICE)

    with steps.step("Python packages") as step:
        if not _works():
            step.text = f"making {VENV}"
            steps.run([sys.executable, "-m", "venv", "--clear", VENV], hint=hint)
        pip: list[str | Path] = [PYTHON, "-m", "pip", "install", "--progress-bar", "off"]
        total = len(locked(lock))
        lines = _counter(step, total)
        steps.run([*pip, "--require-hashes", "-r", ROOT / f"requirements/{lock}.txt"], lines, env=ENV, hint=hint)
        step.fraction, step.text = None, "Innkeeper itself"
        steps.run([*pip, "--no-deps", "--no-build-isolation", "-e", ROOT], env=ENV, hint=hint)
        step.result = f"{total} packages in {VENV}"
    stamps = {name: _digest(name) for name in ("run", "test") if name == lock or lock == "test"}
    STAMP.write_text(json.dumps(stamps))


def _counter(step: Step, total: int) -> Callable[[str], None]:
    """pip's output → progress: it names each package once when it gets it, and then installs all."""
    seen = 0

    def line(text: str) -> None:
        nonlocal seen
        if match := re.match(r"\s*(Collecting|Requirement already satisfied:) ([A-Za-z0-9_.-]+)", text):
            seen += 1
            step.fraction = 0.9 * min(1.0, seen / total)
            step.text = match[2] if match[1] == "Collecting" else ""
        elif text.startswith("Installing collected packages"):
            step.fraction, step.text = 0.92, "installing"

    return line


def _works() -> bool:
    """An environment whose Python has been upgraded away, or that was half made, is made anew."""
    if not PYTHON.exists():
        return False
    probe = [str(PYTHON), "-c", "import pip, sys; print(*sys.version_info[:2])"]
    answer = subprocess.run(probe, capture_output=True, text=True)
    return answer.returncode == 0 and answer.stdout.split() == [str(part) for part in sys.version_info[:2]]


def _digest(lock: str) -> str:
    """Of everything that the environment is made from."""
    digest = hashlib.sha256(f"{ROOT} {sys.version}".encode())
    for path in (ROOT / f"requirements/{lock}.txt", ROOT / "pyproject.toml"):
        digest.update(path.read_bytes())
    return digest.hexdigest()
