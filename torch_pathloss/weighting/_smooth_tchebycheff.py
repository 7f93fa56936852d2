"""A smooth maximum of the values."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Literal, final

import torch
from torch import Tensor

from torch_pathloss._errors import ConstructionError, listed
from torch_pathloss._paths import Path
from torch_pathloss.weighting._base import Weighted, Weighting, equal_to, over_ranks, pinned


@final
class SmoothTchebycheff(Weighting):
    r"""A smooth maximum: the term that is farthest from its ideal counts most.

    .. math::
        L = \mu \log \sum_{k \in S} \exp \Big( \frac{w_k (v_k - z_k)}{\mu} \Big)

    where

    - :math:`v_k` is the value of term :math:`k`; with several processes its mean over those that see a finite one,
    - :math:`w_k` is the weight that the user set, the preference of the paper. The paper has preferences with the sum
      1, and TorchJD :math:`1/K` by default; the weights here are taken as they are,
    - :math:`z_k` is the ideal, the value that is wished for,
    - :math:`\mu` says how smooth: with a small one the total is nearly the largest :math:`w_k (v_k - z_k)`,
    - :math:`S` is the set of the terms that are seen.

    The effective weights are :math:`w_k` times a softmax, which has the sum 1. The values have to be of comparable
    size, by their weights or otherwise. The paper's code for multi-task learning takes logarithms of the values over
    their means of an early epoch instead, as LibMTL does; this is the formula of the paper, and of TorchJD.

    Args:
        mu: :math:`\mu`, in the unit of the weighted values. There is no default: the paper tries 0.01 to 1 and finds
            none that is best for all problems.
        ideal: :math:`z_k`, for all terms or by name, 0 for those that are not named; or ``"running"``, the smallest
            value of the term in training up to the present one, so that :math:`v_k - z_k \ge 0`. Default: 0.

    Shape:
        ``[K]`` values; a 0-dim total.

    Raises:
        ConstructionError: if an option is out of its range; when the container is built, for a name that no term has.

    Examples:
        >>> import torch
        >>> from torch import nn
        >>> from torch_pathloss import PathLossModule
        >>> from torch_pathloss.weighting import SmoothTchebycheff
        >>> losses = {"a": nn.L1Loss(), "b": nn.L1Loss()}
        >>> criterion = PathLossModule(losses, weighting=SmoothTchebycheff(0.1, ideal={"b": 2.0}))
        >>> output = {"a": torch.ones(2), "b": torch.full((2,), 3.0)}
        >>> criterion(output, {"a": torch.zeros(2), "b": torch.zeros(2)})  # both are 1 from their ideals: 1 + 0.1 ln 2
        tensor(1.0693)
        >>> criterion.last.weights
        {'a': tensor(0.5000), 'b': tensor(0.5000)}

    References:
        Lin et al., Smooth Tchebycheff Scalarization for Multi-Objective Optimization, ICML 2024.
    """

    ideal: Tensor

    def __init__(self, mu: float, *, ideal: float | Mapping[str | Path, float] | Literal["running"] = 0.0) -> None:
        super().__init__()
        problems = [] if 0 < mu < math.inf else [f"mu must be above 0 and finite, not {mu!r}."]
        if isinstance(ideal, str):
            if ideal != "running":
                problems.append(f"ideal must be a number, a mapping by name or 'running', not {ideal!r}.")
        else:
            wished = ideal.values() if isinstance(ideal, Mapping) else [ideal]
            problems += [f"ideal must be finite, not {z!r}." for z in wished if not math.isfinite(z)]
        if problems:
            raise ConstructionError(f"SmoothTchebycheff cannot be built:{listed(problems)}")
        self.mu = mu
        self.wished = dict(ideal) if isinstance(ideal, Mapping) else ideal

    def setup(self, names: tuple[str, ...]) -> None:
        if isinstance(self.wished, str):
            self.register_buffer("ideal", torch.full((len(names),), torch.inf))
        else:
            ideal = torch.tensor(self.by_name("ideal", self.wished, names, 0.0))
            self.register_buffer("ideal", ideal, persistent=False)

    def forward(
        self, values: Tensor, seen: Tensor, weights: Tensor | None = None, norms: Tensor | None = None
    ) -> Weighted:
        update = self.updates()
        mean, anywhere = over_ranks(values.detach(), seen, update)
        there = anywhere | seen
        distance = equal_to(mean, values, seen) - self._ideal(mean, anywhere, update)
        if weights is not None:
            distance = distance * weights
        exponents = torch.where(there, distance / self.mu, -torch.inf)
        exponents = torch.where(there.any(), exponents, 0)  # the sum of no exponentials would have a gradient of NaN
        total = torch.where(there.any(), self.mu * torch.logsumexp(exponents, 0), 0)
        factors = torch.softmax(exponents.detach(), 0)
        if weights is not None:
            factors = factors * weights
        return Weighted(total, torch.where(seen, factors, 0))

    @torch.no_grad()
    def _ideal(self, values: Tensor, seen: Tensor, update: bool) -> Tensor:
        if self.wished != "running":
            return self.ideal
        ideal = torch.where(seen, torch.minimum(self.ideal, values), self.ideal)
        if update:
            self.ideal.copy_(ideal)
        return pinned(ideal)

    def extra_repr(self) -> str:
        return f"mu={self.mu:g}, ideal={self.wished!r}"
