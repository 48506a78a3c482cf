"""Sizes and names as field types: written by people, kept as numbers."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field

from innkeeper.base.errors import InvalidInput
from innkeeper.base.ids import IMAGE_NAME_PATTERN, IMAGE_REFERENCE_PATTERN, NAME_PATTERN, VERSION_PATTERN, WORDS
from innkeeper.base.units import MIB, TIB, format_rate, parse_rate, parse_size


def said(problem: Any) -> str:
    """What pydantic found wrong with a value, as people are told."""
    wanted = WORDS.get(problem.get("ctx", {}).get("pattern"))
    return f"{problem['input']!r} is not {wanted}" if wanted else str(problem["msg"]).removeprefix("Value error, ")


def _size(value: object) -> int:
    if not isinstance(value, (str, int)) or isinstance(value, bool):
        raise ValueError("a size is a number of bytes or text like 512M, 2G")
    try:
        return parse_size(value)
    except InvalidInput as error:
        raise ValueError(f"{error.detail}; {error.hint}" if error.hint else error.detail) from None


def _rate(value: object) -> int:
    if not isinstance(value, (str, int)) or isinstance(value, bool):
        raise ValueError("a rate is a number of bits per second or text like 100mbit")
    try:
        rate = parse_rate(value)
    except InvalidInput as error:
        raise ValueError(f"{error.detail}; {error.hint}") from None
    if not SLOWEST <= rate <= FASTEST:
        raise ValueError(f"a rate is from {format_rate(SLOWEST)} to {format_rate(FASTEST)}, not {value!r}")
    return rate


def _new_rate(value: object) -> int:
    return 0 if value in ("none", 0) and value is not False else _rate(value)


def _whole_mebibytes(value: int) -> int:
    if value % MIB:
        raise ValueError(f"{value} bytes is not a whole number of MiB")
    return value


Name = Annotated[str, Field(pattern=NAME_PATTERN, max_length=63, examples=["web-1"])]
ImageName = Annotated[str, Field(pattern=IMAGE_NAME_PATTERN, max_length=63, examples=["debian-12"])]
ImageReference = Annotated[str, Field(pattern=IMAGE_REFERENCE_PATTERN, max_length=95, examples=["web:2"])]
"""An image, the newest version of a template, or one version of it."""
Version = Annotated[str, Field(pattern=VERSION_PATTERN, max_length=31, examples=["2", "2026-11"])]

MemorySize = Annotated[
    int,
    BeforeValidator(_size, json_schema_input_type=int | str),
    Field(ge=16 * MIB, le=16 * TIB),
    AfterValidator(_whole_mebibytes),
]
DiskSize = Annotated[int, BeforeValidator(_size, json_schema_input_type=int | str), Field(ge=MIB, le=64 * TIB)]

SLOWEST, FASTEST = 64_000, 32_000_000_000
"""Bits per second. Less is of no use to TCP, more is not in what tc(8) keeps of a token bucket's rate."""
Rate = Annotated[int, BeforeValidator(_rate, json_schema_input_type=int | str)]
NewRate = Annotated[int, BeforeValidator(_new_rate, json_schema_input_type=int | str)]
"""The same; `none` is 0."""


class Model(BaseModel):
    """Base of all specs: immutable, and a misspelt field is an error instead of silence."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)
