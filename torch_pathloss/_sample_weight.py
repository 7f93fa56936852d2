"""Sample weights: from what a call is given to one tensor for each term that it concerns."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from torch_pathloss import _paths, _tree
from torch_pathloss._errors import ArgumentError
from torch_pathloss._names import Names
from torch_pathloss._paths import Name, Path
from torch_pathloss._plan import Plan, flatten


def by_term(sample_weight: Any, plan: Plan) -> dict[str, Tensor]:
    """Returns the sample weights by the name of the term.

    Args:
        sample_weight: a tensor for every term, or a tree of tensors by name or path of a term. A path serves the
            terms of all its labels, a name takes precedence over a path.
        plan: the terms.

    Raises:
        ArgumentError: if a weight is not a tensor, belongs to no term, or is given twice.
    """
    if isinstance(sample_weight, Tensor):
        return {term.name: sample_weight for term in plan.terms}
    found: dict[str, Tensor] = {}
    used: set[Path] = set()
    for term in plan.terms:
        for path in ((term.name,), (term.path_text,), term.path):
            at, weight = _tree.find_at(sample_weight, path)
            if isinstance(weight, Tensor):
                found[term.name] = weight
                used.add(at)
                break
    if len(used) < len(_tree.values(sample_weight)):
        return _by_any_spelling(sample_weight, plan)
    return found


def _by_any_spelling(sample_weight: Any, plan: Plan) -> dict[str, Tensor]:
    """Does what `by_term` does where not everything stands under a name or path as the container writes it."""
    problems: list[str] = []
    given = list(flatten(sample_weight, problems))
    if problems:
        raise ArgumentError(f"The sample weights cannot be read: {problems[0]}")
    for name, weight in given:
        if not isinstance(weight, Tensor):
            raise ArgumentError(
                f"The sample weight of {_paths.format(*name)!r} must be a tensor, not {_tree.describe(weight)}."
            )
    names = [_paths.parse_name(term.name) for term in plan.terms]
    found: dict[int, int] = {}  # positions of terms and of what is given
    for number, (name, _) in enumerate(given):
        for position in _alike(names, name, by_path=False):
            if position in found:
                raise _given_twice(plan, position)
            found[position] = number
    for number, (name, _) in enumerate(given):
        alike = _alike(names, name, by_path=True)
        if not alike:
            raise ArgumentError(
                f"A sample weight is given for {_paths.format(*name)!r}, but there is {Names(names).unknown(name)}"
            )
        for position in alike:
            found.setdefault(position, number)
        if all(found[position] != number for position in alike):
            raise _given_twice(plan, alike[0])
    return {plan.terms[position].name: given[number][1] for position, number in found.items()}


def _given_twice(plan: Plan, position: int) -> ArgumentError:
    return ArgumentError(f"The sample weight of {plan.terms[position].name!r} is given twice. Give it once.")


def _alike(names: list[Name], given: Name, by_path: bool) -> list[int]:
    """Returns the positions of the terms that a name means: one, or with ``by_path`` those of all labels of a path."""
    return [
        position
        for position, name in enumerate(names)
        if _paths.same_node(name.path, given.path) and (name.label == given.label or (by_path and given.label is None))
    ]
