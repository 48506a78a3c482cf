"""scripts/up: from a fresh Debian to a running guest."""

from __future__ import annotations

import argparse
import grp
import json
import os
import re
import select
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from first_steps import debian, python_env
from first_steps.python_env import ROOT, VENV
from first_steps.steps import StepFailed, Steps, bold, dim, live, paint

GROUP = "innkeeper"
LINKS = Path("/usr/local/bin")
UNIT = Path("/etc/systemd/system/innkeeperd.service")
GUEST = "first"
PATIENCE = 8
"""Seconds between saying what will be installed and doing it, where a person watches."""
ROOM = {"tiny": 2, "debian-12": 6, "debian-13": 6}
"""GiB that packages, image and guest take at most while they are made."""


def main() -> int:
    """Exit status 0, or 1 when a step failed."""
    options = _options()
    try:
        version = debian.check_host()
    except StepFailed as failure:
        print(f"{paint('✗', '31')} {failure.why}\n  {paint('→', '33')} {failure.hint}")
        return 1
    image = options.image or debian.SUITES[version]
    packages = debian.missing(debian.RUN)
    _say_plan(options, image, packages)
    if options.dry_run:
        return 0
    if os.geteuid() != 0:
        return _as_root()
    with Steps() as steps:
        try:
            if packages and live() and not options.yes:
                _wait_for_a_word()
            _bring_up(steps, options, image, packages)
        except StepFailed as failure:
            steps.report(failure, "scripts/up")
            return 1
        except KeyboardInterrupt:
            print("\n  stopped; run scripts/up again to go on from here")
            return 130
    return 0


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="scripts/up",
        description="Install what Innkeeper needs on this Debian 12 or 13, start innkeeperd, build a golden image and "
        "launch a first guest. Safe to run again: what is there already is left as it is.",
    )
    parser.add_argument("--image", choices=sorted(ROOM), help="image of the first guest (default: this Debian's)")
    parser.add_argument("--memory", default="2G", metavar="SIZE", help="RAM of the first guest (default 2G)")
    parser.add_argument("--no-guest", action="store_true", help="end once innkeeperd runs: no image, no guest")
    parser.add_argument("--yes", "-y", action="store_true", help="do not wait before installing packages")
    parser.add_argument("--dry-run", "-n", action="store_true", help="only say what would be done")
    return parser.parse_args()


# --- before ---


def _say_plan(options: argparse.Namespace, image: str, packages: list[str]) -> None:
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30
    free = shutil.disk_usage("/var/lib").free / 2**30
    name = debian.release().get("PRETTY_NAME", "")
    print(f"{bold('Innkeeper')} on {name}: {os.cpu_count()} CPUs, {memory:.1f} GiB RAM, {free:.0f} GiB of disk free\n")
    person = _person()
    rows: list[tuple[str, str]] = []
    if packages:
        rows.append(("Debian packages", " ".join(packages) + ", and what they depend on"))
    if not python_env.installed("run"):
        rows.append(("Python packages", f"{len(python_env.locked('run'))}, with the hashes in requirements/run.txt, "
                                        f"into {VENV}"))  # fmt: skip
    if _links_to_make():
        rows.append(("Commands", " ".join(str(LINKS / name) for name in ("inn", "innkeeperd"))))
    if not _group_made(person):
        rows.append(("Group", f"{GROUP}, whose members may use Innkeeper" + (f": {person}" if person else "")))
    if _systemd() and not UNIT.exists():
        rows.append(("Service", str(UNIT)))
    if not options.no_guest and not _ask("info", GUEST):
        if not _ask("image", "info", image):
            rows.append(("Image", f"{image}, built from Debian's packages"))
        rows.append(("Guest", f"{GUEST}: 2 vCPU, {options.memory} RAM, 20G thin disk, SSH forwarded"))
    print("It will put here:" if rows else "Everything is here.")
    for label, text in rows:
        lines = _wrap(text, 76)
        print(f"  {paint(f'{label:<16}', '36')} {lines[0]}")
        for line in lines[1:]:
            print(f"  {'':<16} {line}")
    print(flush=True)


def _wrap(text: str, width: int) -> list[str]:
    import textwrap

    return textwrap.wrap(text, width, break_on_hyphens=False, break_long_words=False)


def _wait_for_a_word() -> None:
    print(dim(f"Enter begins at once, ctrl-C leaves; it begins by itself in {PATIENCE} s"), end="", flush=True)
    if select.select([sys.stdin], [], [], PATIENCE)[0]:
        sys.stdin.readline()
        print("\x1b[1A", end="")
    print("\r\x1b[K", end="", flush=True)


def _as_root() -> int:
    """Run all this again as root, with the settings of proxies and pip that this user has."""
    if not shutil.which("sudo"):
        print(f"{paint('✗', '31')} this needs root, and there is no sudo: run it as root (su -)")
        return 1
    print("This needs root; going on through sudo.", flush=True)
    kept = [name for name in os.environ if re.match(r"(PIP_|INNKEEPER_|(https?|no|all)_proxy$)", name, re.IGNORECASE)]
    keep = [f"--preserve-env={','.join(kept)}"] if kept else []
    os.execvp("sudo", ["sudo", *keep, "--", sys.executable, str(ROOT / "scripts/up"), *sys.argv[1:]])


# --- the steps ---


def _bring_up(steps: Steps, options: argparse.Namespace, image: str, packages: list[str]) -> None:
    _check_room(options, image)
    if packages:
        debian.install(steps, packages)
    else:
        steps.skipped("Debian packages", "all there")
    if python_env.installed("run"):
        steps.skipped("Python packages", f"all there, in {VENV}")
    else:
        python_env.install(steps, "run")
    with steps.step("Commands and group") as step:
        _make_links()
        step.result = _make_group(steps)
    with steps.step("innkeeperd") as step:
        step.result = _daemon(steps)
    if options.no_guest:
        print(f"\ninnkeeperd runs. A first guest: {bold(f'inn image build {image} && inn launch {image}')}")
        return
    known = _ask("info", GUEST)
    if known is None:
        if _ask("image", "info", image) is None:
            _inn("image", f"build of {image}", "image", "build", image)
        size = ["--cpus", "2", "--memory", options.memory, "--disk", "20G"]
        _inn("guest", f"launch of {GUEST}", "launch", image, "--name", GUEST, *size)
    elif known["state"] in ("stopped", "crashed"):
        _inn("guest", f"start of {GUEST}", "start", GUEST)
    _say_end()


def _check_room(options: argparse.Namespace, image: str) -> None:
    needed = 1 if options.no_guest else ROOM[image]
    if python_env.installed("run"):
        return  # the daemon itself refuses what has no room
    free = shutil.disk_usage("/var/lib").free / 2**30
    if free < needed:
        raise StepFailed(
            f"/var/lib has {free:.1f} GiB free, and this may need {needed} GiB",
            "make room, or begin with a small guest: scripts/up --image tiny",
        )


def _links_to_make() -> dict[Path, Path]:
    """Links that are not there yet, and what they lead to. A file that is no link of ours is left alone."""
    links = {LINKS / name: VENV / "bin" / name for name in ("inn", "innkeeperd")}
    return {
        link: target
        for link, target in links.items()
        if not (link.is_symlink() and link.readlink() == target)
    }  # fmt: skip


def _make_links() -> None:
    for link, target in _links_to_make().items():
        if link.exists() and not link.is_symlink():
            raise StepFailed(f"{link} is there already, and not from here", f"move it away, or use {target}")
        LINKS.mkdir(parents=True, exist_ok=True)
        link.unlink(missing_ok=True)
        link.symlink_to(target)


def _person() -> str:
    """Who typed it, where that is not root."""
    name = os.environ.get("SUDO_USER") or (os.environ.get("USER") or "" if os.geteuid() else "")
    return "" if name == "root" else name


def _group_made(person: str) -> bool:
    """Whether the group is there, with the person in it."""
    try:
        members = grp.getgrnam(GROUP).gr_mem
        return not person or person in members
    except KeyError:
        return False


def _make_group(steps: Steps) -> str:
    try:
        group = grp.getgrnam(GROUP)
    except KeyError:
        steps.run(["groupadd", "--system", GROUP])
        group = grp.getgrnam(GROUP)
    socket = _home_run() / "api.sock"
    if socket.exists() and socket.stat().st_gid != group.gr_gid:  # of a daemon from before the group
        os.chown(socket, 0, group.gr_gid)
    person = _person()
    if not _group_made(person):
        steps.run(["usermod", "-aG", GROUP, person])
    return f"inn, for root and {person}" if person else f"inn, for root and the members of {GROUP}"


def _systemd() -> bool:
    """Whether a service can be made: systemd runs, and nobody asked for another data folder."""
    return Path("/run/systemd/system").is_dir() and "INNKEEPER_HOME" not in os.environ


def _home_run() -> Path:
    home = os.environ.get("INNKEEPER_HOME")
    return Path(home) / "run" if home else Path("/run/innkeeper")


def _daemon(steps: Steps) -> str:
    """innkeeperd runs, and runs this code."""
    running = _ask("daemon", "status")
    if running and not running.get("running"):
        running = None
    fresh = running is not None and _newest_source() <= _started(running)
    if _systemd():
        text = (ROOT / "scripts/innkeeperd.service").read_text()
        if not UNIT.exists() or UNIT.read_text() != text:
            UNIT.write_text(text)
            steps.run(["systemctl", "daemon-reload"])
        steps.run(["systemctl", "enable", "--quiet", "innkeeperd"])
        owned = subprocess.run(["systemctl", "is-active", "--quiet", "innkeeperd"]).returncode == 0
        if running and not owned:
            steps.run([VENV / "bin/inn", "daemon", "stop"])
        if not (fresh and owned):
            advice = "systemctl status innkeeperd, and journalctl -u innkeeperd, say more"
            steps.run(["systemctl", "restart", "innkeeperd"], hint=lambda _: advice)
    elif not fresh:
        if running:
            steps.run([VENV / "bin/inn", "daemon", "stop"])
        steps.run([VENV / "bin/inn", "daemon", "start"], hint=lambda _: "the hint above, or its log, tells more")
    status = _ask("daemon", "status") or {}
    if not status.get("running"):
        raise StepFailed("innkeeperd was started and does not answer", "see inn daemon status")
    before = "runs already" if fresh else "restarted; guests went on" if running else "started"
    return f"{before}, pid {status['pid']}" + (", as a systemd service" if _systemd() else "")


def _newest_source() -> float:
    files = [*(ROOT / "src").rglob("*.py"), python_env.STAMP]
    return max(path.stat().st_mtime for path in files)


def _started(daemon: dict[str, Any]) -> float:
    from datetime import datetime

    return datetime.fromisoformat(str(daemon["started"])).timestamp()


def _ask(*words: str) -> dict[str, Any] | None:
    """What `inn … -o json` answers, None where it fails or is not there yet."""
    if not (VENV / "bin/inn").exists():
        return None
    answer = subprocess.run(
        [VENV / "bin/inn", *words, "-o", "json"],
        capture_output=True, text=True, env=os.environ | {"INNKEEPER_NO_AUTOSTART": "1"},
    )  # fmt: skip
    try:
        document: dict[str, Any] = json.loads(answer.stdout)
    except ValueError:
        return None
    return document


def _inn(what: str, step: str, *words: str) -> None:
    """A long command of `inn`, which shows its progress on stderr; what it says at its end, `_say_end` says."""
    print(f"\n{dim('$ inn ' + ' '.join(words))}", flush=True)
    status = subprocess.run([VENV / "bin/inn", *words], stdout=subprocess.DEVNULL).returncode
    if status == 130:
        raise KeyboardInterrupt
    if status:
        hint = "the lines above say why and what to do; inn op ls and inn events tell more"
        if what == "guest":
            hint += f"; inn rm --force {GUEST} takes a half-started one away"
        raise StepFailed(f"the {step} failed", hint)


# --- after ---


def _say_end() -> None:
    vm = _ask("info", GUEST) or {}
    user, address, port = vm.get("user"), vm.get("address"), vm.get("ssh_port")
    image = _ask("image", "info", str(vm.get("image"))) or {}
    ssh = bool(port and image.get("cloud_init"))
    size = f"{vm.get('cpus')} vCPU, {int(vm.get('memory') or 0) / 2**30:.3g} GiB RAM"
    enter = f"inn ssh {GUEST}" if ssh else f"inn exec {GUEST} -- sh -c 'uname -a'"
    state = paint(f"● {vm.get('state')}", "32" if vm.get("state") == "running" else "33")
    rows = [
        ("Guest", f"{bold(GUEST)}  {state}  {vm.get('image')}, {size}"),
        ("Address", f"{user}@{address}, port {port} → 22" if ssh else "none: this image has no SSH"),
        ("Enter", bold(enter)),
        ("Console", f"inn console {GUEST}" + dim(f"   ctrl-] leaves; inn logs {GUEST} -f only watches")),
        ("Try next", "inn ls · inn host · inn help"),
        ("", f"inn launch {vm.get('image')} --name web --publish 8080:80"),
        ("", f"inn cp README.md {GUEST}:/tmp/ · inn screenshot {GUEST} {GUEST}.png · inn rm --force {GUEST}"),
    ]
    print()
    for label, text in rows:
        print(f"  {paint(f'{label:<10}', '36')} {text}")
    person = _person()
    if person and GROUP not in subprocess.run(["id", "-nG"], capture_output=True, text=True).stdout.split():
        print(f"\n  {person} is in the group {GROUP} from the next login on; until then: sudo inn …, or newgrp {GROUP}")
    sys.stdout.flush()
