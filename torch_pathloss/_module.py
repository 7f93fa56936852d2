"""`PathLossModule`: the container."""

from __future__ import annotations

from typing import Any, final

import torch
from torch import Tensor, nn

from torch_pathloss import _inspect
from torch_pathloss._errors import CheckError, ConstructionError, PathLossError
from torch_pathloss._evaluate import Evaluation
from torch_pathloss._inspect import UNCOVERED, Explanation, Uncovered
from torch_pathloss._last import Last
from torch_pathloss._plan import bind
from torch_pathloss._term import callable_name
from torch_pathloss._weights import Weights, weighted_sum


@final
class PathLossModule(nn.Module):
    r"""One criterion for a model with a nested output: a weighted sum of criteria, each at a path.

    With :math:`v_k` the value of term :math:`k` (see `Term`) and :math:`w_k` its weight, the total is

    .. math::
        L = \sum_{k=1}^{K} w_k v_k

    where :math:`k` runs over the terms in the order in which they were declared. A term is *absent* in a call, and
    adds 0, when a node that it reads in the output or the target is `None` or its pattern matches nothing.

    Args:
        losses: a mapping from paths to criteria, or a nested structure that mirrors the output (mappings, lists,
            tuples, namedtuples, `None` for no loss), or both mixed. One bare criterion stands at the root. A criterion
            is a module, any callable, or a `Term`.
        weights: the weights :math:`w_k`, by name of the term, as floats or 0-dim tensors; flat or nested as
            ``losses``. Default: the weight of the `Term`, which is 1.0 by default.
        uncovered: what to do with tensors of the output that no term reaches: ``"ignore"``, ``"warn"`` (once for
            each set of them; not in compiled code) or ``"error"``. Default: ``"ignore"``.

    Shape:
        - output, target, input: any tree of mappings, sequences, namedtuples, dataclasses, attributes.
        - Returns: scalar, at least float32.

    Raises:
        ConstructionError: listing every problem: a path that cannot be parsed or is given twice, a value that is not
            callable, a weight for a term that does not exist, sources that do not fit a criterion, no terms.

    Attributes:
        weights: the weights by name; ``criterion.weights["detection.bbox"] = 0.3`` writes in place. See `Weights`.
        last: values, weights and total of the latest call, detached. See `Last`.

    Examples:
        >>> import torch
        >>> from torch import nn
        >>> from torch_pathloss import PathLossModule
        >>> criterion = PathLossModule(
        ...     {
        ...         "classification": nn.CrossEntropyLoss(),
        ...         "detection.bbox": nn.SmoothL1Loss(),
        ...         "detection.confidence": nn.BCEWithLogitsLoss(),
        ...     },
        ...     weights={"detection.bbox": 5.0},
        ... )
        >>> output = {
        ...     "classification": torch.zeros(2, 4, requires_grad=True),
        ...     "detection": {"bbox": torch.zeros(2, 4), "confidence": torch.zeros(2)},
        ... }
        >>> target = {
        ...     "classification": torch.tensor([0, 3]),
        ...     "detection": {"bbox": torch.ones(2, 4), "confidence": torch.ones(2)},
        ... }
        >>> loss = criterion(output, target)
        >>> loss.backward()
        >>> round(loss.item(), 4)  # ln 4 + 5 * 0.5 + ln 2
        4.5794
    """

    weights: Weights
    last: Last

    def __init__(self, losses: Any, *, weights: Any = None, uncovered: Uncovered = "ignore") -> None:
        super().__init__()
        if uncovered not in UNCOVERED:
            raise ConstructionError(f"uncovered must be one of {', '.join(map(repr, UNCOVERED))}, not {uncovered!r}.")
        bound = bind(losses, weights)
        self._plan = bound.plan
        self._uncovered: Uncovered = uncovered
        self._warned: set[tuple[str, ...]] = set()
        for name, module in bound.modules.items():
            self.add_module(name, module)
        for name, tensor in bound.tensors.items():
            if isinstance(tensor, nn.Parameter):
                self.register_parameter(name, tensor)
            else:
                self.register_buffer(name, tensor, persistent=False)
        self.weights = Weights(bound.names, bound.weights)
        self.last = Last(bound.names)

    def forward(self, output: Any, target: Any = None, *, input: Any = None, sample_weight: Any = None) -> Tensor:
        """Returns the total.

        Args:
            output: the model's output.
            target: the tree of references, addressed by the same paths. Further keys in it do no harm.
            input: the model's input or the whole batch, for sources `Input`.
            sample_weight: a tensor for every term, or a tree of tensors by name or path of a term; its first dimensions
                are those of the unreduced result. Every term that it concerns needs a ``reduction``.

        Raises:
            PathNotFoundError: if a path does not exist in a tree.
            CriterionReturnError: if a criterion does not return a scalar and its term has no ``reduction``.
            ArgumentError: if shapes, devices or sample weights do not fit.
            UncoveredError: if a leaf is uncovered and the module was built with ``uncovered="error"``.
        """
        modules = self._modules
        weights: Tensor = modules["weights"]._buffers["value"]  # type: ignore[assignment, union-attr]
        evaluation = Evaluation(self._plan, self, (output, target, input), sample_weight, weights.device)
        if self._uncovered != "ignore" and not (self._uncovered == "warn" and torch.compiler.is_compiling()):
            _inspect.report_uncovered(evaluation, self._uncovered, self._warned)
        values, present = evaluation.values()
        total, stacked = weighted_sum(values, weights)
        modules["last"].write(values, stacked, present, weights, total)  # type: ignore[union-attr, operator]
        return total

    def terms(
        self, output: Any, target: Any = None, *, input: Any = None, sample_weight: Any = None
    ) -> dict[str, Tensor]:
        """Returns the unweighted value of each term by name, differentiable, in declared order; 0 for an absent one.

        The arguments and errors are those of a call, of which this is the same computation. `last` is not written.
        """
        values, _ = self._evaluation(output, target, input, sample_weight).values()
        return dict(zip(self.weights, values, strict=True))

    def explain(self, output: Any, target: Any = None, *, input: Any = None, sample_weight: Any = None) -> Explanation:
        """Returns the output's tree, one line a leaf, with the terms that reach it.

        Leaves that no term reaches and leaves that several terms reach are marked. Below stand the terms with their
        criteria, weights and sources, and what is absent or does not fit. A string; rich prints it in colours.
        """
        evaluation = self._evaluation(output, target, input, None)
        return _inspect.explain(evaluation, self.weights.value.tolist())

    def check(self, output: Any, target: Any = None, *, input: Any = None, sample_weight: Any = None) -> None:
        """Raises on everything that a call could raise on, in one message.

        Run it once before `torch.compile`, which hides messages. Buffers and random numbers are left as they were.

        Raises:
            CheckError: listing every problem.
        """
        try:
            evaluation = self._evaluation(output, target, input, sample_weight)
        except PathLossError as error:
            raise CheckError(str(error)) from None
        _inspect.check(evaluation, self._uncovered)

    def check_optimizer(self, optimizer: torch.optim.Optimizer) -> None:
        """Raises if a parameter of the criterion is not trained by the optimizer.

        Raises:
            CheckError: naming the parameters.
        """
        _inspect.check_optimizer(self, optimizer)

    def _evaluation(self, output: Any, target: Any, input: Any, sample_weight: Any) -> Evaluation:
        return Evaluation(self._plan, self, (output, target, input), sample_weight, self.weights.value.device)

    def __repr__(self) -> str:
        weights = self.weights.value.tolist()
        rows = [
            [
                f"({_inspect.shown_name(term.name)}):",
                callable_name(self.get_submodule(term.call.child)),
                f"weight {weight:g}",
                term.sources,
            ]
            for term, weight in zip(self._plan.terms, weights, strict=True)
        ]
        lines = "".join(f"\n  {line}" for line in _inspect.columns(rows))
        return f"{type(self).__name__}({lines}\n)"
