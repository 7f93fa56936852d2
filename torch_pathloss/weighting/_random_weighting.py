"""Weights that are drawn anew at each call."""

from __future__ import annotations

from typing import Literal, final, get_args

import torch
from torch import Tensor

from torch_pathloss._errors import ConstructionError, listed
from torch_pathloss.weighting._base import Factors
from torch_pathloss.weighting._generator import normal, uniform

Distribution = Literal["normal", "dirichlet"]


@final
class RandomWeighting(Factors):
    r"""RLW: factors drawn at random at each call, with the sum 1. What another weighting should beat.

    .. math::
        L = \sum_{k \in S} w_k f_k v_k, \qquad f = \mathrm{softmax}(x),\ x_k \sim \mathcal{N}(0, 1)
        \quad\text{or}\quad f \sim \mathrm{Dirichlet}(1, \dots, 1)

    where

    - :math:`v_k` is the value of term :math:`k`, and :math:`w_k` the weight that the user set,
    - :math:`S` is the set of the terms that are seen. The factors are drawn for all terms, whichever are seen.

    A draw is a function of the seed and of the number of calls so far, which are buffers: it is the same on every
    process, the same again after a resume, and no generator of torch is touched. In evaluation mode and without
    gradients every factor is its mean, :math:`1/K`, so that the totals of two evaluations compare.

    Args:
        distribution: ``"normal"`` or ``"dirichlet"``. Default: ``"normal"``, as in LibMTL and TorchJD.
        seed: an integer, the same on every process. Default: 0.
        weighted_mean: whether the effective weights are divided by their sum. Default: ``False``.

    Shape:
        ``[K]`` values; a 0-dim total.

    Raises:
        ConstructionError: for a distribution that does not exist, or a seed that is not an integer of 32 bits.

    Examples:
        >>> import torch
        >>> from torch import nn
        >>> from torch_pathloss import PathLossModule
        >>> from torch_pathloss.weighting import RandomWeighting
        >>> criterion = PathLossModule({"a": nn.L1Loss(), "b": nn.L1Loss()}, weighting=RandomWeighting(seed=7))
        >>> output, target = {"a": torch.ones(2), "b": torch.ones(2)}, {"a": torch.zeros(2), "b": torch.zeros(2)}
        >>> loss = criterion(output, target)
        >>> round(loss.item(), 4)  # f_a + f_b
        1.0

    References:
        Lin, Ye, Zhang and Tsang, Reasonable Effectiveness of Random Weighting, TMLR 2022, algorithm 2.
    """

    seed: Tensor
    counter: Tensor

    def __init__(self, distribution: Distribution = "normal", *, seed: int = 0, weighted_mean: bool = False) -> None:
        super().__init__(weighted_mean=weighted_mean)
        problems = []
        if distribution not in get_args(Distribution):
            problems.append(f"distribution must be one of 'normal', 'dirichlet', not {distribution!r}.")
        if not isinstance(seed, int) or not 0 <= seed < 2**32:
            problems.append(f"seed must be an integer from 0 to 2**32 - 1, not {seed!r}.")
        if problems:
            raise ConstructionError(f"RandomWeighting cannot be built:{listed(problems)}")
        self.distribution: Distribution = distribution
        self.register_buffer("seed", torch.tensor(seed))
        self.register_buffer("counter", torch.tensor(0))

    def setup(self, names: tuple[str, ...]) -> None:
        pass

    def factors(self, values: Tensor, seen: Tensor, update: bool) -> Tensor:
        if not update:
            return torch.full_like(values, 1 / len(values))
        if self.distribution == "normal":
            drawn = torch.softmax(normal(self.seed, self.counter, len(values)), 0)
        else:
            exponential = -torch.log1p(-uniform(self.seed, self.counter, len(values))) + 2**-25  # above 0
            drawn = exponential / exponential.sum()
        self.counter.add_(1)
        return drawn

    def extra_repr(self) -> str:
        shown = [f"distribution={self.distribution!r}", super().extra_repr()]
        return ", ".join(filter(None, shown))
