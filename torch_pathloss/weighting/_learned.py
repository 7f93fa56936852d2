"""A learned number for each term, which scales the term's value and is held back by a regulariser."""

from __future__ import annotations

from abc import abstractmethod

import torch
from torch import Tensor

from torch_pathloss.weighting._base import Weighted, Weighting, over_ranks


class Learned(Weighting):
    r"""A weighting whose factors come from a parameter that the optimizer trains along with the model.

    With :math:`s_k` the learned number of term :math:`k`, :math:`w_k` the weight that the user set and :math:`S` the
    terms that are seen, the total is :math:`\sum_{k \in S} w_k (f(s_k) v_k + r(s_k))` and the effective weights are
    :math:`w_k f(s_k)`. A term that is not seen loses both halves: with the regulariser :math:`r` alone, :math:`s_k`
    would run away.

    Every process gets the same gradient of :math:`s_k`, which is that of the mean of :math:`v_k` over the processes
    that see a finite value, so that :math:`s_k` stays equal without DistributedDataParallel, and with it.
    """

    @abstractmethod
    def scale(self) -> Tensor:
        """Returns :math:`f(s_k)`, differentiable."""

    @abstractmethod
    def regularizer(self) -> Tensor:
        """Returns :math:`r(s_k)`, differentiable."""

    def forward(
        self, values: Tensor, seen: Tensor, weights: Tensor | None = None, norms: Tensor | None = None
    ) -> Weighted:
        mean, anywhere = over_ranks(values.detach(), seen, self.updates())
        scale, regularizer = self.scale(), self.regularizer()
        effective, held = scale.detach(), regularizer.detach()
        learned = scale * mean + regularizer
        if weights is not None:
            effective, held, learned = effective * weights, held * weights, learned * weights
        effective = torch.where(seen, effective, 0)
        total = (values * effective + torch.where(seen, held, 0)).sum()
        learned = torch.where(anywhere, learned, 0).sum()
        # apart from the values, so that one which is not finite shows in the total, and not in the learned numbers
        return Weighted(total + (learned - learned.detach()), effective)
