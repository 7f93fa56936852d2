"""ReLoBRaLo: relative loss balancing with random lookback."""

from __future__ import annotations

from typing import final

import torch
from torch import Tensor

from torch_pathloss._errors import ConstructionError, listed
from torch_pathloss.weighting._base import Factors
from torch_pathloss.weighting._generator import uniform
from torch_pathloss.weighting._statistics import TINY, finite_in


@final
class ReLoBRaLo(Factors):
    r"""Factors by the progress of each value since the update before and, at random, since the first.

    .. math::
        f_k \leftarrow \alpha \left(\rho f_k + (1 - \rho) \hat f_k(v^{(1)})\right)
            + (1 - \alpha) \hat f_k(v^{(t-1)}), \qquad
        \hat f_k(u) = m \frac{\exp(v_k / (T u_k))}{\sum_j \exp(v_j / (T u_j))}

    where

    - :math:`v_k` is the value of a term, :math:`v_k^{(t-1)}` at the update before in which it was seen and
      :math:`v_k^{(1)}` at the first;
    - :math:`m` is the number of terms in the sum: those that are seen now and were seen before;
    - :math:`\alpha` is how much of the past is kept, and :math:`T` the temperature: infinite gives equal factors, 0
      gives all to the term of least progress;
    - :math:`\rho` is 1 with probability ``rho``, else 0, which looks back to the first update. One draw for all
      terms.

    At the first update in which a term is seen its factor stays 1, and at the second :math:`\alpha` is 0, so that the
    1 is forgotten. Later a term that is not seen keeps its factor. Values are thought positive: a denominator
    :math:`T u_k` is taken as :math:`10^{-8}` where it is below it in magnitude.

    The draw depends on the seed and on the number of updates alone. Both are in buffers, so it is the same on each rank
    and after a restart, and torch's own generators are left alone.

    Args:
        alpha: :math:`\alpha`, in :math:`[0, 1]`. Default: 0.999.
        temperature: :math:`T`, positive. Default: 0.1.
        rho: the expectation of :math:`\rho`, in :math:`[0, 1]`. Default: 0.99. The three defaults are those of
            the Keras code in the first author's article (2022); NVIDIA's PhysicsNeMo has 0.95, 1 and 0.99.
        seed: an integer in :math:`[0, 2^{32})`. Default: 0.
        weighted_mean: whether the effective weights are divided by their sum. Default: ``False``.

    Shape:
        ``[K]`` values; a 0-dim total.

    Raises:
        ConstructionError: if an argument is not in its range.

    Examples:
        >>> import torch
        >>> from torch_pathloss.weighting import ReLoBRaLo
        >>> weighting = ReLoBRaLo(temperature=1.0).bind(["steady", "falling"])
        >>> seen = torch.tensor([True, True])
        >>> weighting(torch.tensor([1.0, 8.0]), seen).weights
        tensor([1., 1.])
        >>> weighting(torch.tensor([1.0, 4.0]), seen).weights  # 2 * softmax(1 / 1, 4 / 8)
        tensor([1.2449, 0.7551])

    References:
        R. Bischof, M. Kraus, `Multi-Objective Loss Balancing for Physics-Informed Deep Learning
        <https://arxiv.org/abs/2110.09813>`_, 2021; Computer Methods in Applied Mechanics and Engineering 439, 2025.
    """

    factor: Tensor
    last: Tensor
    first: Tensor
    count: Tensor
    seed: Tensor
    draws: Tensor

    def __init__(
        self,
        *,
        alpha: float = 0.999,
        temperature: float = 0.1,
        rho: float = 0.99,
        seed: int = 0,
        weighted_mean: bool = False,
    ) -> None:
        super().__init__(weighted_mean=weighted_mean)
        problems = [
            f"{name} must be from 0 to 1, not {value!r}."
            for name, value in (("alpha", alpha), ("rho", rho))
            if not 0 <= value <= 1
        ]
        if not temperature > 0:
            problems.append(f"temperature must be positive, not {temperature!r}.")
        if not (isinstance(seed, int) and 0 <= seed < 2**32):
            problems.append(f"seed must be an integer from 0 to 2**32 - 1, not {seed!r}.")
        if problems:
            raise ConstructionError(f"ReLoBRaLo cannot be built:{listed(problems)}")
        self.alpha = alpha
        self.temperature = temperature
        self.rho = rho
        self._seed = seed

    def setup(self, names: tuple[str, ...]) -> None:
        self.register_buffer("factor", torch.ones(len(names)))
        self.register_buffer("last", torch.zeros(len(names)))
        self.register_buffer("first", torch.zeros(len(names)))
        self.register_buffer("count", torch.zeros(len(names), dtype=torch.int64))
        self.register_buffer("seed", torch.tensor(self._seed))
        self.register_buffer("draws", torch.zeros((), dtype=torch.int64))

    def factors(self, values: Tensor, seen: Tensor, update: bool) -> Tensor:
        if update:
            values, seen = finite_in(self.last, values, seen)
            self._balance(values, seen & (self.count > 0))
            self._record(values, seen)
        return self.factor

    def _balance(self, values: Tensor, known: Tensor) -> None:
        keep = (uniform(self.seed, self.draws, 1) < self.rho).to(values.dtype)
        self.draws.add_(1)
        past = keep * self.factor + (1 - keep) * self._relative(values, self.first, known)
        alpha = torch.where(self.count == 1, 0, self.alpha)
        factor = alpha * past + (1 - alpha) * self._relative(values, self.last, known)
        self.factor.copy_(torch.where(known & factor.isfinite(), factor, self.factor))

    def _relative(self, values: Tensor, before: Tensor, known: Tensor) -> Tensor:
        scaled = self.temperature * before
        logits = torch.where(known, values / torch.where(scaled.abs() < TINY, TINY, scaled), -torch.inf)
        return known.sum() * torch.softmax(logits, 0)

    def _record(self, values: Tensor, seen: Tensor) -> None:
        self.last.copy_(torch.where(seen, values, self.last))
        self.first.copy_(torch.where(seen & (self.count == 0), values, self.first))
        self.count.add_(seen)

    def extra_repr(self) -> str:
        text = f"alpha={self.alpha}, temperature={self.temperature}, rho={self.rho}, seed={self._seed}"
        return ", ".join(filter(None, [text, super().extra_repr()]))
