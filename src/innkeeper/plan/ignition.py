"""Ignition, the first-boot configuration of Fedora CoreOS, Flatcar and openSUSE MicroOS.

QEMU hands it to the guest as the fw_cfg file `opt/com.coreos/config` (Ignition's "Supported platforms"). The plan
passes it as a file in the VM's folder, `-fw_cfg name=opt/com.coreos/config,file=ignition.json`: it may hold secrets,
and an argument list is open to everyone on the host.
"""

from __future__ import annotations

import json
import re
from typing import Any, NoReturn

from innkeeper.base.errors import SeedInvalid
from innkeeper.base.units import MIB, format_size

FW_CFG_NAME = "opt/com.coreos/config"
"""Where Ignition looks for its configuration under QEMU."""

FILE_NAME = "ignition.json"
"""Its name in the VM's folder (mode 0600). Relative, so no path of the host can break QEMU's option syntax."""

SIZE_LIMIT = 4 * MIB
"""Bytes. The guest reads fw_cfg slowly; larger things belong behind a URL in the configuration."""

_SECTIONS = {"ignition": dict, "storage": dict, "systemd": dict, "passwd": dict, "kernelArguments": dict}


def validate(text: str | bytes, filename: str) -> list[str]:
    """Warnings about an Ignition configuration (specification 3.x).

    Raises `SeedInvalid` with `facts` file, line and column for what Ignition would refuse to begin with: no JSON, a key
    twice, no or another version, a section of the wrong type. Its full schema is Ignition's own affair.
    """

    def fail(line: int, column: int, problem: str, hint: str = "") -> NoReturn:
        raise SeedInvalid(
            f"{filename}, line {line}, column {column}: {problem}", hint=hint, file=filename, line=line, column=column
        )

    data = text.encode("utf-8", "surrogatepass") if isinstance(text, str) else text
    if len(data) > SIZE_LIMIT:
        fail(1, 1, f"{format_size(len(data))} is too large", f"at most {format_size(SIZE_LIMIT)}")
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        fail(data.count(b"\n", 0, error.start) + 1, 1, f"byte 0x{data[error.start]:02x} is not UTF-8")
    if re.match(r"\s*(variant|version)\s*:", text):
        fail(1, 1, "this is a Butane file", "translate it first: butane --strict config.bu > config.ign")
    if text.lstrip().startswith("#cloud-config"):
        fail(1, 1, "this is a cloud-config", "pass it with --user-data")

    repeated: list[str] = []

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        known = dict(pairs)
        if len(known) < len(pairs):
            names = [name for name, _ in pairs]
            repeated.append(next(name for name in names if names.count(name) > 1))
        return known

    try:
        config = json.loads(text, object_pairs_hook=unique)
    except json.JSONDecodeError as error:
        fail(error.lineno, error.colno, f"not valid JSON: {error.msg}")
    except RecursionError:
        fail(1, 1, "nested too deeply")
    except ValueError as error:  # a number of thousands of digits
        fail(1, 1, f"not valid JSON: {error}")
    if repeated:
        # The last place with this name as a key: at or after the one that repeats.
        last = [m.start() for m in re.finditer(re.escape(json.dumps(repeated[0])) + r"\s*:", text)] or [0]
        line = text.count("\n", 0, last[-1]) + 1
        fail(line, last[-1] - (text.rfind("\n", 0, last[-1]) + 1) + 1, f"{repeated[0]!r} is there twice")
    if not isinstance(config, dict):
        fail(1, 1, "an Ignition configuration is a JSON object")
    for name, kind in _SECTIONS.items():
        if name in config and not isinstance(config[name], kind):
            fail(_line_of(text, name), 1, f"{name!r} must be an object")
    version = config.get("ignition", {}).get("version")
    if not isinstance(version, str):
        fail(_line_of(text, "ignition"), 1, "ignition.version is missing", 'write {"ignition": {"version": "3.4.0"}}')
    if not re.fullmatch(r"3\.\d{1,3}\.\d{1,3}(-experimental)?", version):
        fail(
            _line_of(text, "version"),
            1,
            f"ignition.version {version[:40]!r} is not supported",
            "Innkeeper's guests read specification 3.x; 2.x was for Container Linux",
        )
    return [
        f"{filename}, line {_line_of(text, name)}: unknown section {name!r}" for name in config if name not in _SECTIONS
    ]


def _line_of(text: str, name: str) -> int:
    """The line of the first `"name"`, from 1."""
    return text.count("\n", 0, max(0, text.find(json.dumps(name)))) + 1
