"""CoV-Weighting: more weight where a loss still varies."""

from __future__ import annotations

from typing import final

import torch
from torch import Tensor

from torch_pathloss._errors import ConstructionError
from torch_pathloss.weighting._base import Factors
from torch_pathloss.weighting._statistics import TINY, finite_in, shares


@final
class CoefficientOfVariation(Factors):
    r"""Factors in proportion to how much each value varied over time, relative to its mean.

    .. math::
        f_k = \frac{c_k}{\sum_j c_j}, \qquad
        c_k = \frac{\sigma_k}{\mu_k}, \qquad
        \ell_k = \frac{v_k}{\bar v_k}

    where

    - :math:`v_k` is the value of a term and :math:`\bar v_k` the mean of its values *before* this update;
    - :math:`\ell_k` is the ratio of the two, 1 at a term's first update;
    - :math:`\mu_k` and :math:`\sigma_k` are mean and standard deviation of the ratios before this update, by
      Welford's method: with :math:`n` updates before, :math:`p = n / (n + 1)`, or `decay` where it is given, and
      :math:`\mu' = p \mu + (1 - p) \ell`, the sum :math:`S` grows by :math:`(\ell - \mu) (\ell - \mu')`, and
      :math:`\sigma = \sqrt{S / (n + 1) + 10^{-8}}`.

    The factors sum to 1 over the terms that are seen. A term has its coefficient after two updates in which it was
    seen, and an equal share before. Values are thought positive: :math:`\bar v_k` and :math:`\mu_k` are taken as
    :math:`10^{-8}` where they are below it in magnitude, and a negative mean counts by its magnitude.

    Args:
        decay: the decay :math:`p` of the means, in :math:`[0, 1)`. Default: ``None``, the mean of all values, which is
            the authors' default (option ``mean_sort``). As in their code, :math:`S / (n + 1)` has no decay.
        weighted_mean: whether the effective weights are divided by their sum. Default: ``False``.

    Shape:
        ``[K]`` values; a 0-dim total.

    Raises:
        ConstructionError: if ``decay`` is not in its range.

    Examples:
        >>> import torch
        >>> from torch_pathloss.weighting import CoefficientOfVariation
        >>> weighting = CoefficientOfVariation().bind(["steady", "falling"])
        >>> seen = torch.tensor([True, True])
        >>> for step in range(1, 4):
        ...     weights = weighting(torch.tensor([2.0, 2.0 / step]), seen).weights
        >>> weights  # a term that does not move at all keeps the little that the root of 1e-8 gives
        tensor([2.9991e-04, 9.9970e-01])

    References:
        R. Groenendijk, S. Karaoglu, T. Gevers, T. Mensink, `Multi-Loss Weighting with Coefficient of Variations
        <https://arxiv.org/abs/2009.01717>`_, WACV 2021, section 3; authors' code `rickgroen/cov-weighting
        <https://github.com/rickgroen/cov-weighting>`_.
    """

    value_mean: Tensor
    ratio_mean: Tensor
    ratio_sum: Tensor
    count: Tensor

    def __init__(self, *, decay: float | None = None, weighted_mean: bool = False) -> None:
        super().__init__(weighted_mean=weighted_mean)
        if decay is not None and not 0 <= decay < 1:
            raise ConstructionError(
                "CoefficientOfVariation cannot be built: decay must be at least 0 and below 1, or None for the mean of "
                f"all values, not {decay!r}."
            )
        self.decay = decay

    def setup(self, names: tuple[str, ...]) -> None:
        for name in ("value_mean", "ratio_mean", "ratio_sum"):
            self.register_buffer(name, torch.zeros(len(names)))
        self.register_buffer("count", torch.zeros(len(names), dtype=torch.int64))

    def factors(self, values: Tensor, seen: Tensor, update: bool) -> Tensor:
        deviation = (self.ratio_sum / self.count.clamp(min=1) + 1e-8).sqrt()
        result = shares(deviation / self.ratio_mean.abs().clamp(min=TINY), self.count > 1, seen)
        if update:
            self._record(*finite_in(self.value_mean, values, seen))
        return result

    def _record(self, values: Tensor, seen: Tensor) -> None:
        ratio = torch.where(self.count == 0, 1, values / _not_tiny(self.value_mean))
        keep: Tensor | float = self.count / (self.count + 1)
        if self.decay is not None:
            keep = torch.where(self.count == 0, 0, self.decay)
        mean = keep * self.ratio_mean + (1 - keep) * ratio
        growth = (ratio - self.ratio_mean) * (ratio - mean)
        seen = seen & growth.isfinite()
        self.ratio_sum.add_(torch.where(seen, growth, 0))
        self.ratio_mean.copy_(torch.where(seen, mean, self.ratio_mean))
        self.value_mean.copy_(torch.where(seen, keep * self.value_mean + (1 - keep) * values, self.value_mean))
        self.count.add_(seen)

    def extra_repr(self) -> str:
        decay = "" if self.decay is None else f"decay={self.decay}"
        return ", ".join(filter(None, [decay, super().extra_repr()]))


def _not_tiny(mean: Tensor) -> Tensor:
    return torch.where(mean.abs() < TINY, TINY, mean)
