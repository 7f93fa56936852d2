"""Gradient norms that follow the rates at which the terms train."""

from __future__ import annotations

import math
from typing import ClassVar, final

import torch
from torch import Tensor

from torch_pathloss import _paths
from torch_pathloss._errors import ConstructionError, listed
from torch_pathloss._paths import Path
from torch_pathloss.weighting._base import Weighted, Weighting, over_ranks, pinned


@final
class GradNorm(Weighting):
    r"""Moves the weights until a term that trains slowly has a larger gradient, and one that trains fast a smaller.

    With :math:`n_k` the norm of the gradient of the value :math:`v_k`, the total is :math:`L = \sum_k w_k f_k v_k` and
    after each call the factors take a step down the gradient of

    .. math::
        \sum_{k \in S} \left| f_k n_k - \bar G \, r_k^\alpha \right|, \qquad
        \bar G = \frac{1}{|S|} \sum_{k \in S} f_k n_k, \qquad
        r_k = \frac{v_k / v_k(0)}{\frac{1}{|S|} \sum_{j \in S} v_j / v_j(0)}

    in which :math:`\bar G r_k^\alpha` counts as constant, and are then scaled so that their sum over the terms that are
    seen stays what it was: :math:`K` if all are.

    where

    - :math:`f_k` are the factors, 1 at the start,
    - :math:`w_k` is the weight that the user set: once the norms are balanced, the gradient of term :math:`k` has
      :math:`w_k` times its share,
    - :math:`v_k(0)` is the first finite value of the term, which must be positive,
    - :math:`S` are the terms that are seen; :math:`f_k` of the others does not move.

    The paper takes the norms at the last shared layer. Here they are taken at the leaves of the output, which costs
    little, is one graph when compiled, and leaves out what the heads do to the gradient; or at a ``feature`` of the
    model, which the output has to hold, with a run through the heads for each term.

    A factor is kept at :math:`10^{-3}` or more, since the step of the paper may make one negative, which would turn a
    term around. Public implementations differ in this, and many move the weights by Adam; this is the plain step of the
    paper's Algorithm 1.

    Args:
        alpha: :math:`\alpha`, how strongly the terms are drawn to one rate; 0 makes the norms equal. Default: 1.5
            (the paper, for NYUv2).
        lr: the length of the step. Default: 0.025 (the paper).
        feature: the path in the output of a tensor of the model's graph, such as the shared representation, at which
            the norms are taken. Not in compiled code. Default: ``None``, the leaves of the output.

    Shape:
        ``[K]`` values and norms; a 0-dim total.

    Raises:
        ConstructionError: if ``alpha`` or ``lr`` is negative or not finite.

    Examples:
        >>> import torch
        >>> from torch import nn
        >>> from torch_pathloss import PathLossModule
        >>> from torch_pathloss.weighting import GradNorm
        >>> criterion = PathLossModule({"a": nn.MSELoss(), "b": nn.MSELoss()}, weighting=GradNorm(alpha=0.0, lr=0.005))
        >>> output = {"a": torch.ones(2), "b": torch.full((2,), 3.0)}
        >>> target = {"a": torch.zeros(2), "b": torch.zeros(2)}
        >>> for _ in range(200):
        ...     _ = criterion.value_and_grad(output, target)
        >>> bool((criterion.weighting.factor - torch.tensor([1.5, 0.5])).abs().max() < 0.1)  # b has thrice the gradient
        True

    References:
        Chen, Badrinarayanan, Lee and Rabinovich, GradNorm: Gradient Normalization for Adaptive Loss Balancing in Deep
        Multitask Networks, ICML 2018, section 3 and Algorithm 1.
    """

    uses_gradients: ClassVar[bool] = True

    factor: Tensor
    first_value: Tensor
    has_value: Tensor

    def __init__(self, alpha: float = 1.5, *, lr: float = 0.025, feature: str | Path | None = None) -> None:
        super().__init__()
        given = {"alpha": alpha, "lr": lr}
        problems = [f"{name} must be finite and not negative, not {value!r}." for name, value in given.items()
                    if not (math.isfinite(value) and value >= 0)]  # fmt: skip
        if problems:
            raise ConstructionError(f"GradNorm cannot be built:{listed(problems)}")
        self.alpha = alpha
        self.lr = lr
        self.feature: Path | None = None if feature is None else _paths.parse(feature)

    def setup(self, names: tuple[str, ...]) -> None:
        self.register_buffer("factor", torch.ones(len(names)))
        self.register_buffer("first_value", torch.zeros(len(names)))
        self.register_buffer("has_value", torch.zeros(len(names), dtype=torch.bool))

    def forward(
        self, values: Tensor, seen: Tensor, weights: Tensor | None = None, norms: Tensor | None = None
    ) -> Weighted:
        update = self.updates()
        with torch.no_grad():
            effective = pinned(torch.where(seen, self.factor if weights is None else self.factor * weights, 0))
            if update and norms is not None:
                self._move(values.detach(), seen, norms)
        return Weighted((values * effective).sum(), effective)

    def _move(self, values: Tensor, seen: Tensor, norms: Tensor) -> None:
        finite = seen & values.isfinite() & norms.isfinite()
        values, known = over_ranks(values, finite)
        norms, _ = over_ranks(norms, finite)
        self.first_value.copy_(torch.where(known & ~self.has_value, values, self.first_value))
        self.has_value.logical_or_(known)
        count = known.sum().clamp(min=1)
        balanced = torch.where(known, self.factor * norms, 0)
        ratio = torch.where(known & (self.first_value > 0), values / self.first_value, 0).clamp(min=0)
        mean_ratio = ratio.sum() / count
        rate = torch.where(mean_ratio > 0, ratio / mean_ratio, 1)
        aim = balanced.sum() / count * rate**self.alpha
        moved = (self.factor - self.lr * torch.sign(balanced - aim) * norms).clamp(min=1e-3)
        moved = torch.where(known, moved, self.factor)
        before, after = torch.where(known, self.factor, 0).sum(), torch.where(known, moved, 0).sum()
        scaled = moved * torch.where(after > 0, before / after, 1)
        self.factor.copy_(torch.where(known, scaled, self.factor))

    def extra_repr(self) -> str:
        feature = "" if self.feature is None else f", feature={_paths.format(self.feature)!r}"
        return f"alpha={self.alpha:g}, lr={self.lr:g}{feature}"
