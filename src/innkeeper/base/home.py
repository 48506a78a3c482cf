"""Where everything lies: the data folder, the run folder and what is in them.

A path here is always absolute and never empty (DESIGN.md 5.6): `absolute` is the one way in.

    data/                     0711  (root) or 0700
      store.db                0600  documents (store/)
      images/<id>/            0711  disk.qcow2 | kernel, initrd, recipe.yaml
      vms/<id>/               0700  owned by the VM's own user: QEMU's working directory
        disk0-<layer>.qcow2 nvram-<snapshot>.fd memory-<snapshot> seed.iso nvram.fd ram serial.log qemu.log
        qmp.sock agent.sock serial.sock rebirth.sock  (bound by relative name: a long path is no obstacle)
      work/<operation id>/    0700  half-made things; swept with their operation
      networks/<id>/          0755  what its dnsmasq reads, and its leases; forwarding.json beside
    run/
      api.sock                0660
      daemon.lock
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import NamedTuple

from innkeeper.base.errors import InvalidInput


def absolute(path: str | os.PathLike[str]) -> Path:
    """`path` as an absolute `Path`, or `InvalidInput` for one that is empty or relative."""
    text = os.fspath(path)
    if not text or "\0" in text or not Path(text).is_absolute():
        raise InvalidInput(f"path {text!r} is not absolute")
    if any(0xD800 <= ord(c) <= 0xDFFF or 0xFDD0 <= ord(c) <= 0xFDEF or ord(c) & 0xFFFE == 0xFFFE for c in text):
        raise InvalidInput(f"path {text!r} is not UTF-8 that QEMU's JSON can carry (util/unicode.c: no noncharacters)")
    return Path(os.path.normpath(text))


class Home(NamedTuple):  # not a dataclass: that import takes 8 ms, and `inn ls` comes through here
    """The layout above, for one data folder, one run folder and one pool (where images and VMs lie)."""

    data: Path
    run: Path
    pool: Path

    @staticmethod
    def find(environ: dict[str, str] | os._Environ[str] | None = None) -> Home:
        """From `INNKEEPER_HOME` (everything in one folder) and `INNKEEPER_POOL`, else the system's or the user's
        folders."""
        env = os.environ if environ is None else environ
        if home := env.get("INNKEEPER_HOME"):
            data, run = absolute(home), absolute(home) / "run"
        elif os.geteuid() == 0:
            data, run = Path("/var/lib/innkeeper"), Path("/run/innkeeper")
        else:
            user = Path.home()
            data = Path(env.get("XDG_DATA_HOME") or user / ".local/share") / "innkeeper"
            run = Path(env["XDG_RUNTIME_DIR"]) / "innkeeper" if env.get("XDG_RUNTIME_DIR") else data / "run"
        return Home(absolute(data), absolute(run), absolute(env.get("INNKEEPER_POOL") or data))

    @property
    def store(self) -> Path:
        return self.data / "store.db"

    @property
    def socket(self) -> Path:
        return self.run / "api.sock"

    @property
    def lock(self) -> Path:
        return self.run / "daemon.lock"

    @property
    def daemon_log(self) -> Path:
        return self.data / "innkeeperd.log"

    @property
    def images(self) -> Path:
        return self.pool / "images"

    @property
    def vms(self) -> Path:
        return self.pool / "vms"

    @property
    def networks(self) -> Path:
        return self.data / "networks"

    @property
    def work(self) -> Path:
        return self.pool / "work"

    def image(self, image_id: str) -> Path:
        """The folder of one image."""
        return self.images / _part(image_id)

    def vm(self, vm_id: str) -> Path:
        """The folder of one VM: QEMU's working directory."""
        return self.vms / _part(vm_id)

    def workspace(self, operation_id: str) -> Path:
        """Where an operation keeps what is not whole yet; on the pool's file system, so a rename publishes it."""
        return self.work / _part(operation_id)


def _part(name: str) -> str:
    """One path component that cannot climb out of its folder."""
    if not name or "/" in name or name in (".", ".."):
        raise InvalidInput(f"{name!r} cannot be a folder's name")
    return name
