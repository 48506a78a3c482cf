"""Writes a NoCloud seed as the ISO 9660 image that the guest finds by its label, `cidata`.

Plain, Joliet and Rock Ridge names side by side: Linux reads the second or third, FreeBSD's and Windows' ports of
cloud-init the second. The same seed gives the same bytes.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
import time
from io import BytesIO
from pathlib import Path

import pycdlib
import pycdlib.dates
import pycdlib.headervd
import pycdlib.utils

from innkeeper.plan.seed import SeedFiles

LABEL = "cidata"
_EPOCH = 315532800.0  # 1980-01-01, the first day that every file system can hold


class _FixedTime:
    """Stands in for the `time` module within pycdlib, which has no setting for the dates in the volume descriptors."""

    gmtime = localtime = staticmethod(time.gmtime)
    strftime = staticmethod(time.strftime)
    time = staticmethod(lambda: _EPOCH)


for _module in (pycdlib.pycdlib, pycdlib.headervd, pycdlib.dates, pycdlib.utils):
    setattr(_module, "time", _FixedTime)  # noqa: B010  (the type checker knows no such attribute)


def write_seed(files: SeedFiles, target: Path) -> None:
    """Makes or replaces `target`, mode 0600, at once and whole. Blocks: call it in a thread. Raises OSError."""
    contents = {
        "meta-data": files.meta_data,
        "network-config": files.network_config,
        "user-data": files.user_data,
        "vendor-data": files.vendor_data,
    }
    handle, name = tempfile.mkstemp(prefix=f".{target.name}.", dir=target.parent)  # 0600
    try:
        with os.fdopen(handle, "wb") as file:
            iso = pycdlib.PyCdlib()
            iso.new(interchange_level=3, joliet=3, rock_ridge="1.09", vol_ident=LABEL, sys_ident="LINUX")
            with contextlib.closing(iso):
                for path, text in contents.items():
                    data = text.encode()
                    iso.add_fp(
                        BytesIO(data),
                        len(data),
                        f"/{path.upper().replace('-', '_')}.;1",
                        rr_name=path,
                        joliet_path=f"/{path}",
                        file_mode=0o100400,
                    )
                iso.write_fp(file)
            file.flush()
            os.fsync(file.fileno())
        Path(name).replace(target)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
    folder = os.open(target.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
