"""scripts/test: install what the tests need, then run the checks and the tests."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys

from first_steps import debian, python_env
from first_steps.python_env import PYTHON, ROOT, VENV
from first_steps.steps import StepFailed, Steps, bold, paint

CHECKS = (
    ("ruff", ["ruff", "check", "--quiet", "."]),
    ("formatting", ["ruff", "format", "--quiet", "--check", "."]),
    ("types", ["mypy", "--no-error-summary"]),
    ("imports", ["lint-imports"]),
)
HELP = """usage: scripts/test [--slow] [pytest's options]

Installs what the tests need, then runs ruff, mypy, the import rule and all tests but the slow ones.

  --slow     the slow tests too (installing Debian for real, long crash loops)
  anything else goes to pytest: scripts/test -k import, scripts/test tests/unit -x
             (without the checks, if it is there)
"""


def main(words: list[str]) -> int:
    """pytest's exit status; 1 also when only a check failed."""
    if {"-h", "--help"} & set(words):
        print(HELP, end="")
        return 0
    with Steps() as steps:
        try:
            if "--only-packages" in words:  # by itself, through sudo
                debian.install(steps, debian.missing(debian.RUN + debian.TEST))
                return 0
            _prepare(steps)
        except StepFailed as failure:
            steps.report(failure, "scripts/test")
            return 1
        slow = "--slow" in words
        words = [word for word in words if word != "--slow"]
        broken = _check(steps) if not words else []
    status = subprocess.run([PYTHON, "-m", "pytest", *_pytest(words, slow)], cwd=ROOT).returncode
    if status < 0:
        print(f"{paint('✗', '31')} pytest was killed by signal {-status}", flush=True)
        status = 1
    if broken:
        print(f"{paint('✗', '31')} besides, not right: {', '.join(broken)} (see above)")
    return status or (1 if broken else 0)


def _prepare(steps: Steps) -> None:
    if packages := debian.missing(debian.RUN + debian.TEST):
        print(f"{bold('Missing Debian packages:')} {' '.join(packages)}", flush=True)
        if os.geteuid() == 0:
            debian.install(steps, packages)
        elif not shutil.which("sudo"):
            raise StepFailed("installing them needs root", f"as root: apt-get install {' '.join(packages)}")
        elif subprocess.run(["sudo", sys.executable, str(ROOT / "scripts/test"), "--only-packages"]).returncode:
            raise StepFailed("they could not be installed", f"as root: apt-get install {' '.join(packages)}")
    if not python_env.installed("test"):
        number = len(python_env.locked("test"))
        print(f"{bold('Python packages:')} {number}, as requirements/test.txt names them, into {VENV}", flush=True)
        python_env.install(steps, "test")


def _check(steps: Steps) -> list[str]:
    """Names of the checks that found something, which is shown."""
    broken = []
    for name, command in CHECKS:
        try:
            with steps.step(name):
                steps.run([VENV / "bin" / command[0], *command[1:]], cwd=ROOT)
        except StepFailed as failure:
            broken.append(name)
            print("\n".join(f"    {line}" for line in failure.why.splitlines()), flush=True)
    return broken


def _pytest(words: list[str], slow: bool) -> list[str]:
    """Guests want CPUs: half as many workers as there are, at least two and at most eight, unless told otherwise."""
    found = list(words)
    if not any(word.startswith(("-n", "--pdb", "--numprocesses")) for word in words):
        found += ["-n", str(min(8, max(2, (os.cpu_count() or 2) // 2))), "--dist", "worksteal"]
    if not slow and "-m" not in words:
        found += ["-m", "not slow"]
    return found
