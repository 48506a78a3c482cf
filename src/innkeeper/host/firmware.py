"""Guest firmware on this host, from QEMU's firmware descriptors.

Source: QEMU's docs/interop/firmware.json. Descriptors of the same file name override each other (the user's, then
/etc, then /usr/share), an empty one masks, and the sort order of the names is the distributor's preference.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from innkeeper.host.facts import Firmware, Uefi

SEABIOS = (
    "/usr/share/seabios/bios-256k.bin",
    "/usr/share/qemu/bios-256k.bin",
    "/usr/share/qemu-kvm/bios-256k.bin",
)


def folders() -> list[Path]:
    """Where descriptors lie, the least important first."""
    user = Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config")
    return [Path("/usr/share/qemu/firmware"), Path("/etc/qemu/firmware"), user / "qemu/firmware"]


def firmware(where: Iterable[Path] | None = None, machine: str = "pc-q35-7.2") -> Firmware:
    """What an x86-64 guest of this machine type can boot with; without Secure Boot, with its own variable store."""
    bios = next((path for path in SEABIOS if Path(path).exists()), None)
    uefi = None
    for descriptor in _descriptors(folders() if where is None else where):
        pair = _plain_uefi(descriptor, machine)
        # images of 4 MiB have room for variables that 2 MiB lack; Debian 13 ships no others
        if pair and (uefi is None or (_size(uefi) < 3 << 20 <= _size(pair))):
            uefi = pair
    return Firmware(bios=bios, uefi=uefi)


def _descriptors(where: Iterable[Path]) -> Iterator[Any]:
    by_name: dict[str, Path] = {}
    for folder in where:
        by_name.update({path.name: path for path in folder.glob("*.json")})
    for _, path in sorted(by_name.items()):
        try:
            yield json.loads(path.read_bytes() or b"{}")
        except (OSError, ValueError):
            continue  # not ours to repair; the next one may do


def _size(pair: Uefi) -> int:
    return Path(pair.code).stat().st_size


def _plain_uefi(descriptor: Any, machine: str) -> Uefi | None:
    try:
        mapping = descriptor["mapping"]
        code, template = mapping["executable"], mapping["nvram-template"]
        fits = any(
            target["architecture"] == "x86_64" and any(fnmatchcase(machine, pattern) for pattern in target["machines"])
            for target in descriptor["targets"]
        )
        usable = (
            fits
            and "uefi" in descriptor["interface-types"]
            and mapping["device"] == "flash"
            and mapping.get("mode", "split") == "split"
            and not {"secure-boot", "requires-smm"} & set(descriptor["features"])
            and code["format"] == template["format"]
        )
        pair = Uefi(code=code["filename"], vars=template["filename"], format=code["format"])
    except (KeyError, TypeError, ValueError):
        return None
    return pair if usable and Path(pair.code).exists() and Path(pair.vars).exists() else None
