"""SoftAdapt: more weight where a loss falls the least."""

from __future__ import annotations

import math
from typing import Literal, final, get_args

import torch
from torch import Tensor

from torch_pathloss._errors import ConstructionError, listed
from torch_pathloss.weighting._base import Factors
from torch_pathloss.weighting._statistics import finite_in, shares

Variant = Literal["original", "normalized", "loss_weighted"]


@final
class SoftAdapt(Factors):
    r"""Factors by the rate of change of each value: a softmax of slopes over the last updates.

    .. math::
        f_k = \frac{g_k \exp(\beta r_k)}{\sum_j g_j \exp(\beta r_j)}

    where

    - :math:`s_k` is the slope of a term's last `window` values by finite differences: the forward difference
      :math:`\sum_{j=0}^{p} c_j v_{k,j}` of accuracy order :math:`p` over the last :math:`p + 1` values
      :math:`v_{k,0}, \dots, v_{k,p}`, oldest first, with :math:`c_0 = -\sum_{j=1}^{p} 1/j` and
      :math:`c_j = (-1)^{j+1} \binom{p}{j} / j`;
    - ``"original"``: :math:`r_k = s_k` and :math:`g_k = 1`;
    - ``"normalized"``: :math:`r_k = s_k / \sum_j s_j` and :math:`g_k = 1`;
    - ``"loss_weighted"``: :math:`r_k = s_k`, and :math:`g_k` is the magnitude of the mean of the last
      `window` values, thought positive.

    Slope and mean of a term are computed anew after each `every` updates in which it was seen, and are constant in
    between. The factors sum to 1 over the terms that are seen; a term has an equal share until its window is full.
    (The authors' example starts with factors of 1 instead, from where the total falls at once by the number of terms.)

    Public implementations disagree. This is the authors' package since 2022 (``softadapt``, whose published numbers the
    tests have). Their first script divides slopes by the sum of *magnitudes*, and multiplies by the losses in all three
    variants. NVIDIA's PhysicsNeMo takes :math:`\exp(v_k / v_k')` with :math:`v_k'` the value
    before, and factors that sum to the number of terms. Mind ``"normalized"``: where the sum of slopes is negative, as
    in most of training, dividing by it turns the order around, and the term that falls fastest gets the most.

    Args:
        variant: see above. Default: ``"loss_weighted"``, which the authors recommend.
        beta: :math:`\beta`; positive gives more to terms that fall less, negative to those that fall more.
            Default: 0.1, as in the authors' package.
        window: how many values of each term are kept, at least 2. Default: 5, as in the authors' example.
        accuracy_order: :math:`p`, from 1 to ``window - 1``. Default: ``window - 1``, as in the authors' package. The
            coefficients grow with it, and with them the noise of the batches: 1 is the difference of two values.
        every: after how many updates a slope is computed anew. Default: ``window``, as in the authors' example.
        weighted_mean: whether the effective weights are divided by their sum. Default: ``False``.

    Shape:
        ``[K]`` values; a 0-dim total.

    Raises:
        ConstructionError: if an argument is not one of the above.

    Examples:
        >>> import torch
        >>> from torch_pathloss.weighting import SoftAdapt
        >>> weighting = SoftAdapt("original").bind(["rising", "falling"])
        >>> seen = torch.tensor([True, True])
        >>> for values in zip([1.0, 2.0, 3.0, 4.0, 5.0], [150.0, 100.0, 50.0, 10.0, 0.1]):
        ...     weights = weighting(torch.tensor(values), seen).weights
        >>> weights
        tensor([0.9934, 0.0066])

    References:
        A. Heydari, C. Thompson, A. Mehmood, `SoftAdapt: Techniques for Adaptive Loss Weighting of Neural Networks with
        Multi-Part Loss Functions <https://arxiv.org/abs/1912.12355>`_, 2019, section 3.1; authors' package
        `dr-aheydari/SoftAdapt <https://github.com/dr-aheydari/SoftAdapt>`_.
    """

    history: Tensor
    slope: Tensor
    level: Tensor
    count: Tensor
    ready: Tensor
    coefficients: Tensor

    def __init__(
        self,
        variant: Variant = "loss_weighted",
        *,
        beta: float = 0.1,
        window: int = 5,
        accuracy_order: int | None = None,
        every: int | None = None,
        weighted_mean: bool = False,
    ) -> None:
        super().__init__(weighted_mean=weighted_mean)
        order = window - 1 if accuracy_order is None else accuracy_order
        problems = []
        if variant not in get_args(Variant):
            problems.append(f"variant must be one of {', '.join(map(repr, get_args(Variant)))}, not {variant!r}.")
        if not math.isfinite(beta):
            problems.append(f"beta must be finite, not {beta!r}.")
        if not (isinstance(window, int) and window >= 2):
            problems.append(f"window must be an integer of at least 2, since a slope needs two values, not {window!r}.")
        elif not (isinstance(order, int) and 1 <= order < window):
            problems.append(f"accuracy_order must be an integer from 1 to window - 1 = {window - 1}, not {order!r}.")
        if every is not None and not (isinstance(every, int) and every >= 1):
            problems.append(f"every must be an integer of at least 1, not {every!r}.")
        if problems:
            raise ConstructionError(f"SoftAdapt cannot be built:{listed(problems)}")
        self.variant = variant
        self.beta = beta
        self.window = window
        self.accuracy_order = order
        self.every = window if every is None else every

    def setup(self, names: tuple[str, ...]) -> None:
        self.register_buffer("history", torch.zeros(self.window, len(names)))
        self.register_buffer("slope", torch.zeros(len(names)))
        self.register_buffer("level", torch.zeros(len(names)))
        self.register_buffer("count", torch.zeros(len(names), dtype=torch.int64))
        self.register_buffer("ready", torch.zeros(len(names), dtype=torch.bool))
        self.register_buffer("coefficients", _forward_difference(self.accuracy_order)[:, None], persistent=False)

    def factors(self, values: Tensor, seen: Tensor, update: bool) -> Tensor:
        if update:
            self._record(*finite_in(self.history, values, seen))
        ready = self.ready & seen
        rates = self.slope
        if self.variant == "normalized":
            total = torch.where(ready, rates, 0).sum()
            rates = rates / torch.where(total == 0, 1, total)
        logits = torch.where(ready, self.beta * rates, -torch.inf)
        scores = torch.exp(logits - logits.max().clamp(min=torch.finfo(logits.dtype).min))
        if self.variant == "loss_weighted":
            scores = scores * self.level
        return shares(scores, self.ready, seen)

    def _record(self, values: Tensor, seen: Tensor) -> None:
        self.history.copy_(torch.where(seen, torch.cat([self.history[1:], values[None]]), self.history))
        self.count.add_(seen)
        slope = (self.coefficients * self.history[-self.accuracy_order - 1 :]).sum(0)
        due = seen & (self.count % self.every == 0) & (self.count >= self.window) & slope.isfinite()
        self.slope.copy_(torch.where(due, slope, self.slope))
        self.level.copy_(torch.where(due, self.history.mean(0).abs(), self.level))
        self.ready.logical_or_(due)

    def extra_repr(self) -> str:
        text = (
            f"{self.variant!r}, beta={self.beta}, window={self.window}, accuracy_order={self.accuracy_order}, "
            f"every={self.every}"
        )
        return ", ".join(filter(None, [text, super().extra_repr()]))


def _forward_difference(order: int) -> Tensor:
    later = [(-1) ** (j + 1) * math.comb(order, j) / j for j in range(1, order + 1)]
    return torch.tensor([-sum(1 / j for j in range(1, order + 1)), *later])
