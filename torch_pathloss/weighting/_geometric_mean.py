"""The geometric mean of the values."""

from __future__ import annotations

import math
from typing import final

import torch
from torch import Tensor

from torch_pathloss._errors import ConstructionError
from torch_pathloss.weighting._base import Weighted, Weighting, equal_to, over_ranks


@final
class GeometricMean(Weighting):
    r"""The geometric mean: the units of the values do not matter, and each falls by the same part.

    .. math::
        L = \prod_{k \in S} (v_k + \epsilon)^{w_k / W}
        = \exp \Big( \frac{1}{W} \sum_{k \in S} w_k \log (v_k + \epsilon) \Big), \qquad W = \sum_{k \in S} w_k

    where

    - :math:`v_k` is the value of term :math:`k`; with several processes its mean over those that see a finite one,
    - :math:`w_k` is the weight that the user set, here an exponent: a factor of a value would only scale the total,
    - :math:`S` is the set of the terms that are seen, :math:`\epsilon` the offset.

    The effective weights are :math:`L w_k / (W (v_k + \epsilon))`: a value near 0 gets a large one.

    A value plus offset of 0 or below has no logarithm, and makes the total NaN, in the call itself. TorchJD gives 0 for
    a value of 0, and a gradient of NaN.

    Args:
        offset: :math:`\epsilon`, for terms whose values reach 0. Default: 0.

    Shape:
        ``[K]`` values; a 0-dim total.

    Raises:
        ConstructionError: if the offset is not finite.

    Examples:
        >>> import torch
        >>> from torch import nn
        >>> from torch_pathloss import PathLossModule
        >>> from torch_pathloss.weighting import GeometricMean
        >>> losses = {"a": nn.L1Loss(), "b": nn.L1Loss()}
        >>> criterion = PathLossModule(losses, weights={"b": 2.0}, weighting=GeometricMean())
        >>> output = {"a": torch.ones(2), "b": torch.full((2,), 8.0)}
        >>> criterion(output, {"a": torch.zeros(2), "b": torch.zeros(2)})  # (1 * 8 * 8) ** (1 / 3)
        tensor(4.)

    References:
        Chennupati et al., MultiNet++: Multi-Stream Feature Aggregation and Geometric Loss Strategy for Multi-Task
        Learning, CVPR Workshops 2019.
    """

    def __init__(self, *, offset: float = 0.0) -> None:
        super().__init__()
        if not math.isfinite(offset):
            raise ConstructionError(f"GeometricMean cannot be built: offset must be finite, not {offset!r}.")
        self.offset = offset

    def setup(self, names: tuple[str, ...]) -> None:
        pass

    def forward(
        self, values: Tensor, seen: Tensor, weights: Tensor | None = None, norms: Tensor | None = None
    ) -> Weighted:
        mean, anywhere = over_ranks(values.detach(), seen, self.updates())
        there = anywhere | seen
        values = equal_to(mean, values, seen) + self.offset
        positive = torch.where(there, torch.where(values > 0, values, torch.nan), 1)
        exponents = there.to(values.dtype) if weights is None else torch.where(there, weights, 0)
        share = exponents.sum()
        exponents = exponents / torch.where(share == 0, 1, share)
        total = torch.where(share == 0, 0, (exponents * positive.log()).sum().exp())
        return Weighted(total, torch.where(seen, total * exponents / positive, 0).detach())

    def extra_repr(self) -> str:
        return f"offset={self.offset:g}" if self.offset else ""
