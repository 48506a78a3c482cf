"""What a person is told of a request that is not valid."""

from __future__ import annotations

import pytest
from pydantic import TypeAdapter, ValidationError

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
