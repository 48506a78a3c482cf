"""Debian packages: which are missing, and how to get them with apt's own configuration of mirrors and proxies."""

from __future__ import annotations

import os
import platform
import re
import subprocess
from collections.abc import Iterable
from pathlib import Path

from first_steps.steps import Step, StepFailed, Steps, advice

RUN = (
    "ca-certificates", "conntrack", "cpio", "debian-archive-keyring", "dnsmasq-base", "e2fsprogs", "fdisk",
    "ipxe-qemu", "mmdebstrap", "mtools", "nftables", "openssh-client", "ovmf", "python3-venv", "qemu-system-x86",
    "qemu-utils", "seabios",
)  # fmt: skip
"""What Innkeeper needs on a host."""
TEST = ("binutils", "git", "iptables", "passt", "qemu-guest-agent")
"""What its tests need besides."""
SUITES = {"12": "debian-12", "13": "debian-13"}
"""Debian's version → the image that a first guest is made from."""

_ADVICE = (
    (r"Unable to locate package|has no installation candidate",
     "apt knows no such package: /etc/apt/sources.list* needs Debian's main component of this release"),
    (r"Could not get lock|is held by process", "another apt is at work: wait for it to end"),
    (r"No space left on device|not have enough free space", "make room on the disk"),
    (r"Temporary failure resolving|Could not resolve|Could not connect|Connection (timed out|refused)|Failed to fetch",
     "apt cannot reach its mirror: check the network, and the mirror and proxy in /etc/apt"),
    (r"dpkg was interrupted", "run: dpkg --configure -a"),
    (r"unmet dependencies|held broken packages", "run: apt-get --fix-broken install"),
    (r"Permission denied|are you root", "it must run as root: use sudo"),
)  # fmt: skip


def release() -> dict[str, str]:
    """os-release(5), empty where there is none."""
    try:
        return platform.freedesktop_os_release()
    except OSError:
        return {}


def check_host() -> str:
    """The version of this Debian, or `StepFailed` on a host that Innkeeper is not made for (yet)."""
    system = release()
    machine = platform.machine()
    if machine != "x86_64":
        raise StepFailed(f"this is a {machine} host", "Innkeeper runs on x86-64 hosts only, so far")
    if system.get("ID") != "debian" or system.get("VERSION_ID") not in SUITES:
        raise StepFailed(
            f"this host is {system.get('PRETTY_NAME', 'no Debian')}",
            "this script knows Debian 12 and 13. Elsewhere: install QEMU 7.2 or newer, OVMF, mmdebstrap and mtools, "
            "then pip install Innkeeper and run inn daemon start (docs/getting-started.md)",
        )
    return system["VERSION_ID"]


def missing(packages: Iterable[str]) -> list[str]:
    """Those that are not installed (dpkg-query(1))."""
    wanted = sorted(set(packages))
    answer = subprocess.run(
        ["dpkg-query", "-W", "-f=${Package} ${db:Status-Status}\n", *wanted],
        capture_output=True, text=True, env=os.environ | {"LC_ALL": "C"},
    )  # fmt: skip
    found = {line.removesuffix(" installed") for line in answer.stdout.splitlines() if line.endswith(" installed")}
    # A Debian 12 from before Debian 13 has its keyring, without the keys of Debian 13.
    if not any(Path("/usr/share/keyrings").glob("debian-archive-trixie-*")):
        found.discard("debian-archive-keyring")
    return [name for name in wanted if name not in found]


def progress(step: Step, line: str, begin: float, end: float) -> None:
    """A line of APT::Status-Fd (apt's README.progress-reporting) onto a step, between two fractions of it."""
    kind, _, rest = line.partition(":")
    match = re.match(r"(.*?):(\d+(?:\.\d+)?):(.*)", rest)
    if kind not in ("dlstatus", "pmstatus") or not match:
        return
    middle = (begin + end) / 2
    begin, end = (begin, middle) if kind == "dlstatus" else (middle, end)
    step.fraction = begin + (end - begin) * float(match[2]) / 100
    step.text = re.sub(r"\((?:amd64|all)\)|\(.*remaining\)", "", match[3]).strip()


def install(steps: Steps, packages: list[str]) -> None:
    """apt-get update and install, as root. Raises `StepFailed`."""
    apt = [
        "apt-get", "-q", "-y", "-o", "APT::Status-Fd={fd}", "-o", "DPkg::Lock::Timeout=300", "-o", "Dpkg::Use-Pty=0",
    ]  # fmt: skip
    env = {"DEBIAN_FRONTEND": "noninteractive"}

    def hint(output: str) -> str:
        return advice(output, _ADVICE)

    with steps.step("Debian package lists") as step:
        steps.run([*apt, "update"], lambda line: progress(step, line, 0, 2), env=env, status_fd=True, hint=hint)
    with steps.step("Debian packages") as step:
        step.text = "reading what there is"
        command = [*apt, "install", "--no-install-recommends", *packages]
        output = steps.run(command, lambda line: progress(step, line, 0, 1), env=env, status_fd=True, hint=hint)
        step.result = summary(output)


def summary(output: str) -> str:
    """`84 packages, 93.1 MB downloaded` from what apt-get install prints."""
    count = re.search(r"(\d+) newly installed", output)
    size = re.search(r"Need to get ([\d.,]+ [kMG]?B)(?:/[\d.,]+ [kMG]?B)? of archives", output)
    parts = [f"{count[1]} packages" if count else "", f"{size[1]} downloaded" if size else ""]
    return ", ".join(filter(None, parts))
