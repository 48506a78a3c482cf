"""One dnsmasq per network: DHCP, router advertisements, names. It runs on while the daemon is away.

Started as root for its ports, it goes on as a user of its own with three capabilities; nothing that it starts could
have more. It is found again by two marks in its environment.
"""

from __future__ import annotations

import asyncio
import io
import os
import pwd
import select
import shutil
import signal
import subprocess
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from time import monotonic

from innkeeper.base.errors import NetworkFailed, ToolMissing
from innkeeper.base.nofollow import open_file, write_file
from innkeeper.host.gather import find_tool
from innkeeper.plan import resolver
from innkeeper.plan.network import Network, Nic

MARK_NETWORK, MARK_HOME = "INNKEEPER_NETWORK", "INNKEEPER_HOME"
LOG = "dnsmasq.log"
CAPABILITIES = "-all,+net_admin,+net_raw,+net_bind_service,+setuid,+setgid,+chown,+dac_override"
MOST_LEASES = 16 << 20
"""Bytes."""
STARTED = b"started, version"
"""What it logs once it listens everywhere."""
BEGINNING, POLL = 10.0, 0.002
"""Seconds until it has to; between two looks."""
ENDING = 5.0


class Resolver:
    """The dnsmasq of one network, and the folder that it reads."""

    def __init__(self, network: Network, folder: Path, home: Path) -> None:
        self._network, self._folder, self._home = network, folder, home
        self._pidfd: int | None = None
        self._leases: tuple[tuple[int, int], dict[str, str]] = ((0, 0), {})

    async def ensure(self, nics: Iterable[Nic]) -> bool:
        """It runs and knows these. True where it had to be started. Raises `NetworkFailed`."""
        nics = list(nics)
        user = _user()
        (self._folder / resolver.LEASES).parent.mkdir(mode=0o755, parents=True, exist_ok=True)
        for folder in (self._folder.parent, self._folder, (self._folder / resolver.LEASES).parent):
            folder.chmod(0o755)
        os.chown((self._folder / resolver.LEASES).parent, user.pw_uid, user.pw_gid)
        files = {
            resolver.CONFIG: resolver.config(self._network, str(self._folder), user.pw_name),
            resolver.HOSTS: resolver.hosts(self._network, nics),
            resolver.DHCP_HOSTS: resolver.dhcp_hosts(self._network, nics),
        }
        tagged = resolver.has_tags(self._read(resolver.DHCP_HOSTS) or "")
        stale = not self._alive()  # a daemon may have died after it wrote, before it said so
        for name, text in files.items():
            stale |= self._write(name, text)
        if not self.runs():
            await self._start()
            return True
        outdated = self._outdated(nics)
        if outdated or (stale and tagged):
            await self._kill()
            self._forget(outdated, user)
            await self._start()
        elif stale:
            self._signal(signal.SIGHUP)
        return False

    def runs(self) -> bool:
        """Whether it does, now."""
        return self._alive() or self._found()

    async def end(self) -> None:
        """Kill it, and take its folder away."""
        await self._kill()
        if self._folder.exists():
            shutil.rmtree(self._folder)

    async def _kill(self) -> None:
        while self.runs():
            self._signal(signal.SIGKILL)
            assert self._pidfd is not None
            await asyncio.to_thread(select.select, [self._pidfd], [], [], ENDING)

    def leases(self) -> dict[str, str]:
        """MAC → address of what it has given out, read anew when the file has changed."""
        try:
            with open_file(self._folder / resolver.LEASES, MOST_LEASES) as file:
                found = os.fstat(file.fileno())
                stamp = (found.st_mtime_ns, found.st_size)
                if stamp != self._leases[0]:
                    self._leases = (stamp, resolver.leases(file.read().decode(errors="replace")))
        except FileNotFoundError:
            return {}
        return self._leases[1]

    def _outdated(self, nics: Iterable[Nic]) -> set[str]:
        """Addresses that it has given to a card that has them no more: it would not give them to the one that has them
        now for as long as that lease lasts."""
        now = {nic.address: nic.mac for nic in nics}
        return {address for mac, address in self.leases().items() if now.get(address, mac) != mac}

    def _forget(self, addresses: set[str], user: pwd.struct_passwd) -> None:
        """The leases of these; it keeps them in mind as long as it runs."""
        path = self._folder / resolver.LEASES
        with open_file(path, MOST_LEASES) as file:
            lines = file.read().decode(errors="replace").splitlines(keepends=True)
        kept = "".join(line for line in lines if addresses.isdisjoint(line.split()[2:3]))
        write_file(path, io.BytesIO(kept.encode()), user.pw_uid)

    def _read(self, name: str) -> str | None:
        """A file as it was last written; None where it was not yet."""
        with suppress(OSError):
            return (self._folder / name).read_text()
        return None

    def _write(self, name: str, text: str) -> bool:
        path = self._folder / name
        if self._read(name) == text:
            return False
        staged = path.with_name(f"{name}.new")
        staged.write_text(text)
        staged.chmod(0o644)
        staged.replace(path)
        return True

    async def _start(self) -> None:
        program, cage = find_tool("dnsmasq"), find_tool("setpriv")
        if program is None or cage is None:
            raise ToolMissing("dnsmasq is not installed", hint="apt install dnsmasq-base", package="dnsmasq-base")
        environment = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "LC_ALL": "C", MARK_NETWORK: self._network.id}
        with (self._folder / LOG).open("wb") as log:
            child = subprocess.Popen(  # noqa: ASYNC220 - vfork and exec: a millisecond
                [cage, "--no-new-privs", f"--bounding-set={CAPABILITIES}", "--",
                 program, "--keep-in-foreground", f"--conf-file={self._folder / resolver.CONFIG}"],
                cwd="/",
                env=environment | {MARK_HOME: str(self._home)},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )  # fmt: skip
        child.returncode = 0  # from here it is held by its pidfd
        self._pidfd = os.pidfd_open(child.pid)
        if not await self._serves():
            words = (self._folder / LOG).read_text(errors="replace").strip()[-1000:]
            raise NetworkFailed(f"the dnsmasq of network {self._network.name} does not serve: {words}")

    async def _serves(self) -> bool:
        """Wait until it does; whether it has come to that."""
        deadline = monotonic() + BEGINNING
        while self._alive() and monotonic() < deadline:
            if STARTED in (self._folder / LOG).read_bytes():
                return True
            await asyncio.sleep(POLL)
        return False

    def _alive(self) -> bool:
        if self._pidfd is None:
            return False
        if not select.select([self._pidfd], [], [], 0)[0]:
            return True
        with suppress(ChildProcessError):
            os.waitid(os.P_PIDFD, self._pidfd, os.WEXITED | os.WNOHANG)
        os.close(self._pidfd)
        self._pidfd = None
        return False

    def _found(self) -> bool:
        """Whether one runs that a daemon before this one started; that is ours now. It leads its session, unlike the
        children that it answers TCP with."""
        marks = {f"{MARK_NETWORK}={self._network.id}".encode(), os.fsencode(f"{MARK_HOME}={self._home}")}
        for entry in Path("/proc").iterdir():
            if not entry.name.isdigit():
                continue
            with suppress(OSError):
                if os.getsid(int(entry.name)) != int(entry.name):
                    continue
                pidfd = os.pidfd_open(int(entry.name))
                try:
                    if marks <= set((entry / "environ").read_bytes().split(b"\0")):
                        self._pidfd, pidfd = pidfd, -1
                        return self._alive()
                finally:
                    if pidfd >= 0:
                        os.close(pidfd)
        return False

    def _signal(self, number: int) -> None:
        if self._pidfd is not None:
            with suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._pidfd, number)


def _user() -> pwd.struct_passwd:
    """Debian's package makes a user for it."""
    for name in ("dnsmasq", "nobody"):
        with suppress(KeyError):
            return pwd.getpwnam(name)
    raise NetworkFailed("there is no user dnsmasq or nobody to run dnsmasq as")
