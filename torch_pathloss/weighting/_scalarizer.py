"""Other libraries' rules as weightings."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import final

import torch
from torch import Tensor, nn

from torch_pathloss._errors import ArgumentError, CriterionReturnError
from torch_pathloss._term import FunctionCriterion, Present, callable_name
from torch_pathloss.weighting._base import Weighted, Weighting


@final
class Scalarizer(Weighting):
    """A module or function ``[K] values -> scalar``, such as a Scalarizer of TorchJD, as a weighting.

    The container makes one of what it is given as ``weighting=``. The values are multiplied by the weights that the
    user set first. A rule that knows nothing of absent terms would take their 0 for a perfect loss, so a call with an
    absent term is refused. The effective weights are the derivative of the total; in compiled code, where it would be
    computed for this alone, and without gradients they are recorded as NaN.

    Args:
        rule: the module or function.

    Examples:
        >>> import torch
        >>> from torch import nn
        >>> from torch_pathloss import PathLossModule
        >>> criterion = PathLossModule({"a": nn.L1Loss(), "b": nn.L1Loss()}, weighting=lambda values: values.amax())
        >>> output = {"a": torch.ones(2), "b": torch.full((2,), 3.0)}
        >>> criterion(output, {"a": torch.zeros(2), "b": torch.zeros(2)})
        tensor(3.)
    """

    def __init__(self, rule: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.rule = rule if isinstance(rule, nn.Module) else FunctionCriterion(rule)

    def setup(self, names: tuple[str, ...]) -> None:
        pass

    def check_present(self, present: Sequence[Present]) -> None:
        missing = [repr(name) for name, flag in zip(self._names, present, strict=True) if flag is not True]
        if missing:
            raise ArgumentError(
                f"The weighting {callable_name(self.rule)} needs every term, but {', '.join(missing)} "
                f"{'is' if len(missing) == 1 else 'are'} absent or may be (where=). "
                "Use a weighting of torch_pathloss.weighting, which leaves absent terms out."
            )

    def forward(
        self, values: Tensor, seen: Tensor, weights: Tensor | None = None, norms: Tensor | None = None
    ) -> Weighted:
        total = self.rule(values if weights is None else values * weights)
        if not isinstance(total, Tensor) or total.ndim != 0:
            found = f"a tensor of shape {tuple(total.shape)}" if isinstance(total, Tensor) else repr(total)
            raise CriterionReturnError(f"The weighting {callable_name(self.rule)} returned {found}, not a scalar.")
        if torch.compiler.is_compiling() or not values.requires_grad:
            return Weighted(total, torch.full_like(values, torch.nan).detach())
        (effective,) = torch.autograd.grad(total, values, retain_graph=True, allow_unused=True)
        return Weighted(total, torch.zeros_like(values) if effective is None else effective.detach())
