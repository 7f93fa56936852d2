"""Weights that are drawn anew at each call."""

from __future__ import annotations

import math
from typing import Literal, final, get_args

import torch
from torch import Tensor

from torch_pathloss._errors import ConstructionError, listed
from torch_pathloss.weighting._base import Factors

Distribution = Literal["normal", "dirichlet"]

_LOW_32_BITS = 0xFFFFFFFF


@final
class RandomWeighting(Factors):
    r"""RLW: factors drawn at random at each call, with the sum 1. What another weighting should beat.

    .. math::
        L = \sum_{k \in S} w_k f_k v_k, \qquad f = \mathrm{softmax}(x),\ x_k \sim \mathcal{N}(0, 1)
        \quad\text{or}\quad f \sim \mathrm{Dirichlet}(1, \dots, 1)

    where

    - :math:`v_k` is the value of term :math:`k`, and :math:`w_k` the weight that the user set,
    - :math:`S` is the set of the terms that are seen. The factors are drawn for all terms, whichever are seen.

    A draw is a hash of the seed and of the number of calls so far, which are buffers: it is the same on every process,
    the same again after a resume, and no generator of torch is touched. In evaluation mode and without gradients every
    factor is its mean, :math:`1/K`, so that the totals of two evaluations compare.

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
        >>> criterion(output, target)  # f_a + f_b
        tensor(1.)
        >>> criterion.weighting.counter
        tensor(1)

    References:
        Lin, Ye, Zhang and Tsang, Reasonable Effectiveness of Random Weighting, TMLR 2022, algorithm 2.
        Jarzynski and Olano, Hash Functions for GPU Rendering, Journal of Computer Graphics Techniques 9(3), 2020.
    """

    seed: Tensor
    counter: Tensor

    def __init__(self, distribution: Distribution = "normal", *, seed: int = 0, weighted_mean: bool = False) -> None:
        super().__init__(weighted_mean=weighted_mean)
        problems = []
        if distribution not in get_args(Distribution):
            problems.append(f"distribution must be one of 'normal', 'dirichlet', not {distribution!r}.")
        if not isinstance(seed, int) or not 0 <= seed <= _LOW_32_BITS:
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
        key = _hash(self.counter + _hash(self.seed))
        self.counter += 1
        if self.distribution == "normal":
            return torch.softmax(_normal(key, len(values)), 0)
        exponential = -_uniform(key, len(values)).log()
        return exponential / exponential.sum()

    def extra_repr(self) -> str:
        shown = [f"distribution={self.distribution!r}", super().extra_repr()]
        return ", ".join(filter(None, shown))


def _hash(number: Tensor) -> Tensor:
    """Returns 32 bits in int64 for the low 32 bits of an integer: PCG's output permutation as a hash.

    No product reaches 2^63, so that it is the same on every device.
    """
    state = ((number & _LOW_32_BITS) * 747796405 + 2891336453) & _LOW_32_BITS
    word = (((state >> ((state >> 28) + 4)) ^ state) * 277803737) & _LOW_32_BITS
    return (word >> 22) ^ word


def _uniform(key: Tensor, count: int) -> Tensor:
    """Returns numbers between 0 and 1, neither included: 23 bits and a half, which float32 holds exactly."""
    bits = _hash(torch.arange(count, device=key.device) + key)
    return ((bits >> 9).to(torch.float32) + 0.5) * 2**-23


def _normal(key: Tensor, count: int) -> Tensor:
    """Returns numbers of the standard normal distribution, by Box and Muller."""
    radius, angle = _uniform(key, 2 * count).chunk(2)
    return (-2 * radius.log()).sqrt() * (2 * math.pi * angle).cos()
