"""Running a plan: from trees to the values of the terms."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, final

import torch
from torch import Tensor, nn

from torch_pathloss import _paths, _ranks, _select, _tree
from torch_pathloss._errors import ArgumentError, CriterionReturnError, PathLossError, PathNotFoundError
from torch_pathloss._paths import Path
from torch_pathloss._plan import (
    INPUT,
    OUTPUT,
    TARGET,
    TREES,
    Argument,
    Call,
    Computed,
    Condition,
    Constant,
    Plan,
    Read,
    TermPlan,
)
from torch_pathloss._sample_weight import by_term
from torch_pathloss._term import Present, reduce

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
        inactive: the terms whose schedule is in an inactive phase, by name, and whether their outputs get no gradient
            instead of zero.
    """

    def __init__(
        self,
        plan: Plan,
        container: nn.Module,
        trees: tuple[Any, Any, Any],
        sample_weight: Any,
        device: torch.device,
        inactive: Mapping[str, bool] | None = None,
    ) -> None:
        if not plan.identity:  # never, but a graph that asks is guarded by it
            raise AssertionError("A plan has no identity.")
        self.plan = plan
        self.container = container
        self.trees = trees
        self.device = device
        self.inactive = inactive
        self.sample_weights = None if sample_weight is None else by_term(sample_weight, plan)
        self.computed: dict[tuple[int | str, tuple[Path, ...]], Any] = {}
        self.selected: dict[str, Tensor] = {}
        self.is_local = False  # whether normalizers are those of this process alone

    def values(self, terms: Sequence[TermPlan] | None = None) -> tuple[list[Tensor], list[Present]]:
        """Returns the value of each of the terms, at least float32, and whether it is present.

        The value of an absent term is a zero that keeps its output leaves in the autograd graph.
        An error names the term: the package's own in their message, others in a note.
        """
        values: list[Tensor] = []
        present: list[Present] = []
        terms = self.plan.terms if terms is None else terms
        annotate = self.container.annotate and not torch.compiler.is_compiling()
        term = terms[0]
        try:
            for term in terms:
                if self.inactive is not None and term.name in self.inactive:
                    value = None
                elif annotate:
                    with torch.profiler.record_function(f"pathloss/{term.name}"):
                        value = self.value(term)
                else:
                    value = self.value(term)
                if value is None:
                    present.append(False)
                    values.append(self.zero(term))
                else:
                    present.append(True if term.where is None else self.selected[term.name])
                    values.append(value)
        except PathLossError as error:
            raise type(error)(f"Term {term.name!r}: {error}") from None
        except Exception as error:
            if hasattr(error, "add_note"):  # Python 3.11
                error.add_note(f"in term {term.name!r} of the PathLossModule: {term.sources}")
            raise
        return values, present

    def value(self, term: TermPlan) -> Tensor | None:
        """Returns the value of one term, at least float32, or `None` if it or every match of it is absent.

        Of a term with a ``where``, `selected` then holds whether anything was selected.
        """
        value = self.match(term, ()) if term.driver is None else self.sum_of_matches(term)
        return value if term.normalizer is None else self.normalized(term, value)

    def sum_of_matches(self, term: TermPlan) -> Tensor | None:
        found: list[Tensor] = []
        zeros: list[Tensor] = []
        selected: list[Tensor] = []
        for captures in self.captures(term):
            value = self.match(term, captures)
            if value is None:
                zeros.append(self.zero_of_match(term, captures))
                continue
            found.append(value)
            if term.where is not None:
                selected.append(self.selected[term.name])
        if not found:
            return None
        total = add(found + zeros)
        count: Any = len(found)
        if selected:
            flags = torch.stack(selected)
            self.selected[term.name] = flags.any()
            count = flags.sum().clamp(min=1)
        return total / count if term.match == "mean" else total

    def normalized(self, term: TermPlan, value: Tensor | None) -> Tensor | None:
        """Returns a sum over its count, for which every process adds its own, also where the term is absent."""
        assert term.normalizer is not None
        divisor: Any = self.container._divisor(term.name)  # type: ignore[operator]
        if divisor is None:
            divisor = self.count(0.0 if value is None else self.argument(term.normalizer, ()))
            if not self.is_local:
                divisor = _ranks.sum_over_ranks(divisor)
            divisor = divisor.clamp(min=1) / (1 if self.is_local else _ranks.world_size())
        return None if value is None else value / divisor

    def counts(self) -> Tensor:
        """Returns the count of every term's normalizer in this call, ``[K]``, 0 for a term without one."""
        zero = torch.zeros((), device=self.device)
        counts = []
        for term in self.plan.terms:
            try:
                if term.normalizer is None:
                    counts.append(zero)
                    continue
                count = self.count(self.argument(term.normalizer, ()))
                counts.append(zero if self.has_no_target(term) else count)
            except PathLossError as error:
                raise type(error)(f"Term {term.name!r}: {error}") from None
        return torch.stack(counts)

    def has_no_target(self, term: TermPlan) -> bool:
        """Whether a term will be absent for want of something in the target, as far as that is known without output."""
        reads = [read for read in (*term.reads, *term.masking) if read.tree == TARGET and not read.is_pattern]
        return any(self.argument(read, ()) is _ABSENT for read in reads)

    def count(self, normalizer: Any) -> Tensor:
        """Returns the sum of the elements of a normalizer as float32; 0 for an absent one."""
        if normalizer is _ABSENT:
            return torch.zeros((), device=self.device)
        if isinstance(normalizer, (int, float)):
            return torch.full((), normalizer, dtype=torch.float32, device=self.device)
        if not isinstance(normalizer, Tensor):
            raise ArgumentError(f"its normalizer is {_tree.describe(normalizer)}. It must be a tensor or a number.")
        if normalizer.device != self.device:
            raise ArgumentError(
                f"its normalizer is on {normalizer.device}, but the weights are on {self.device}. "
                "Move it to the outputs' device."
            )
        return normalizer.detach().sum(dtype=torch.float32)

    def match(self, term: TermPlan, captures: tuple[Path, ...]) -> Tensor | None:
        """Returns the value of a term for one match, or `None` if it is absent. ``()`` is the match of a plain path."""
        selection: _select.Selection | None = None
        if term.where is None:
            result = self.call(term.call, captures)
        else:
            result, selection = self.call_selected(term, captures)
        if result is _ABSENT:
            return None
        if not isinstance(result, Tensor):
            raise CriterionReturnError(f"its criterion returned {_tree.describe(result)}. It must return a tensor.")
        if result.device != self.device:
            raise ArgumentError(
                f"its value is on {result.device}, but the weights are on {self.device}. "
                f"Move the criterion to the outputs' device with criterion.to({str(result.device)!r})."
            )
        selected = None if selection is None or selection.mask.ndim == 0 else selection.mask
        if selected is not None:
            result = _select.checked_result(result, selected, term.reduction is not None)
        if term.reduction is not None:
            _check_dtype(result)
            result = reduce(result, term.reduction, self.sample_weight(term, result), selected)
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
        if selection is not None:
            self.selected[term.name] = selection.any
            if selected is None:
                result = torch.where(selection.any, result, 0)
        return result if result.dtype is torch.float32 else _at_least_float32(result)

    def selection(self, term: TermPlan, captures: tuple[Path, ...]) -> _select.Selection | None:
        """Returns which samples a term is computed on, or `None` if the mask is absent."""
        mask = self.mask(term.where, captures)
        return None if mask is _ABSENT else _select.Selection(_select.checked_mask(mask, self.device), term.call)

    def mask(self, where: Argument | Condition | None, captures: tuple[Path, ...]) -> Any:
        if not isinstance(where, Condition):
            assert where is not None
            return self.argument(where, captures)
        key = (where.child, ())  # one mask for all matches of a pattern
        if key not in self.computed:
            condition: Any = self.container._modules[where.child]
            self.computed[key] = condition(self.trees[OUTPUT], self.trees[TARGET])
        return self.computed[key]

    def call_selected(self, term: TermPlan, captures: tuple[Path, ...]) -> tuple[Any, _select.Selection | None]:
        """Returns what a criterion returns for arguments that are safe where nothing is selected, and the selection."""
        call = term.call
        found = self.arguments(call, captures)
        if found is None:  # the mask need not be there, but a misspelt path to it is an error
            if not isinstance(term.where, Condition):
                self.mask(term.where, captures)
            return self.absent(call, captures), None
        selection = self.selection(term, captures)
        if selection is None:
            return _ABSENT, None
        positional, keywords = found

        def safe(argument: Argument, value: Any, is_first: bool, is_second: bool) -> Any:
            is_safe = not self.is_per_sample(argument, is_first or is_second)
            return value if is_safe else selection.safe(value, is_first)

        positional = [
            safe(argument, value, position == 0, position == 1)
            for position, (argument, value) in enumerate(zip(call.positional, positional, strict=True))
        ]
        keywords = {
            key: safe(argument, keywords[key], key in ("input", "output"), key == "target")
            for key, argument in call.keywords
        }
        if call.is_elementwise:
            _check_shapes(positional, keywords)
        module: Any = self.container._modules[call.child]
        return selection.call(module, positional, keywords), selection

    def is_per_sample(self, argument: Argument, is_compared: bool) -> bool:
        """Whether an argument has samples: what comes from the output or the target, or is compared with it."""
        if type(argument) is Read:
            return is_compared or argument.tree != INPUT
        if type(argument) is Computed:
            return is_compared or any(
                self.is_per_sample(inner, False) for inner in self.plan.shared[argument.index].arguments
            )
        return False

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
        """Returns what a child returns for its arguments, or the mark of an absent term if one of them is absent."""
        found = self.arguments(call, captures)
        if found is None:
            return self.absent(call, captures)
        positional, keywords = found
        if call.is_elementwise:
            _check_shapes(positional, keywords)
        module: Any = self.container._modules[call.child]
        return module(*positional, **keywords) if keywords else module(*positional)

    def arguments(self, call: Call, captures: tuple[Path, ...]) -> tuple[list[Any], dict[str, Any]] | None:
        """Returns what a child is called with, or `None` if one of its arguments is absent."""
        positional = []
        for argument in call.positional:
            if type(argument) is Read and not captures:  # the usual case, without a call
                value = _tree.walk(self.trees[argument.tree], argument.path, TREES[argument.tree])
                if value is None:
                    value = self.missing(argument)
            else:
                value = self.argument(argument, captures)
            if value is _ABSENT:
                return None
            positional.append(value)
        keywords = {}
        for key, argument in call.keywords:
            value = self.argument(argument, captures)
            if value is _ABSENT:
                return None
            keywords[key] = value
        return positional, keywords

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
            elif type(argument) is Computed:
                self.absent(self.plan.shared[argument.index], ())
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
        if self.is_let_go(term):
            return torch.zeros((), dtype=torch.float32, device=self.device)
        zeros = [self.zero_of_match(term, captures) for captures in self.captures(term)]
        return add(zeros) if zeros else torch.zeros((), dtype=torch.float32, device=self.device)

    def is_let_go(self, term: TermPlan) -> bool:
        """Whether a term is in an inactive phase in which its outputs get no gradient, not even zero."""
        return self.inactive is not None and self.inactive.get(term.name, False)

    def zero_of_match(self, term: TermPlan, captures: tuple[Path, ...]) -> Tensor:
        zero = torch.zeros((), dtype=torch.float32, device=self.device)
        for leaf in self.output_leaves(term.reads, captures):
            if leaf.requires_grad:
                # The sum of no element: a NaN or inf in the output does not reach it.
                zero = zero + leaf.reshape(-1)[:0].abs().sum(dtype=zero.dtype)
        return zero

    def output_leaves(self, reads: tuple[Read, ...], captures: tuple[Path, ...]) -> list[Tensor]:
        """Returns the tensors of the output that a match of a term reads."""
        return self.leaves(tuple(read for read in reads if read.tree == OUTPUT), captures)

    def leaves(self, reads: tuple[Read, ...], captures: tuple[Path, ...]) -> list[Tensor]:
        """Returns the tensors at the nodes that are read for a match of a term."""
        return [
            leaf
            for read in reads
            for leaf in _tree.tensors(
                _tree.walk(self.trees[read.tree], _paths.fill(read.path, captures), TREES[read.tree])
            )
        ]

    def trained_arguments(self) -> list[Tensor]:
        """Returns the tensors that require grad among what terms read of target, input and sample weights."""
        found = list((self.sample_weights or {}).values())
        for term in self.plan.terms:
            try:
                for read in term.arguments:
                    if read.is_pattern:
                        for captures in self.captures(term):
                            found.extend(self.leaves((read,), captures))
                        continue
                    node = _tree.walk(self.trees[read.tree], read.path, TREES[read.tree])
                    if type(node) is Tensor:  # the usual case
                        found.append(node)
                    else:
                        found.extend(_tree.tensors(node))
            except PathLossError:
                continue  # the term raises the same with its name
        return [leaf for leaf in found if leaf.requires_grad]


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
    _check_dtype(value)
    return value.to(torch.promote_types(value.dtype, torch.float32))


def _check_dtype(result: Tensor) -> None:
    if not result.is_floating_point():
        raise CriterionReturnError(f"its criterion returned a tensor of {result.dtype}, not of a floating-point type.")


def _check_shapes(positional: list[Any], keywords: dict[str, Any]) -> None:
    if keywords:
        first = positional[0] if positional else keywords.get("input")
        second = positional[1] if len(positional) > 1 else keywords.get("target")
    else:
        first, second = positional[0], positional[1] if len(positional) > 1 else None
    if isinstance(first, Tensor) and isinstance(second, Tensor) and first.shape != second.shape:
        raise ArgumentError(
            f"its criterion compares element by element, but its first argument has shape {tuple(first.shape)} and its "
            f"second {tuple(second.shape)}. Torch would broadcast them. Give both the same shape."
        )
