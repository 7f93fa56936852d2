"""Running a plan: from trees to the values of the terms."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, final

import torch
from torch import Tensor, nn

from torch_pathloss import _paths, _tree
from torch_pathloss._errors import ArgumentError, CriterionReturnError, PathLossError, PathNotFoundError
from torch_pathloss._names import Names
from torch_pathloss._paths import Path
from torch_pathloss._plan import INPUT, OUTPUT, TREES, Argument, Call, Computed, Constant, Plan, Read, TermPlan
from torch_pathloss._term import reduce

_ABSENT = object()  # not None, which a criterion that forgets to return gives


@final
class Evaluation:
    """One call of the container: reads the trees, runs the criteria, and gives each term's value.

    Args:
        plan: what to do.
        container: the module under whose names criteria and constants are registered.
        trees: output, target and input.
        sample_weight: one tensor, or a tree of tensors by name or path of a term.
        device: where the weights lie, and so where every value must lie.
    """

    def __init__(
        self, plan: Plan, container: nn.Module, trees: tuple[Any, Any, Any], sample_weight: Any, device: torch.device
    ) -> None:
        self.plan = plan
        self.container = container
        self.trees = trees
        self.device = device
        self.sample_weights = None if sample_weight is None else _by_term(sample_weight, plan)
        self.computed: dict[tuple[int, tuple[Path, ...]], Any] = {}

    def values(self, terms: Sequence[TermPlan] | None = None) -> tuple[list[Tensor], list[bool]]:
        """Returns the value of each of the terms, at least float32, and whether it is present.

        The value of an absent term is a zero that keeps its output leaves in the autograd graph.
        An error names the term: the package's own in their message, others in a note.
        """
        values: list[Tensor] = []
        present: list[bool] = []
        terms = self.plan.terms if terms is None else terms
        annotate = self.container.annotate and not torch.compiler.is_compiling()
        term = terms[0]
        try:
            for term in terms:
                if annotate:
                    with torch.profiler.record_function(f"pathloss/{term.name}"):
                        value = self.value(term)
                else:
                    value = self.value(term)
                present.append(value is not None)
                values.append(self.zero(term) if value is None else value)
        except PathLossError as error:
            raise type(error)(f"Term {term.name!r}: {error}") from None
        except Exception as error:
            if hasattr(error, "add_note"):  # Python 3.11
                error.add_note(f"in term {term.name!r} of the PathLossModule: {term.sources}")
            raise
        return values, present

    def value(self, term: TermPlan) -> Tensor | None:
        """Returns the value of one term, at least float32, or `None` if it or every match of it is absent."""
        if term.driver is None:
            return self.match(term, ())
        found: list[Tensor] = []
        zeros: list[Tensor] = []
        for captures in self.captures(term):
            value = self.match(term, captures)
            if value is None:
                zeros.append(self.zero_of_match(term, captures))
            else:
                found.append(value)
        if not found:
            return None
        total = add(found + zeros)
        return total / len(found) if term.match == "mean" else total

    def match(self, term: TermPlan, captures: tuple[Path, ...]) -> Tensor | None:
        """Returns the value of a term for one match, or `None` if it is absent. ``()`` is the match of a plain path."""
        result = self.call(term.call, captures)
        if result is _ABSENT:
            return None
        if not isinstance(result, Tensor):
            raise CriterionReturnError(f"its criterion returned {_tree.describe(result)}. It must return a tensor.")
        if result.device != self.device:
            raise ArgumentError(
                f"its value is on {result.device}, but the weights are on {self.device}. "
                f"Move the criterion to the outputs' device with criterion.to({str(result.device)!r})."
            )
        if term.reduction is not None:
            result = reduce(result, term.reduction, self.sample_weight(term, result))
        elif self.sample_weights is not None and term.name in self.sample_weights:
            raise ArgumentError(
                "it has a sample weight but no reduction. "
                'Build its criterion with reduction="none" and wrap it as Term(criterion, reduction="mean").'
            )
        if result.ndim != 0:
            raise CriterionReturnError(
                f"its criterion returned a tensor of shape {tuple(result.shape)}, not a scalar. "
                'Reduce it in the criterion, or wrap it as Term(criterion, reduction="mean").'
            )
        return result if result.dtype is torch.float32 else _at_least_float32(result)

    def sample_weight(self, term: TermPlan, result: Tensor) -> Tensor | None:
        weight = None if self.sample_weights is None else self.sample_weights.get(term.name)
        if weight is None:
            return None
        if result.ndim == 0:
            raise ArgumentError(
                "it has a sample weight, but its criterion reduces by itself. "
                'Build the criterion with reduction="none".'
            )
        if weight.ndim > result.ndim or weight.shape != result.shape[: weight.ndim]:
            raise ArgumentError(
                f"its sample weight has shape {tuple(weight.shape)}, but its criterion returned shape "
                f"{tuple(result.shape)}. The first dimensions must agree."
            )
        return weight

    def tree(self, read: Read) -> Any:
        tree = self.trees[read.tree]
        if tree is None:
            raise PathNotFoundError(
                f"it reads {_paths.format(read.path)!r} of the {TREES[read.tree]}, "
                f"but the {TREES[read.tree]} of the call is None. Pass it to the call."
            )
        return tree

    def call(self, call: Call, captures: tuple[Path, ...]) -> Any:
        """Returns what a child returns for its arguments, or `None` if one of them is absent."""
        positional = []
        for argument in call.positional:
            if type(argument) is Read and not captures:  # the usual case, without a call
                value = _tree.walk(self.trees[argument.tree], argument.path, TREES[argument.tree])
                if value is None:
                    value = self.missing(argument)
            else:
                value = self.argument(argument, captures)
            if value is _ABSENT:
                return self.absent(call, captures)
            positional.append(value)
        keywords = {}
        for key, argument in call.keywords:
            value = self.argument(argument, captures)
            if value is _ABSENT:
                return self.absent(call, captures)
            keywords[key] = value
        if call.is_elementwise:
            _check_shapes(positional, keywords)
        return self.container._modules[call.child](*positional, **keywords)  # type: ignore[misc]

    def argument(self, argument: Argument, captures: tuple[Path, ...]) -> Any:
        if type(argument) is Read:
            path = _paths.fill(argument.path, captures) if captures else argument.path
            value = _tree.walk(self.trees[argument.tree], path, TREES[argument.tree])
            return self.missing(argument) if value is None else value
        if type(argument) is Computed:
            key = (argument.index, captures if argument.is_pattern else ())
            if key not in self.computed:
                self.computed[key] = self.call(self.plan.shared[argument.index], captures)
            return self.computed[key]
        if type(argument) is Constant:
            return argument.value
        return getattr(self.container, argument.name)  # type: ignore[union-attr]

    def absent(self, call: Call, captures: tuple[Path, ...]) -> Any:
        """Returns the mark of an absent term. The other paths must exist all the same: one may be misspelt."""
        for argument in () if captures else call.arguments:
            if type(argument) is Read:
                self.argument(argument, ())
        return _ABSENT

    def missing(self, read: Read) -> Any:
        """Returns what stands for a node that is `None`: the mark of an absent term, or `None` itself of the input."""
        self.tree(read)
        return None if read.tree == INPUT else _ABSENT

    def captures(self, term: TermPlan) -> list[tuple[Path, ...]]:
        """Returns, for each match of a term, what its wildcards stand for; ``[()]`` for a plain path."""
        if term.driver is None:
            return [()]
        return _tree.expand(self.tree(term.driver), term.driver.path, TREES[term.driver.tree])

    def zero(self, term: TermPlan) -> Tensor:
        """Returns a zero that depends on every output leaf of an absent term, with zero gradient.

        Keeps the leaves in the autograd graph, without which DistributedDataParallel waits for their parameters.
        """
        zeros = [self.zero_of_match(term, captures) for captures in self.captures(term)]
        return add(zeros) if zeros else torch.zeros((), device=self.device)

    def zero_of_match(self, term: TermPlan, captures: tuple[Path, ...]) -> Tensor:
        zero = torch.zeros((), device=self.device)
        for leaf in self.output_leaves(term, captures):
            if leaf.requires_grad:
                # The sum of no element: a NaN or inf in the output does not reach it.
                zero = zero + leaf.reshape(-1)[:0].abs().sum(dtype=zero.dtype)
        return zero

    def output_leaves(self, term: TermPlan, captures: tuple[Path, ...]) -> list[Tensor]:
        """Returns the tensors of the output that a match of a term reads."""
        return [
            leaf
            for read in term.reads
            if read.tree == OUTPUT
            for leaf in _tree.tensors(_tree.walk(self.trees[OUTPUT], _paths.fill(read.path, captures), TREES[OUTPUT]))
        ]


def add(values: list[Tensor]) -> Tensor:
    """Returns the sum of scalars: one kernel in eager mode, a chain that fuses in compiled code."""
    if len(values) == 1:
        return values[0]
    if not torch.compiler.is_compiling():
        return torch.stack(values).sum()
    total = values[0]
    for value in values[1:]:
        total = total + value
    return total


def _at_least_float32(value: Tensor) -> Tensor:
    if not value.is_floating_point():
        raise CriterionReturnError(f"its criterion returned a tensor of {value.dtype}, not of a floating-point type.")
    return value.to(torch.promote_types(value.dtype, torch.float32))


def _check_shapes(positional: list[Any], keywords: dict[str, Any]) -> None:
    first = positional[0] if positional else keywords.get("input")
    second = positional[1] if len(positional) > 1 else keywords.get("target")
    if isinstance(first, Tensor) and isinstance(second, Tensor) and first.shape != second.shape:
        raise ArgumentError(
            f"its criterion compares element by element, but its first argument has shape {tuple(first.shape)} and its "
            f"second {tuple(second.shape)}. Torch would broadcast them. Give both the same shape."
        )


def _by_term(sample_weight: Any, plan: Plan) -> dict[str, Tensor]:
    """Returns the sample weights by the name of the term.

    Raises:
        ArgumentError: if a weight is not a tensor or belongs to no term.
    """
    if isinstance(sample_weight, Tensor):
        return {term.name: sample_weight for term in plan.terms}
    found: dict[str, Tensor] = {}
    used: set[tuple[str, bool]] = set()
    for term in plan.terms:
        for text, path in ((term.name, (term.name,)), (term.path_text, (term.path_text,)), (None, term.path)):
            weight = _tree.find(sample_weight, path)
            if isinstance(weight, Tensor):
                found[term.name] = weight
                used.add((text or term.path_text, text is not None))
                break
    if len(used) < len(_tree.values(sample_weight)):
        raise ArgumentError(_unused(sample_weight, plan, used))
    return found


def _unused(sample_weight: Any, plan: Plan, used: set[tuple[str, bool]]) -> str:
    names = Names(_paths.parse_name(term.name) for term in plan.terms)
    for path, leaf in _tree.leaves(sample_weight):
        text = path[0] if len(path) == 1 and isinstance(path[0], str) else _paths.format(path)
        if leaf is None or (text, True) in used or (text, False) in used:
            continue
        if not isinstance(leaf, Tensor):
            return f"The sample weight of {text!r} must be a tensor, not {_tree.describe(leaf)}."
        return f"A sample weight is given for {text!r}, but there is {names.unknown(_paths.Name((text,)))}"
    return "A sample weight is given twice for one term. Give it once."
