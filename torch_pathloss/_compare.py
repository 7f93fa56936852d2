"""Comparing the terms of a criterion by their gradients: at the outputs, or behind them in the model."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor

from torch_pathloss import _paths, _tree
from torch_pathloss._backward import Evaluate, leaves_of, of_each_term, replaced
from torch_pathloss._conflicts import Conflicts
from torch_pathloss._errors import ArgumentError
from torch_pathloss._inspect import unchanged

Wrt: TypeAlias = Tensor | Iterable[Tensor] | str | None
"""What gradients are taken by: `None` for the outputs."""


@dataclass(frozen=True)
class _Gradients:
    """What each of the terms gives: presence, gradients where they were asked for, gradients at the output leaves."""

    present: list[Any]
    at: list[list[Tensor | None]]
    paths: list[str]
    leaves: list[Tensor]
    at_leaves: list[list[Tensor | None]]


def compare(evaluate: Evaluate, output: Any, wrt: Wrt, weights: Tensor, threshold: float) -> Conflicts:
    """Differentiates each term by itself and compares the gradients; reads from the device once.

    Raises:
        ArgumentError: if ``wrt`` is nothing that a term depends on, or the threshold is no cosine.
    """
    if not -1 <= threshold <= 1:
        raise ArgumentError(f"threshold must be a cosine, from -1 to 1, not {threshold!r}.")
    evaluation = evaluate(output)
    with unchanged(evaluation.container):
        found = _at_outputs(evaluate, output) if wrt is None else _through_the_model(evaluate, output, wrt)
    names = tuple(term.name for term in evaluation.plan.terms)
    present, scales, gram, factors = _read(found, weights)
    lengths = gram.diagonal().sqrt()
    norms = (scales * lengths).tolist()
    signs = torch.where(factors < 0, -1.0, 1.0).to(gram)
    cosines = (gram * signs.outer(signs) / lengths.outer(lengths)).clamp(-1, 1)
    absent = tuple(name for name, seen in zip(names, present, strict=True) if not seen)
    opposing = [
        (names[row], names[column], cosine)
        for row in range(len(names))
        for column in range(row + 1, len(names))
        if (cosine := float(cosines[row, column])) < threshold
    ]
    return Conflicts(
        names,
        "the outputs" if wrt is None else _described(wrt, found.at),
        dict(zip(names, factors.tolist(), strict=True)),
        {n: norm if seen else math.nan for n, norm, seen in zip(names, norms, present, strict=True)},
        cosines,
        threshold,
        tuple(sorted(opposing, key=lambda pair: pair[2])),
        tuple(n for n, norm, seen in zip(names, norms, present, strict=True) if seen and norm == 0),
        absent,
        _counted_twice(found, names, absent),
    )


def _at_outputs(evaluate: Evaluate, output: Any) -> _Gradients:
    paths, leaves = leaves_of(output, every=True)
    terms = list(of_each_term(evaluate, output, leaves))
    at_leaves = [term.leaves for term in terms]
    return _Gradients(
        [term.present for term in terms],
        [_merged(leaves, gradients) for gradients in at_leaves],
        [_paths.format(path) for path in paths],
        leaves,
        at_leaves,
    )


def _through_the_model(evaluate: Evaluate, output: Any, wrt: Any) -> _Gradients:
    """Differentiates by tensors behind the output. The model's graph stays, and no ``.grad`` is touched."""
    tensors = _tensors_of(wrt, output)
    paths, leaves = leaves_of(output, every=False)
    present, at, at_leaves = [], [], []
    with torch.enable_grad():
        # What a term reads directly is told from what it reaches through the model by a node between the two.
        copies = [leaf.view_as(leaf) for leaf in leaves]
        evaluation = evaluate(replaced(output, copies, every=False))
        for term in evaluation.plan.terms:
            (value,), (seen,) = evaluation.values([term])
            inputs = [*tensors, *copies]
            found: Sequence[Tensor | None] = [None] * len(inputs)
            if value.requires_grad:
                found = torch.autograd.grad(value, inputs, retain_graph=True, allow_unused=True)
            present.append(seen)
            at.append(list(found[: len(tensors)]))
            at_leaves.append(list(found[len(tensors) :]))
    is_computed = any(seen is not False for seen in present)
    if is_computed and all(gradient is None for gradients in at for gradient in gradients):
        raise ArgumentError(
            "No term depends on a tensor of wrt. Pass a tensor that the output was computed from, not a copy, with "
            "gradients enabled; of a model that is compiled as a whole, only parameters and inputs."
        )
    return _Gradients(present, at, [_paths.format(path) for path in paths], leaves, at_leaves)


def _tensors_of(wrt: Any, output: Any) -> list[Tensor]:
    """Returns the tensors that gradients are taken by, each once, without frozen parameters."""
    if isinstance(wrt, str):
        wrt = _tree.tensors(_tree.walk(output, _paths.parse(wrt), "output"))
    try:
        tensors = [wrt] if isinstance(wrt, Tensor) else list(wrt)
    except TypeError:
        tensors = [wrt]
    for tensor in tensors:
        if not isinstance(tensor, Tensor):
            raise ArgumentError(
                f"wrt must be a tensor, an iterable of tensors or a path of the output, but holds "
                f"{_tree.describe(tensor)}. For the parameters of a module pass module.parameters()."
            )
    found = {id(tensor): tensor for tensor in tensors if tensor.requires_grad}
    if not found:
        raise ArgumentError("No tensor of wrt requires grad, so there is no gradient to take by it.")
    return list(found.values())


def _described(wrt: Any, at: list[list[Tensor | None]]) -> str:
    if isinstance(wrt, str):
        return f"the output node {wrt!r}"
    if isinstance(wrt, Tensor):
        return f"a tensor of shape {tuple(wrt.shape)}"
    return f"{len(at[0])} tensors" if len(at[0]) > 1 else "a tensor"


def _merged(leaves: list[Tensor], gradients: list[Tensor | None]) -> list[Tensor | None]:
    """Adds up the gradients of a tensor that stands at several places of the output."""
    sums: dict[int, Tensor | None] = dict.fromkeys(map(id, leaves))
    for leaf, gradient in zip(leaves, gradients, strict=True):
        if gradient is not None:
            sofar = sums[id(leaf)]
            sums[id(leaf)] = gradient if sofar is None else sofar + gradient
    return list(sums.values())


def _read(found: _Gradients, weights: Tensor) -> tuple[list[bool], Tensor, Tensor, Tensor]:
    """Returns what is present, scales, the Gram matrix of the scaled gradients, and the weights, read in one copy."""
    device, count = weights.device, len(found.at)
    dense = [[None if g is None else _dense(g) for g in gradients] for gradients in found.at]
    dtype = torch.float32
    for gradient in (g for gradients in dense for g in gradients if g is not None):
        dtype = torch.promote_types(dtype, gradient.dtype)
    scales = torch.stack([_largest(gradients, dtype, device) for gradients in dense])
    gram = torch.zeros(count, count, dtype=dtype, device=device)
    for position in range(len(dense[0])):
        terms = [k for k in range(count) if dense[k][position] is not None]
        if not terms:
            continue
        # Scaled, since the square of a gradient of 1e-23 is 0 in float32.
        rows = torch.stack([_flat(dense[k][position], scales[k], dtype) for k in terms])
        places = torch.tensor(terms, device=device)
        gram[places[:, None], places] += (rows @ rows.T).to(device)
    present = torch.stack([torch.as_tensor(seen, device=device) for seen in found.present])
    read = torch.cat([gram.flatten(), scales, present.to(dtype), weights.to(dtype)]).cpu().double()
    square, scales, seen, factors = torch.split(read, [count * count, count, count, count])
    return [bool(flag) for flag in seen.tolist()], scales, square.view(count, count), factors


def _dense(gradient: Tensor) -> Tensor:
    gradient = gradient.to_dense() if gradient.layout is not torch.strided else gradient
    return torch.view_as_real(gradient) if gradient.is_complex() else gradient


def _largest(gradients: list[Tensor | None], dtype: torch.dtype, device: torch.device) -> Tensor:
    largest = [g.abs().amax().to(device, dtype) for g in gradients if g is not None and g.numel()]
    return torch.stack(largest).amax() if largest else torch.zeros((), dtype=dtype, device=device)


def _flat(gradient: Tensor | None, scale: Tensor, dtype: torch.dtype) -> Tensor:
    assert gradient is not None
    return gradient.reshape(-1).to(dtype) / torch.where(scale == 0, 1, scale).to(gradient.device)


def _counted_twice(found: _Gradients, names: tuple[str, ...], absent: tuple[str, ...]) -> dict[str, tuple[str, ...]]:
    reached: dict[int, list[str]] = {}
    for name, gradients in zip(names, found.at_leaves, strict=True):
        for leaf, gradient in zip(found.leaves, gradients, strict=True):
            terms = reached.setdefault(id(leaf), [])
            if gradient is not None and name not in absent and name not in terms:
                terms.append(name)
    shared = {path: reached[id(leaf)] for path, leaf in zip(found.paths, found.leaves, strict=True)}
    return {path: tuple(terms) for path, terms in shared.items() if len(terms) > 1}
