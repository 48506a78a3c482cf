"""Debian packages into a root: mmdebstrap with the host's own mirror, and its output as progress.

The mirror is whatever the host's apt uses for Debian's main archive, asked from apt itself, so one-line and deb822
sources are the same to us, and proxies and credentials of the host's apt configuration apply.
"""

from __future__ import annotations

import os
import re
import urllib.parse
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import get_args

from innkeeper.base.errors import ToolFailed, ToolMissing, Unsupported
from innkeeper.spec.recipe import Recipe, Suite
from innkeeper.storage.cage import Limits, run_tool

Report = Callable[[float | None, str], None]

SUITES: tuple[str, ...] = get_args(Suite)
KEYRINGS = Path("/usr/share/keyrings")
LIMITS = Limits(seconds=3600)
INDEX_FORMAT = "$(REPO_URI)|$(RELEASE)|$(COMPONENT)|$(ORIGIN)|$(CREATED_BY)"


def sources(index_targets: str, suite: str) -> list[str]:
    """One-line sources (sources.list(5)) for `suite` from what `apt-get indextargets` says of the host (lines in
    `INDEX_FORMAT`), with the host's suite exchanged.

    Debian's main archive is what apt knows to be of origin Debian; before the host's first `apt-get update` apt knows
    no origin, and then it is a mirror of a Debian suite whose path ends in `debian` or `debian-security`.
    Raises `Unsupported` when the host has no such source.
    """
    found: dict[str, str] = {}
    for line in index_targets.splitlines():
        uri, release, component, origin, created_by = (*line.split("|"), "", "", "", "")[:5]
        codename, _, pocket = release.partition("-")
        known = origin and not origin.startswith("$(")
        named = urllib.parse.urlsplit(uri).path.rstrip("/").rpartition("/")[2] in ("debian", "debian-security")
        if created_by != "Packages" or component != "main" or not (origin == "Debian" if known else named):
            continue
        if pocket in ("", "updates", "security") and re.fullmatch(r"[a-z]+", codename):
            found.setdefault(pocket, f"deb {uri} {suite}{'-' if pocket else ''}{pocket} main")
    if "" not in found:
        raise Unsupported(
            "the host's apt has no source for Debian's main archive, so there is nothing to build from",
            hint="add one under /etc/apt/sources.list.d and run apt-get update",
        )
    return [found[pocket] for pocket in ("", "updates", "security") if pocket in found]


def keyring(suite: str, folder: Path = KEYRINGS) -> Path:
    """The host's keyring that can verify `suite`, or `Unsupported`."""
    ring = next((r for r in sorted(folder.glob("debian-archive-keyring.[gp][pg][gp]"))), None)
    if ring is None:
        raise ToolMissing(
            f"the keys of Debian's archive are not in {folder}",
            hint="apt install debian-archive-keyring",
            package="debian-archive-keyring",
        )
    if not any(folder.glob(f"debian-archive-{suite}-*")):
        raise Unsupported(
            f"the host's debian-archive-keyring does not know Debian {suite}",
            hint="apt install --only-upgrade debian-archive-keyring",
        )
    return ring


class Progress:
    """mmdebstrap's and apt's output → fraction, text and package versions.

    Two apt runs (essential packages, then the rest) each say how many packages they will install, then print a line
    as each is downloaded, unpacked and set up. A run has the share of the whole that `shares` gives it.
    """

    def __init__(self, report: Report, shares: Sequence[float], steps: int) -> None:
        self.packages: dict[str, str] = {}
        self._report, self._shares, self._steps = report, shares, steps
        self._run, self._total, self._done = -1, 0, 0

    def line(self, line: str) -> None:
        if match := re.search(r"(\d+) newly installed", line):
            self._run = min(self._run + 1, len(self._shares) - 1)
            self._total, self._done = int(match[1]) * self._steps, 0
        elif self._run < 0 and line.startswith("Get:"):
            self._report(None, "reading the package lists")
        elif match := re.match(r"Get:\d+ \S+ \S+ \S+ (\S+) .*\[.+\]", line):
            self._step(f"downloading {match[1]}")
        elif match := re.match(r"Unpacking (\S+?)(?::\w+)? \(", line):
            self._step(f"unpacking {match[1]}")
        elif match := re.match(r"Setting up (\S+?)(?::\w+)? \((.+)\)", line):
            self._step(f"setting up {match[1]}")
        elif line.startswith("I: extracting"):
            self._report(self.fraction, "extracting packages")
        elif line.startswith("I: running --customize-hook"):
            self._report(sum(self._shares), "configuring the system")
        for name, version in re.findall(r"/archives/([a-z0-9][a-z0-9+.-]*)_([^_/\s]+)_\w+\.deb", line):
            self.packages.setdefault(name, urllib.parse.unquote(version))

    @property
    def fraction(self) -> float:
        before = sum(self._shares[: max(self._run, 0)])
        if self._run < 0 or not self._total:
            return before
        return before + self._shares[self._run] * min(1.0, self._done / self._total)

    def _step(self, text: str) -> None:
        self._done += 1
        self._report(self.fraction, text)


async def unpack(recipe: Recipe, target: Path, *, workspace: Path, job: str, report: Report) -> dict[str, str]:
    """Extract the recipe's packages, and what they depend on, into the folder `target`: nothing is run, no root is
    needed. Returns their versions."""
    progress = Progress(report, [1.0], steps=1)
    await _mmdebstrap(
        recipe,
        # Newer ones do not let root run maintainer scripts outside of a chroot; here none is run.
        ["--variant=extract", "--mode=chrootless", "--format=directory", "--skip=check/chrootless"],
        str(target),
        space=[],
        workspace=workspace,
        job=job,
        on_line=progress.line,
    )
    return dict(sorted(progress.packages.items()))


async def install(
    recipe: Recipe,
    *,
    essential_hooks: Sequence[str],
    customize_hooks: Sequence[str],
    workspace: Path,
    job: str,
    report: Report,
    pass_fds: Sequence[int] = (),
    on_line: Callable[[str], None] = lambda line: None,
) -> dict[str, str]:
    """Install the recipe's packages into a root that exists only until the hooks (mmdebstrap(1), HOOKS) have run.

    As root, or as the root of a user namespace. A line `package NAME VERSION` from a hook is what is really
    installed. Returns the packages' versions.
    """
    progress = Progress(report, [0.3, 0.65], steps=3)
    versions: dict[str, str] = {}

    def line(text: str) -> None:
        if match := re.fullmatch(r"package (\S+) (\S+)", text):
            versions[match[1]] = match[2]
        progress.line(text)
        on_line(text)

    space = await own_space(job)
    if os.geteuid() != 0 and not space:
        # Not fakechroot: it writes absolute links with the host's path in them, which would end up in the image.
        raise Unsupported(
            "installing packages as a plain user needs a user namespace with subordinate ids",
            hint="apt install uidmap and give the user ranges in /etc/subuid and /etc/subgid, or build as root",
        )
    await _mmdebstrap(
        recipe,
        [
            "--variant=minbase",
            "--format=null",
            "--mode=root",
            "--skip=cleanup",
            *(f"--essential-hook={hook}" for hook in essential_hooks),
            *(f"--customize-hook={hook}" for hook in customize_hooks),
        ],
        "-",
        space=space,
        workspace=workspace,
        job=job,
        on_line=line,
        pass_fds=pass_fds,
    )
    return dict(sorted(versions.items()))


async def own_space(job: str) -> list[str]:
    """A prefix that gives a program its own mounts and processes, which vanish with it however it ends (as root,
    mmdebstrap mounts /proc, /sys and /dev in the root it makes), and as a plain user its own user namespace with
    subordinate ids. Empty where that is not allowed."""
    # In a plain chroot / is no mount point, so nothing can be made private; then who mounts has to unmount.
    for propagation in ("private", "unchanged"):
        prefix = ["unshare", "--mount", f"--propagation={propagation}"]
        prefix += ["--pid", "--fork", "--kill-child", "--mount-proc"]
        if os.geteuid() != 0:
            prefix[1:1] = ["--user", "--map-root-user", "--map-auto"]
        with suppress(ToolFailed):
            await run_tool([*prefix, "true"], limits=Limits(seconds=30), job=job, no_new_privs=False)
            return prefix
    return []


async def _mmdebstrap(
    recipe: Recipe,
    options: Sequence[str],
    target: str,
    *,
    space: Sequence[str],
    workspace: Path,
    job: str,
    on_line: Callable[[str], None],
    pass_fds: Sequence[int] = (),
) -> None:
    ring = keyring(recipe.suite)
    targets = await run_tool(["apt-get", "indextargets", "--format", INDEX_FORMAT], limits=Limits(seconds=60), job=job)
    temporary = workspace / "tmp"
    temporary.mkdir(mode=0o755)
    await run_tool(
        [
            *space,
            "mmdebstrap",
            "--verbose",
            *options,
            f"--keyring={ring}",
            f"--architectures={recipe.architecture}",
            '--aptopt=APT::Install-Recommends "false"',
            f"--include={','.join([recipe.kernel, *recipe.packages])}",
            recipe.suite,
            target,
            *sources(targets, recipe.suite),
        ],
        limits=LIMITS,
        cwd=workspace,
        env={"HOME": str(workspace), "TMPDIR": str(temporary), "DEBIAN_FRONTEND": "noninteractive"},
        on_line=on_line,
        job=job,
        pass_fds=pass_fds,
        no_new_privs=False,
    )
