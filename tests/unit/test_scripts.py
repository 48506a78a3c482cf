"""scripts/up, scripts/test and .ci/run: what can be known about them without a fresh machine."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "scripts"))

from first_steps import debian, python_env, up  # noqa: E402
from first_steps import test as scripts_test  # noqa: E402
from first_steps.steps import Step, StepFailed, Steps, advice  # noqa: E402


def script(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(words, cwd=ROOT, capture_output=True, text=True, env=os.environ | {"CI": "1"})


@pytest.mark.parametrize("name", ["up", "test"])
def test_a_script_needs_only_the_standard_library(name):
    for path in [ROOT / f"scripts/{name}", *(ROOT / "scripts/first_steps").glob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text())):
            modules = (
                [alias.name for alias in node.names]
                if isinstance(node, ast.Import)
                else [node.module or ""]
                if isinstance(node, ast.ImportFrom)
                else []
            )
            for module in modules:
                top = module.split(".")[0]
                assert top in sys.stdlib_module_names or top == "first_steps", f"{path.name} imports {module}"


@pytest.mark.parametrize("name", ["up", "test", "lock"])
def test_a_script_can_be_run(name):
    assert os.access(ROOT / f"scripts/{name}", os.X_OK)


def test_an_old_python_is_told_so():
    text = (ROOT / "scripts/up").read_text()
    check = text.split("sys.dont_write_bytecode")[0].replace("(3, 11)", "(99, 0)")
    ended = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True)
    assert ended.returncode == 1 and "needs Python" in ended.stderr
    ast.parse(text, feature_version=(3, 7))


def test_help():
    for name in ("up", "test"):
        ended = script(f"scripts/{name}", "--help")
        assert ended.returncode == 0 and f"scripts/{name}" in ended.stdout


def test_a_dry_run_says_what_it_would_do_and_does_nothing(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["up", "--dry-run", "--image", "tiny", "--memory", "1G"])
    monkeypatch.setattr(debian, "check_host", lambda: "12")
    monkeypatch.setattr(debian, "missing", lambda packages: ["qemu-system-x86"])
    monkeypatch.setattr(python_env, "installed", lambda lock: False)
    monkeypatch.setattr(up, "_ask", lambda *words: None)
    monkeypatch.setattr(up, "_bring_up", lambda *_: pytest.fail("it began"))
    assert up.main() == 0
    said = capsys.readouterr().out
    for word in ("qemu-system-x86", "requirements/run.txt", "tiny", "1G"):
        assert word in said


def test_another_system_is_told_what_to_do(monkeypatch):
    monkeypatch.setattr(debian, "release", lambda: {"ID": "fedora", "PRETTY_NAME": "Fedora 44"})
    monkeypatch.setattr(debian.platform, "machine", lambda: "x86_64")
    with pytest.raises(StepFailed) as caught:
        debian.check_host()
    assert "Fedora 44" in caught.value.why and "Debian 12 and 13" in caught.value.hint
    monkeypatch.setattr(debian.platform, "machine", lambda: "aarch64")
    with pytest.raises(StepFailed, match="aarch64"):
        debian.check_host()


@pytest.mark.parametrize("version", debian.SUITES)
def test_a_default_image_has_a_recipe(version):
    assert (ROOT / f"recipes/{debian.SUITES[version]}.yaml").exists()
    assert debian.SUITES[version] in up.ROOM


def test_every_tool_that_storage_names_comes_with_a_package_that_is_installed():
    from innkeeper.storage.cage import PACKAGES

    for tool in ("qemu-img", "mcopy", "mformat", "mke2fs", "sfdisk", "mmdebstrap", "qemu-system-x86_64"):
        assert PACKAGES.get(tool, tool) in debian.RUN


def test_missing_packages():
    assert debian.missing(["no-such-package-anywhere"]) == ["no-such-package-anywhere"]


def test_apt_progress():
    step = Step("packages")
    debian.progress(step, "dlstatus:1:50.0:Retrieving file 5 of 10 (3s remaining)", 0, 1)
    assert (step.fraction, step.text) == (0.25, "Retrieving file 5 of 10")
    debian.progress(step, "pmstatus:libc6:50.0:Unpacking libc6:amd64 (amd64)", 0, 1)
    assert (step.fraction, step.text) == (0.75, "Unpacking libc6:amd64")
    debian.progress(step, "nonsense", 0, 1)
    debian.progress(step, "pmerror:x:1:y", 0, 1)
    assert step.fraction == 0.75


def test_apt_summary():
    output = "0 upgraded, 84 newly installed, 0 to remove.\nNeed to get 93.1 MB of archives.\n"
    assert debian.summary(output) == "84 packages, 93.1 MB downloaded"
    assert debian.summary("") == ""


@pytest.mark.parametrize(
    ("said", "hint"),
    [
        ("E: Unable to locate package ovmf", "main"),
        ("W: Failed to fetch http://x  Temporary failure resolving 'x'", "mirror"),
        ("E: You don't have enough free space", ""),
        ("E: dpkg was interrupted, you must manually run", "dpkg --configure -a"),
    ],
)
def test_advice_on_apt(said, hint):
    assert hint in advice(said, debian._ADVICE)


def test_a_lock_is_read_for_this_platform():
    names = python_env.locked("run")
    assert {"pydantic", "uvicorn", "hatchling", "qemu-qmp"} <= {name.replace(".", "-") for name in names}
    assert not {"colorama", "httpx2-jsfetch"} & set(names)
    assert set(names) <= set(python_env.locked("test"))


def test_pip_progress():
    step = Step("python")
    line = python_env._counter(step, 4)
    line("Collecting anyio==4.16.0 (from -r run.txt (line 9))")
    assert (step.fraction, step.text) == (pytest.approx(0.225), "anyio")
    line("Requirement already satisfied: rich==15 in x")
    assert step.fraction == pytest.approx(0.45)
    line("Installing collected packages: anyio")
    assert step.fraction == pytest.approx(0.92)


def test_a_failing_step_keeps_its_log_and_says_why(capsys):
    with Steps() as steps:
        with pytest.raises(StepFailed) as caught, steps.step("doomed"):
            steps.run(["sh", "-c", "echo one; echo two >&2; exit 3"], hint=lambda output: f"saw {output.split()[-1]}")
        steps.report(caught.value, "scripts/up")
    said = capsys.readouterr().out
    assert "two" in said and "status 3" in said and "saw two" in said and "scripts/up" in said
    assert "two" in steps.log_path.read_text()
    steps.log_path.unlink()


def test_a_step_that_works_leaves_no_log(capsys):
    lines: list[str] = []
    with Steps() as steps, steps.step("fine") as step:
        steps.run(["sh", "-c", "echo to-the-log; echo status >/proc/self/fd/$0", "{fd}"], lines.append, status_fd=True)
        step.result = "all well"
    assert lines == ["status"]
    assert not steps.log_path.exists()
    assert "all well" in capsys.readouterr().out


def test_a_program_that_is_not_there():
    with Steps() as steps, pytest.raises(StepFailed, match="no-such-program"), steps.step("x"):
        steps.run(["no-such-program"])
    steps.log_path.unlink()


def test_a_line_of_progress_fits_the_terminal():
    step = Step("packages")
    step.text = "x" * 500
    for step.fraction in (None, 0.0, 0.5, 2.0):
        assert len(step.line(3, 80)) <= 80  # no colours here: stdout is no terminal


def test_arguments_of_pytest():
    assert scripts_test._pytest([], slow=False)[-2:] == ["-m", "not slow"]
    assert "-m" not in scripts_test._pytest([], slow=True)
    assert scripts_test._pytest(["-n", "4", "-k", "x"], slow=True) == ["-n", "4", "-k", "x"]
    assert scripts_test._pytest(["-m", "guest"], slow=False).count("-m") == 1


def test_ci_runs_what_the_readme_says():
    assert "./scripts/test" in (ROOT / "README.md").read_text()
    assert "exec ./scripts/test" in (ROOT / ".ci/run").read_text()
    assert os.access(ROOT / ".ci/run", os.X_OK)
