"""Ignition files are checked before a guest fails to boot with them."""

from __future__ import annotations

import pytest

from innkeeper.base.errors import SeedInvalid
from innkeeper.plan.ignition import validate

GOOD = '{"ignition": {"version": "3.4.0"}, "passwd": {"users": [{"name": "core"}]}}'


def test_good_files_pass() -> None:
    assert validate(GOOD, "f") == []
    assert validate(GOOD.encode(), "f") == []


def test_an_unknown_section_is_a_warning() -> None:
    [warning] = validate('{"ignition": {"version": "3.0.0"},\n "strorage": {}}', "f")
    assert "line 2" in warning and "strorage" in warning


@pytest.mark.parametrize(
    ("text", "line", "word"),
    [
        ('{"ignition": {"version": "3.4.0"}\n"a": 1}', 2, "JSON"),
        ("", 1, "JSON"),
        ("[]", 1, "object"),
        ("{}", 1, "version"),
        ('{"ignition": 3}', 1, "object"),
        ('{\n"ignition": {\n"version": "2.3.0"}}', 3, "2.3.0"),
        ('{"ignition": {"version": 3}}', 1, "version"),
        ('{"ignition": {"version": "3.4.0"},\n"storage": []}', 2, "storage"),
        ('{"ignition": {"version": "3.4.0"},\n"a": 1,\n"a": 2}', 3, "twice"),
        ("variant: fcos\nversion: 1.5.0\n", 1, "Butane"),
        ("#cloud-config\n", 1, "cloud-config"),
        ("[" * 100_000, 1, "deep"),
        ("1" * 5000, 1, "JSON"),
        (b'{"a":\n"\xff"}', 2, "UTF-8"),
        ("x" * (4 << 20) + "y", 1, "large"),
    ],
)
def test_mistakes_are_told_with_their_line(text: str | bytes, line: int, word: str) -> None:
    with pytest.raises(SeedInvalid) as caught:
        validate(text, "config.ign")
    assert caught.value.facts["line"] == line
    assert "config.ign" in caught.value.detail and word in caught.value.detail
