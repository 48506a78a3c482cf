"""A VM's firewall rules and tags after a change: a pure function."""

from __future__ import annotations

from typing import assert_never

from innkeeper.base.errors import InvalidInput, NotFound
from innkeeper.spec.firewall import MOST_RULES, AddRule, FirewallChange, RemoveRule, SetDefault, SetTags
from innkeeper.spec.vm import VMSpec


def with_change(spec: VMSpec, change: FirewallChange) -> VMSpec:
    """The spec after a change. Raises `InvalidInput`, `NotFound`."""
    firewall = spec.firewall
    rules = list(firewall.rules)
    match change:
        case AddRule(rule=rule, at=at):
            if len(rules) == MOST_RULES:
                raise InvalidInput(f"{spec.name} has {MOST_RULES} rules, which is the most", hint=_listed(spec))
            if at is not None and at > len(rules) + 1:
                raise InvalidInput(
                    f"place {at} is behind the end: {spec.name} has {len(rules)} rules", hint=_listed(spec), field="at"
                )
            rules.insert(len(rules) if at is None else at - 1, rule)
        case RemoveRule(number=number):
            if number > len(rules):
                raise NotFound(f"{spec.name} has no rule {number}", hint=_listed(spec))
            del rules[number - 1]
        case SetDefault(direction=direction, action=action):
            name = "inbound" if direction == "in" else "outbound"
            return spec.model_copy(update={"firewall": firewall.model_copy(update={name: action})})
        case SetTags(add=add, remove=remove):
            if missing := sorted(set(remove) - set(spec.tags)):
                raise NotFound(f"{spec.name} has no tag {missing[0]}", hint=f"it has: {' '.join(spec.tags) or 'none'}")
            return spec.model_copy(update={"tags": tuple(sorted({*spec.tags, *add} - set(remove)))})
        case _:
            assert_never(change)
    return spec.model_copy(update={"firewall": firewall.model_copy(update={"rules": tuple(rules)})})


def _listed(spec: VMSpec) -> str:
    return f"inn firewall ls {spec.name}"
