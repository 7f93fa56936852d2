"""The plain sum and mean."""

from __future__ import annotations

from typing import final

import torch
from torch import Tensor

from torch_pathloss.weighting._base import Factors


@final
class WeightedSum(Factors):
    r"""The sum of weight times value, which a container computes without a weighting too; or their mean.

    With :math:`w_k` the weights that the user set and :math:`S` the terms that are seen,

    .. math::
        L = \sum_{k \in S} w_k v_k \qquad\text{or, with weighted\_mean,}\qquad
        L = \frac{\sum_{k \in S} w_k v_k}{\sum_{k \in S} w_k}

    Args:
        weighted_mean: whether the weights are divided by their sum. Default: ``False``.

    Examples:
        >>> import torch
        >>> from torch import nn
        >>> from torch_pathloss import PathLossModule
        >>> from torch_pathloss.weighting import WeightedSum
        >>> losses = {"a": nn.L1Loss(), "b": nn.L1Loss()}
        >>> criterion = PathLossModule(losses, weights={"b": 3.0}, weighting=WeightedSum(weighted_mean=True))
        >>> output = {"a": torch.ones(2), "b": torch.full((2,), 5.0)}
        >>> criterion(output, {"a": torch.zeros(2), "b": torch.zeros(2)})  # (1 * 1 + 3 * 5) / 4
        tensor(4.)
    """

    def setup(self, names: tuple[str, ...]) -> None:
        pass

    def factors(self, values: Tensor, seen: Tensor, update: bool) -> Tensor:
        return torch.ones_like(values)
