r"""Jacobian descent with TorchJD: gradients of terms that an aggregator combines, instead of their sum.

TorchJD goes backward once for each loss, from the loss to the parameters. Here the losses end at the outputs: their
gradients there are computed first, and then go through the model as ``jac_tensors``. So the criterion may be anything,
and a compiled model works too.

References:
    Quinton and Rey, Jacobian Descent for Multi-Objective Optimization, 2024, arXiv:2406.16232.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor
from torch.autograd.graph import Node

from torch_pathloss import _backward, _extras
from torch_pathloss._errors import ArgumentError
from torch_pathloss._module import PathLossModule

Absent: TypeAlias = Literal["zero", "drop"]

_Edge: TypeAlias = tuple[Node, int]


def backward(
    criterion: PathLossModule,
    output: Any,
    target: Any = None,
    *,
    aggregator: Any,
    input: Any = None,
    sample_weight: Any = None,
    features: Tensor | Iterable[Tensor] | None = None,
    absent: Absent = "zero",
    parallel_chunk_size: int | None = 1,
) -> Tensor:
    r"""Does what ``criterion.backward(output, target)`` does, but with an aggregator of TorchJD in place of the sum.

    With :math:`J` the matrix that has in row :math:`k` the gradient :math:`w_k \, \partial v_k / \partial \theta` of
    weight times value of term :math:`k`, and :math:`\mathcal{A}` the aggregator, :math:`\mathcal{A}(J)` is added to the
    ``.grad`` of the parameters :math:`\theta`, which are those behind the output, or behind the ``features``. Behind
    the heads, between the features and the output, and in the criterion, it is the sum of the rows as usual.

    It equals ``torchjd.autojac.backward``, or ``mtl_backward`` with ``features``, on the list of weights times values,
    followed by ``jac_to_grad``. `PathLossModule.last` is written, as in a call.

    Args:
        criterion: the container, without a weighting.
        output: the model's output, still in its graph.
        target: as in a call.
        aggregator: a ``torchjd.aggregation.Aggregator``, called with one row for each term in declared order.
        input: as in a call.
        sample_weight: as in a call.
        features: the shared representation from which the heads compute the output, a tensor or several. Default:
            ``None``, which aggregates over all parameters.
        absent: what an absent term has for a row. ``"zero"``: a row of zeros, so that the number of a row is that of
            its term, as a preference vector and the state of an aggregator need it. ``"drop"``: none, for aggregators
            that a row of zeros would stop: with one, the minimum-norm combination of ``MGDA`` is zero. A term whose
            ``where`` selects nothing has a row of zeros in both. Default: ``"zero"``.
        parallel_chunk_size: how many rows go through the model at once, by `torch.vmap`; ``None`` is all. More than one
            does not work with a compiled model. Default: 1.

    Returns:
        The total, the sum of weights times values, detached.

    Raises:
        MissingPackageError: if TorchJD is not installed.
        ArgumentError: if the criterion has a weighting, ``aggregator`` is none, the output has no graph, or the
            features are not between all of its parameters and the output.
        The errors of a call.

    Note:
        Gradients are not reduced by DistributedDataParallel, whose hooks do not run.

    Examples:
        >>> import torch
        >>> from torch import nn
        >>> from torch_pathloss import PathLossModule
        >>> from torch_pathloss.integrations import torchjd
        >>> from torchjd.aggregation import MGDA
        >>> criterion = PathLossModule({"a": nn.L1Loss(), "b": nn.L1Loss()}, weights={"b": 4.0})
        >>> x = torch.tensor([[3.0, 1.0]], requires_grad=True)
        >>> output = {"a": x[:, 0], "b": x[:, 1]}
        >>> torchjd.backward(criterion, output, {"a": torch.zeros(1), "b": torch.zeros(1)}, aggregator=MGDA())
        tensor(7.)
        >>> x.grad  # the shortest mean of the rows (1, 0) and (0, 4)
        tensor([[0.9412, 0.2353]])
    """
    autojac = _extras.needed("torchjd.autojac", by="torch_pathloss.integrations.torchjd", extra="torchjd")
    _check(criterion, aggregator, absent)
    _, leaves = _backward.leaves_of(output, every=False)
    own = criterion._trained_parameters(criterion._further(output, target, input, sample_weight))
    found = criterion._weighted_gradients(output, target, input, sample_weight, leaves, own)
    tensors, rows = _distinct(leaves, [row[: len(leaves)] for row in found.rows])
    if not tensors:
        raise ArgumentError(
            "No term depends on a tensor of the output that requires grad, so there is nothing to aggregate. "
            "Compute the output with gradients enabled."
        )
    own_gradients = _sums([row[len(leaves) :] for row in found.rows], len(own))
    merged = _sums(rows, len(tensors))
    if absent == "drop":
        rows = [row for row, seen in zip(rows, found.present, strict=True) if seen is not False]
    if not rows:
        _backward.into_model([*tensors, *own], [*merged, *own_gradients], gives_away=True)  # zeros
        return found.total
    jacobians = [_stacked(tensor, [row[position] for row in rows]) for position, tensor in enumerate(tensors)]
    if features is None:
        parameters, _ = _behind(tensors)
    else:
        shared = [features] if isinstance(features, Tensor) else list(features)
        heads, parameters = _split(tensors, shared)
        jacobians = autojac.jac(
            tensors, shared, jac_outputs=jacobians, retain_graph=True, parallel_chunk_size=parallel_chunk_size
        )
        if heads:
            torch.autograd.backward(tensors, merged, inputs=heads, retain_graph=True)
        tensors = shared
    autojac.backward(tensors, jac_tensors=jacobians, inputs=parameters, parallel_chunk_size=parallel_chunk_size)
    autojac.jac_to_grad(parameters, aggregator)
    _backward.into_model(own, own_gradients, gives_away=True)
    return found.total


def _check(criterion: PathLossModule, aggregator: Any, absent: str) -> None:
    aggregation = _extras.needed("torchjd.aggregation", by="torch_pathloss.integrations.torchjd", extra="torchjd")
    if not isinstance(aggregator, aggregation.Aggregator):
        raise ArgumentError(
            f"aggregator must be a torchjd.aggregation.Aggregator, such as UPGrad(), not {type(aggregator).__name__}."
        )
    if criterion.weighting is not None:
        raise ArgumentError(
            f"The criterion has the weighting {type(criterion.weighting).__name__}, and an aggregator is another one. "
            "Build the criterion without weighting=."
        )
    if absent not in ("zero", "drop"):
        raise ArgumentError(f"absent must be one of 'zero', 'drop', not {absent!r}.")
    stateful = _extras.needed("torchjd", by="torch_pathloss.integrations.torchjd", extra="torchjd").Stateful
    if absent == "drop" and any(isinstance(module, stateful) for module in aggregator.modules()):
        raise ArgumentError(
            f"{type(aggregator).__name__} keeps state for each row, which would belong to other terms once the row of "
            'an absent one is dropped. Pass absent="zero".'
        )


def _distinct(leaves: list[Tensor], rows: list[list[Tensor | None]]) -> tuple[list[Tensor], list[list[Tensor | None]]]:
    """Returns the leaves that a term depends on, each once, with its gradients in each row."""
    places: dict[int, list[int]] = {}
    for position, leaf in enumerate(leaves):
        if any(row[position] is not None for row in rows):
            places.setdefault(id(leaf), []).append(position)
    return (
        [leaves[positions[0]] for positions in places.values()],
        [[_sum([row[position] for position in positions]) for positions in places.values()] for row in rows],
    )


def _sums(rows: list[list[Tensor | None]], count: int) -> list[Tensor | None]:
    return [_sum([row[position] for row in rows]) for position in range(count)]


def _sum(gradients: Sequence[Tensor | None]) -> Tensor | None:
    given = [gradient for gradient in gradients if gradient is not None]
    return sum(given[1:], given[0]) if given else None


def _stacked(tensor: Tensor, gradients: list[Tensor | None]) -> Tensor:
    return torch.stack([torch.zeros_like(tensor) if gradient is None else gradient for gradient in gradients])


def _split(tensors: list[Tensor], features: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """Returns the parameters of the heads, and those behind the features."""
    for position, feature in enumerate(features):
        if not isinstance(feature, Tensor) or feature.grad_fn is None:
            raise ArgumentError(f"features[{position}] must be a tensor that the model computed, still in its graph.")
    heads, reached = _behind(tensors, features)
    if missed := [position for position, feature in enumerate(features) if _edge(feature) not in reached]:
        raise ArgumentError(
            f"The output does not depend on features[{missed[0]}]. Pass the tensor that the heads were called with, "
            "not a copy; where the model is compiled, compile what is before the features and the heads apart."
        )
    parameters, _ = _behind(features)
    behind = {id(parameter) for parameter in parameters}
    both = [head for head in heads if id(head) in behind]
    if both:
        raise ArgumentError(
            f"{len(both)} parameters are behind the features and beside them, the first of shape "
            f"{tuple(both[0].shape)}. Pass every feature that the heads share, or leave features out; where the model "
            "is compiled, compile what is before the features and the heads apart."
        )
    return heads, parameters


def _behind(tensors: Iterable[Tensor], without: Iterable[Tensor] = ()) -> tuple[list[Tensor], set[_Edge]]:
    """Returns the leaves of the graph behind tensors, and which of the tensors ``without`` the walk stopped at."""
    stops = {_edge(tensor) for tensor in without}
    found: dict[int, Tensor] = {}
    reached: set[_Edge] = set()
    seen: set[Node] = set()
    edges: deque[Any] = deque()
    for tensor in tensors:
        if tensor.grad_fn is None:
            found[id(tensor)] = tensor
        else:
            edges.append(_edge(tensor))
    while edges:
        node, number = edges.popleft()
        if (node, number) in stops:
            reached.add((node, number))
        elif node is not None and node not in seen:
            seen.add(node)
            if hasattr(node, "variable"):  # where gradients are accumulated
                found[id(node.variable)] = node.variable
            edges.extend(node.next_functions)
    return list(found.values()), reached


def _edge(tensor: Tensor) -> _Edge:
    assert tensor.grad_fn is not None
    return tensor.grad_fn, tensor.output_nr
