"""Gradients at the outputs: computed with the total, merged, and handed to the model in one pass."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, TypeAlias, final

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from torch_pathloss import _tree
from torch_pathloss._errors import PathLossError
from torch_pathloss._evaluate import Evaluation, add
from torch_pathloss._paths import Path
from torch_pathloss._plan import TermPlan
from torch_pathloss._term import Present
from torch_pathloss._weights import Combined, weighted_sum

_CHUNK = 2**20  # bytes of output leaves up to which terms are differentiated together: below, memory costs nothing

Evaluate: TypeAlias = Callable[[Any], Evaluation]
"""Makes an evaluation for an output that stands in for the model's."""
Combine: TypeAlias = Callable[[list[Tensor], list[Present]], Combined]
"""Makes a total of the values of all terms."""
Gradients: TypeAlias = list[Tensor | None]


def leaves_of(output: Any, every: bool) -> tuple[list[Path], list[Tensor]]:
    """Returns the differentiable leaves of an output with their paths: all of them, or those that require grad.

    A tensor that stands at two places of the tree is two leaves; their gradients meet in the model.
    """
    paths: list[Path] = []
    leaves: list[Tensor] = []

    def collect(path: Path, leaf: Any) -> None:
        if _is_differentiable(leaf, every):
            paths.append(path)
            leaves.append(leaf)

    _tree.visit_leaves(collect, output)
    return paths, leaves


def replaced(output: Any, leaves: Sequence[Any], every: bool, rest: Callable[[Any], Any] = lambda leaf: leaf) -> Any:
    """Returns a tree like the output with other differentiable leaves, and `rest` of all others."""
    remaining = iter(leaves)
    return _tree.map_leaves(
        lambda leaf: next(remaining) if _is_differentiable(leaf, every) else rest(leaf),
        output,
    )


def mirrored(output: Any, gradients: Sequence[Tensor | None]) -> Any:
    """Returns the gradients at all differentiable leaves as a tree like the output, `None` at every other leaf."""
    return replaced(output, gradients, every=True, rest=lambda leaf: None)


def _is_differentiable(leaf: Any, every: bool) -> bool:
    if not isinstance(leaf, Tensor) or not (leaf.is_floating_point() or leaf.is_complex()):
        return False
    return every or leaf.requires_grad


class Pass(NamedTuple):
    """What one pass over the terms gives, all of it detached."""

    total: Tensor
    values: list[Tensor]
    stacked: Tensor
    weights: Tensor
    present: list[Present]
    leaves: Gradients
    parameters: Gradients


def at_once(
    evaluate: Evaluate,
    output: Any,
    leaves: list[Tensor],
    parameters: list[Tensor],
    combine: Combine,
    scale: Tensor | None,
    every: bool,
) -> Pass:
    """Computes the total and differentiates it, as one graph where it is traced."""
    copies = [leaf.detach().requires_grad_() for leaf in leaves]
    with torch.enable_grad():
        values, present = evaluate(replaced(output, copies, every)).values()
        total, stacked, weights = combine(values, present)
    gradients = _differentiate(total, [*copies, *parameters], scale)
    values = [value.detach() for value in values]
    split = len(copies)
    return Pass(total.detach(), values, stacked, weights, present, gradients[:split], gradients[split:])


def functional(
    evaluate: Evaluate,
    output: Any,
    leaves: list[Tensor],
    combine: Combine,
    every: bool,
) -> Pass:
    """Computes the same without `torch.autograd.grad`, which Dynamo does not trace by default.

    A leaf that is read but has no influence gets zeros where the other ways give `None`.
    """
    known: list[Present] = []

    def total_of(copies: list[Tensor]) -> tuple[Tensor, tuple[list[Tensor], Tensor, Tensor, list[Tensor]]]:
        values, present = evaluate(replaced(output, copies, every)).values()
        known.extend(present)
        total, stacked, weights = combine(values, present)
        return total, (values, stacked, weights, [flag for flag in present if isinstance(flag, Tensor)])

    copies = [leaf.detach() for leaf in leaves]
    gradients, (total, aux) = torch.func.grad_and_value(total_of, has_aux=True)(copies)
    values, stacked, weights, flags = aux
    evaluation = evaluate(output)
    reached = _where_read(evaluation, evaluation.plan.terms, leaves, gradients)
    return Pass(total, values, stacked, weights, _with_flags(known, flags), reached, [])


def _where_read(
    evaluation: Evaluation, terms: Sequence[TermPlan], leaves: list[Tensor], gradients: list[Tensor]
) -> Gradients:
    """Returns the gradients at the leaves that a term reads, and `None` for the others, to which torch.func gives 0."""
    read = [leaf for term in terms if not evaluation.is_let_go(term) for leaf in _read(evaluation, term)]
    return [
        gradient if any(leaf is other for other in read) else None
        for leaf, gradient in zip(leaves, gradients, strict=True)
    ]


def _with_flags(present: list[Present], flags: list[Tensor]) -> list[Present]:
    """Returns presence with its tensors replaced by those that have left the transform of `torch.func`."""
    remaining = iter(flags)
    return [next(remaining) if isinstance(flag, Tensor) else flag for flag in present]


def balanced(
    evaluate: Evaluate,
    output: Any,
    leaves: list[Tensor],
    parameters: list[Tensor],
    combine: Callable[[list[Tensor], list[Present], Tensor], Combined],
    scale: Tensor | None,
    every: bool,
    feature: Tensor | None = None,
) -> Pass:
    """Computes the gradients of each term, and merges them with weights that depend on their norms.

    Args:
        evaluate: as elsewhere.
        output: as elsewhere.
        leaves: as elsewhere.
        parameters: as elsewhere.
        combine: as elsewhere, with the norms as the third argument, ``[K]``.
        scale: as elsewhere.
        every: as elsewhere.
        feature: a tensor in the model's graph at which the norms are taken. Default: ``None``, at the leaves.
    """
    values, present, rows = _gradients_of_terms(evaluate, output, leaves, parameters, every)
    with torch.no_grad():
        norms = torch.stack([_norm(_at_feature(row, leaves, feature), values[0]) for row in rows])
        with torch.enable_grad():  # by which a weighting knows that it is training
            total, stacked, weights = combine(values, present, norms)
        factors = weights if scale is None else weights * scale
        merged = _Sum(len(leaves) + len(parameters))
        for position, row in enumerate(rows):
            scaled = [None if gradient is None else gradient * factors[position].to(gradient.dtype) for gradient in row]
            merged.add(list(range(len(row))), scaled)
    split = len(leaves)
    return Pass(total, values, stacked, weights, present, merged.sums[:split], merged.sums[split:])


def _gradients_of_terms(
    evaluate: Evaluate, output: Any, leaves: list[Tensor], parameters: list[Tensor], every: bool
) -> tuple[list[Tensor], list[Present], list[Gradients]]:
    if torch.compiler.is_compiling() and not (parameters or torch._dynamo.config.trace_autograd_ops):
        return _functional_gradients_of_terms(evaluate, output, leaves, every)
    copies = [leaf.detach().requires_grad_() for leaf in leaves]
    with torch.enable_grad():
        values, present = evaluate(replaced(output, copies, every)).values()
    rows = [_differentiate(value, [*copies, *parameters], None, retain=True) for value in values]
    return [value.detach() for value in values], present, rows


def _functional_gradients_of_terms(
    evaluate: Evaluate, output: Any, leaves: list[Tensor], every: bool
) -> tuple[list[Tensor], list[Present], list[Gradients]]:
    """Evaluates term by term, since the gradient of one must not depend on another, not even as 0 times NaN."""
    copies = [leaf.detach() for leaf in leaves]
    values: list[Tensor] = []
    presence: list[Present] = []
    rows: list[Gradients] = []
    for term in evaluate(output).plan.terms:
        known: list[Present] = []

        def value_of(
            copies: list[Tensor], term: TermPlan = term, known: list[Present] = known
        ) -> tuple[Tensor, list[Tensor]]:
            (value,), present = evaluate(replaced(output, copies, every)).values([term])
            known.extend(present)
            return value, [flag for flag in present if isinstance(flag, Tensor)]

        row, (value, flags) = torch.func.grad_and_value(value_of, has_aux=True)(copies)
        values.append(value)
        presence.extend(_with_flags(known, flags))
        rows.append(_where_read(evaluate(output), [term], leaves, row))
    return values, presence, rows


def _at_feature(row: Gradients, leaves: list[Tensor], feature: Tensor | None) -> Gradients:
    """Returns the gradients of a term at the leaves, or what they make at a feature of the model."""
    if feature is None:
        return row[: len(leaves)]
    pairs = [(leaf, gradient) for leaf, gradient in zip(leaves, row, strict=False) if gradient is not None]
    if not pairs:
        return []
    roots, seeds = zip(*pairs, strict=True)
    return list(torch.autograd.grad(roots, [feature], seeds, retain_graph=True, allow_unused=True))


def _norm(gradients: Gradients, like: Tensor) -> Tensor:
    squares = [gradient.detach().to(like.dtype).abs().square().sum() for gradient in gradients if gradient is not None]
    return add(squares).sqrt() if squares else torch.zeros_like(like)


def term_by_term(
    evaluate: Evaluate,
    output: Any,
    leaves: list[Any],
    parameters: list[Tensor],
    weights: Tensor,
    scale: Tensor | None,
    every: bool,
    release: Callable[[int], None] | None = None,
) -> Pass:
    """Computes the same in groups of terms, and lets go of each group's graph before the next.

    ``release`` is called with the position of each leaf once no later group reads it.
    """
    copies = [leaf.detach().requires_grad_() for leaf in leaves]
    evaluation = evaluate(replaced(output, copies, every))
    groups = list(_groups(evaluation, copies))
    last = {position: number for number, group in enumerate(groups) for position in group.positions}
    gradients = _Sum(len(copies) + len(parameters))
    values: list[Tensor] = []
    present: list[Present] = []
    for number, group in enumerate(groups):
        places = [*group.positions, *range(len(copies), len(copies) + len(parameters))]
        inputs = [*(copies[position] for position in group.positions), *parameters]
        group_values, group_present, found = _run(evaluation, group, inputs, weights, scale)
        values.extend(group_values)
        present.extend(group_present)
        gradients.add(places, found)
        del inputs, found
        if release is not None:
            for position in group.positions:
                if last[position] == number:
                    copies[position].data = torch.empty(0)  # nobody else holds a copy
                    release(position)
    total, stacked, _ = weighted_sum(values, weights)
    split = len(copies)
    return Pass(total, values, stacked, weights, present, gradients.sums[:split], gradients.sums[split:])


class OfTerm(NamedTuple):
    """What differentiating one term gives, all of it detached."""

    value: Tensor
    present: Present
    leaves: Gradients
    parameters: Gradients


def of_each_term(
    evaluate: Evaluate, output: Any, leaves: list[Tensor], parameters: Sequence[Tensor] = (), every: bool = True
) -> Iterator[OfTerm]:
    """Yields the gradients of each unweighted value at the leaves, and of the criterion's parameters."""
    copies = [leaf.detach().requires_grad_() for leaf in leaves]
    evaluation = evaluate(replaced(output, copies, every))
    for term in evaluation.plan.terms:
        with torch.enable_grad():
            (value,), (present,) = evaluation.values([term])
        evaluation.computed.clear()
        found = _differentiate(value, [*copies, *parameters], None)
        yield OfTerm(value.detach(), present, found[: len(copies)], found[len(copies) :])


class Rows(NamedTuple):
    """The weighted gradients of each term, at the leaves and then of the criterion's parameters; all of it detached."""

    total: Tensor
    present: list[Present]
    rows: list[Gradients]


def _run(
    evaluation: Evaluation, group: _Group, inputs: list[Tensor], weights: Tensor, scale: Tensor | None
) -> tuple[list[Tensor], list[Present], Gradients]:
    with torch.enable_grad():
        values, present = evaluation.values(group.terms)
        total, _, _ = weighted_sum(values, weights[group.start : group.start + len(group.terms)])
    evaluation.computed.clear()
    return [value.detach() for value in values], present, _differentiate(total, inputs, scale)


def _differentiate(total: Tensor, inputs: list[Tensor], scale: Tensor | None, retain: bool = False) -> Gradients:
    if not inputs or not total.requires_grad:
        return [None] * len(inputs)
    seed = None if scale is None else scale.to(total)
    return list(torch.autograd.grad(total, inputs, seed, retain_graph=retain, allow_unused=True))


@final
class _Sum:
    """Sums of gradients, in place from the second on."""

    def __init__(self, count: int) -> None:
        self.sums: Gradients = [None] * count
        self._owned = [False] * count

    def add(self, places: list[int], gradients: Gradients) -> None:
        for place, gradient in zip(places, gradients, strict=True):
            sofar = self.sums[place]
            if gradient is None:
                continue
            if sofar is None:
                self.sums[place] = gradient
            elif self._owned[place]:
                sofar.add_(gradient)
            else:  # autograd may have expanded the first, or given it to another leaf too
                self.sums[place] = sofar + gradient
                self._owned[place] = True


class _Group(NamedTuple):
    """Consecutive terms that are differentiated together, and the positions of the leaves that they read."""

    start: int
    terms: tuple[TermPlan, ...]
    positions: tuple[int, ...]


def _groups(evaluation: Evaluation, copies: list[Tensor]) -> Iterator[_Group]:
    numbers = {id(copy): position for position, copy in enumerate(copies)}
    plan = evaluation.plan
    start = 0
    positions: dict[int, None] = {}
    for end, (term, is_boundary) in enumerate(zip(plan.terms, plan.boundaries, strict=True), 1):
        for tensor in _read(evaluation, term):
            if id(tensor) in numbers:
                positions[numbers[id(tensor)]] = None
        size = sum(copies[position].nbytes for position in positions)
        if end == len(plan.terms) or (is_boundary and size >= _CHUNK):
            yield _Group(start, plan.terms[start:end], tuple(positions))
            start, positions = end, {}


def _read(evaluation: Evaluation, term: TermPlan) -> list[Tensor]:
    try:
        reads = (*term.reads, *term.masking, *term.counted)
        return [leaf for captures in evaluation.captures(term) for leaf in evaluation.output_leaves(reads, captures)]
    except PathLossError:
        evaluation.values([term])  # raises the same with the term's name
        raise


def into_model(tensors: Sequence[Tensor | GradientEdge], gradients: Gradients, gives_away: bool = True) -> None:
    """Runs the model's backward from its outputs, and accumulates the criterion's own gradients on the way.

    Empties the list of gradients: a leaf takes one over as its ``.grad`` if nobody else holds it, and copies it if not.
    With ``gives_away`` nobody holds it; memory that is written again must be copied.
    """
    roots: list[Any] = [root for root, gradient in zip(tensors, gradients, strict=True) if gradient is not None]
    given = [gradient for gradient in gradients if gradient is not None]
    gradients.clear()
    if gives_away and all(map(torch.is_tensor, roots)) and any(root.is_leaf for root in roots):
        with torch.enable_grad():
            root = _Given.apply(given, *roots)  # type: ignore[no-untyped-call]
        torch.autograd.backward(root, torch.empty_like(root))
    elif roots:
        torch.autograd.backward(roots, given)


@final
class _Given(torch.autograd.Function):
    """A node whose gradients are known. `torch.autograd.backward` would hold them while it hands them on."""

    @staticmethod
    def forward(ctx: Any, given: list[Tensor], *roots: Tensor) -> Tensor:
        ctx.given = given
        return roots[0].new_empty(())

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, _: Tensor) -> tuple[Tensor | None, ...]:
        given = tuple(ctx.given)
        ctx.given.clear()
        return (None, *given)


@final
class GradientInForward(torch.autograd.Function):
    """A total whose gradients are known when it is: backward multiplies them by the incoming gradient, once."""

    @staticmethod
    def forward(ctx: Any, compute: Callable[[], tuple[Tensor, list[Tensor | None]]], *inputs: Tensor) -> Tensor:
        total, gradients = compute()
        ctx.given = [gradient is not None for gradient in gradients]
        ctx.save_for_backward(*(gradient for gradient in gradients if gradient is not None))
        return total

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *incoming: Tensor) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors
        scaled = iter(torch._foreach_mul(saved, incoming[0]) if saved else ())
        return (None, *(next(scaled) if given else None for given in ctx.given))
