"""What is wrong with the interfaces of the host that cards of VMs are on, with no network of ours between. `CHECKS` is
the list, as plan/doctor.py has one for networks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

from innkeeper.plan.doctor import Finding, Level, Said
from innkeeper.plan.survey import Survey


class Parent(NamedTuple):
    """An interface, and the VMs with a card on it."""

    name: str
    vms: tuple[str, ...]


Look = Callable[[Parent, Survey], Iterator[Said]]


class Check(NamedTuple):
    """One kind of finding."""

    code: str
    level: Level
    look: Look
    means: str


def parents(vms: Iterable[Mapping[str, Any]]) -> list[Parent]:
    """Those of these VMs, by name."""
    found: dict[str, list[str]] = {}
    for vm in vms:
        for nic in vm["spec"]["nics"]:
            if nic.get("parent"):
                found.setdefault(nic["parent"], []).append(vm["name"])
    return [Parent(name, tuple(dict.fromkeys(users))) for name, users in sorted(found.items())]


def diagnose(parents: Iterable[Parent], survey: Survey) -> list[Finding]:
    """All that is wrong, the worst first."""
    return [
        Finding(check.code, check.level, (), said.what, said.evidence, check.means, said.fix, False)
        for check in CHECKS
        for parent in parents
        for said in check.look(parent, survey)
    ]


def _gone(parent: Parent, survey: Survey) -> Iterator[Said]:
    if parent.name not in survey.links:
        what = f"{parent.name} is not there, and cards of {', '.join(parent.vms)} are on it"
        yield Said(what, (f"ip link show {parent.name}: no such device",), ("ip -br link",))


def _down(parent: Parent, survey: Survey) -> Iterator[Said]:
    link = survey.links.get(parent.name)
    if link is not None and not link.up:
        what = f"{parent.name} is down, and cards of {', '.join(parent.vms)} are on it"
        yield Said(what, (f"ip link show {parent.name}: no UP",), (f"ip link set {parent.name} up",))


CHECKS = (
    Check("parent-gone", "error", _gone, "those VMs do not start, and those that run reach nobody by that card"),
    Check("parent-down", "warning", _down, "those VMs reach nobody by that card"),
)
