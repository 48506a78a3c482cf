"""Rules of the project that hold by construction: documentation, layout, sizes, imports."""

from __future__ import annotations

import ast
import importlib
import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest

from innkeeper.base import errors
from innkeeper.operations.verbs import VERBS

ROOT = Path(__file__).parents[2]
SOURCE = ROOT / "src/innkeeper"
FILES = sorted(SOURCE.rglob("*.py"))
PACKAGES = sorted(path.parent for path in SOURCE.rglob("__init__.py"))
LONGEST = 600

STARTS_PROGRAMS = {
    "qemu": "QEMU itself, and busctl for its cgroup",
    "base/child.py": "what the others on this list start",
    "storage/cage.py": "the cage that all tools of storage run in",
    "host/gather.py": "lscpu",
    "client/daemon.py": "innkeeperd",
    "network/firewall.py": "nft, conntrack",
    "network/resolver.py": "dnsmasq",
    "network/passt.py": "passt",
    "cli": "ssh, ssh-keygen",
}
"""Where a program may be started, and which."""


def name(path: Path) -> str:
    return path.relative_to(SOURCE).as_posix()


def error_codes() -> list[str]:
    """The codes of all errors that a user can meet."""
    found = [value for _, value in inspect.getmembers(errors, inspect.isclass)]
    return [e("").code for e in found if issubclass(e, errors.InnkeeperError) and e is not errors.InnkeeperError]


@pytest.mark.parametrize("code", error_codes())
def test_an_error_is_explained(code):
    text = (ROOT / "docs/troubleshooting.md").read_text()
    section = re.search(rf"^### {code}\n(.+?)(?=^##|\Z)", text, re.MULTILINE | re.DOTALL)
    assert section, f"docs/troubleshooting.md has no section {code}"
    assert len(section[1].split()) > 10


def test_no_error_is_explained_that_there_is_not():
    text = (ROOT / "docs/troubleshooting.md").read_text()
    assert set(re.findall(r"^### ([a-z-]+)$", text, re.MULTILINE)) <= {*error_codes(), "shutdown-timeout"}


@pytest.mark.parametrize("package", PACKAGES, ids=name)
def test_a_package_says_what_it_owns(package):
    docstring = ast.get_docstring(ast.parse((package / "__init__.py").read_text()))
    assert docstring and len(docstring) > 40


@pytest.mark.parametrize("path", FILES, ids=name)
def test_a_file_is_short_and_says_what_it_is(path):
    text = path.read_text()
    assert len(text.splitlines()) <= LONGEST
    assert ast.get_docstring(ast.parse(text)), "no docstring"


@pytest.mark.parametrize("path", FILES, ids=name)
def test_programs_are_started_only_where_they_may_be(path):
    allowed = any(name(path) == place or name(path).startswith(f"{place}/") for place in STARTS_PROGRAMS)
    calls = (
        r"\bsubprocess\.|create_subprocess_\w+\(|\bstart_child\(|\bos\.(exec|spawn|posix_spawn|system|popen|fork)\w*\("
    )
    assert allowed or not re.search(calls, path.read_text())


def test_the_import_rule_holds():
    lint = Path(sys.executable).with_name("lint-imports")
    ended = subprocess.run([lint], cwd=ROOT, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stdout + ended.stderr


def test_every_room_is_in_the_architecture():
    text = (ROOT / "ARCHITECTURE.md").read_text()
    for package in PACKAGES:
        if package.parent == SOURCE:
            assert f"| `{package.name}/`" in text, package.name
    for kind in VERBS:
        assert f"`{kind}`" in text, kind


@pytest.mark.parametrize("page", [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")], ids=lambda path: path.name)
def test_links_and_commands_of_a_page_are_real(page):
    text = page.read_text()
    for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", text):
        assert (page.parent / target).exists(), target
    commands = importlib.import_module("innkeeper.cli.commands").COMMANDS
    words = {command.name.split()[0] for command in commands}
    for word in re.findall(r"^    (?:\$ )?(?:sudo )?inn ([a-z-]+)", text, re.MULTILINE):
        assert word in words, f"inn {word}"


@pytest.mark.parametrize("path", sorted(ROOT.glob("requirements/*.txt")), ids=lambda path: path.stem)
def test_a_lock_is_pinned_and_names_no_index(path):
    text = path.read_text()
    assert "://" not in text and "--index" not in text and "--find-links" not in text
    entries = re.split(r"\n(?=[A-Za-z0-9])", text.strip())
    for entry in entries:
        assert re.match(r"[A-Za-z0-9._-]+==\S+", entry) and "--hash=sha256:" in entry, entry[:60]


def test_locks_agree_and_have_all_that_is_needed():
    import tomllib

    def pins(lock: str) -> dict[str, str]:
        text = (ROOT / f"requirements/{lock}.txt").read_text()
        found = re.findall(r"^([A-Za-z0-9._-]+)==(\S+)", text, re.MULTILINE)
        return {package.lower().replace("_", "-").replace(".", "-"): version for package, version in found}

    def names(requirements: list[str]) -> set[str]:
        return {
            re.split(r"[^A-Za-z0-9._-]", each)[0].lower().replace("_", "-").replace(".", "-") for each in requirements
        }

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    run, test = pins("run"), pins("test")
    build = names(project["build-system"]["requires"])
    needed = names(project["project"]["dependencies"]) | build
    assert needed <= set(run)
    assert needed | names(project["project"]["optional-dependencies"]["test"]) <= set(test)
    assert run.items() <= test.items()
