"""Identifiers and names."""

from __future__ import annotations

import re
import secrets

NAME_PATTERN = r"^[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?$"
"""A DNS label (RFC 1123): a VM's name is its hostname too."""

IMAGE_NAME_PATTERN = r"^[a-z0-9]([a-z0-9._-]{0,61}[a-z0-9])?$"
"""As a name, with dots and underscores: `debian-12.8`."""


VERSION_PATTERN = r"^[a-z0-9]([a-z0-9._-]{0,29}[a-z0-9])?$"
IMAGE_REFERENCE_PATTERN = rf"{IMAGE_NAME_PATTERN[:-1]}(:{VERSION_PATTERN[1:-1]})?$"
"""An image's name, or one version of a template: `web:2`."""


_ENDS = "beginning and ending with a letter or digit"
WORDS = {
    NAME_PATTERN: f"1-63 of a-z, 0-9 and '-', {_ENDS}",
    IMAGE_NAME_PATTERN: f"1-63 of a-z, 0-9, '.', '_' and '-', {_ENDS}",
    VERSION_PATTERN: f"1-31 of a-z, 0-9, '.', '_' and '-', {_ENDS}",
    IMAGE_REFERENCE_PATTERN: f"a name of a-z, 0-9, '.', '_' and '-', {_ENDS}, or NAME:VERSION",
}
"""What each of them takes, as people are told."""


def new_id() -> str:
    """48 random bits as 12 lower-case hex digits: short enough to type, and a file name anywhere."""
    return secrets.token_hex(6)


def natural_order(name: str) -> list[str | int]:
    """For sorting, as people count: web-2 comes before web-10."""
    return [int(part) if at % 2 else part for at, part in enumerate(re.split(r"([0-9]+)", name))]
