"""Names: what a person is told of one that is none, and how they are ordered."""

from __future__ import annotations

import pytest
from pydantic import TypeAdapter, ValidationError

from innkeeper.base.ids import natural_order
from innkeeper.server.problems import invalid
from innkeeper.spec.quantity import ImageName, ImageReference, Name, Version


@pytest.mark.parametrize(
    ("kind", "words"),
    [(Name, "'-', beginning"), (ImageName, "'_' and '-'"), (ImageReference, "NAME:VERSION"), (Version, "1-31")],
)
def test_a_name_that_is_none_is_answered_with_what_a_name_is(kind, words):
    with pytest.raises(ValidationError) as found:
        TypeAdapter(kind).validate_python("My Machine")
    said = invalid(list(found.value.errors())).detail
    assert said.startswith("'My Machine' is not ") and words in said and "^" not in said


def test_names_are_ordered_as_people_count():
    ordered = ["2", "web", "web-2", "web-2a", "web-10", "web-10-1"]
    assert sorted(reversed(ordered), key=natural_order) == ordered
