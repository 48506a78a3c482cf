"""Identifiers and names."""

from __future__ import annotations

import re
import secrets

from innkeeper.base.errors import InvalidInput

NAME_PATTERN = r"^[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?$"
"""A DNS label (RFC 1123): a VM's name is its hostname too."""

IMAGE_NAME_PATTERN = r"^[a-z0-9]([a-z0-9._-]{0,61}[a-z0-9])?$"
"""As a name, with dots and underscores: `debian-12.8`."""


VERSION_PATTERN = r"^[a-z0-9]([a-z0-9._-]{0,29}[a-z0-9])?$"
IMAGE_REFERENCE_PATTERN = rf"{IMAGE_NAME_PATTERN[:-1]}(:{VERSION_PATTERN[1:-1]})?$"
"""An image's name, or one version of a template: `web:2`."""


def new_id() -> str:
    """48 random bits as 12 lower-case hex digits: short enough to type, and a file name anywhere."""
    return secrets.token_hex(6)


def check_name(name: str, what: str = "name", pattern: str = NAME_PATTERN) -> str:
    """`name` itself, or `InvalidInput` that says what a name looks like."""
    if not re.fullmatch(pattern, name):
        raise InvalidInput(
            f"{what} {name!r} is not valid",
            hint="1-63 of a-z, 0-9 and '-', beginning and ending with a letter or digit",
            field=what,
        )
    return name
