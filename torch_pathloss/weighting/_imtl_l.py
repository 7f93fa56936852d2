"""The loss balance of Impartial Multi-Task Learning."""

from __future__ import annotations

from typing import final

import torch
from torch import Tensor, nn

from torch_pathloss.weighting._learned import Learned


@final
class IMTLL(Learned):
    r"""IMTL-L: a learned scale for each term, so that all scaled values become alike.

    .. math::
        L = \sum_{k \in S} w_k \left( e^{s_k} v_k - s_k \right)

    where

    - :math:`s_k` is learned, with 0 at the start, so that training starts from the plain sum,
    - :math:`v_k` is the value of term :math:`k`,
    - :math:`w_k` is the weight that the user set; it multiplies a term's whole contribution, and so the speed at which
      :math:`s_k` is learned, but not where it goes,
    - :math:`S` is the set of the terms that are seen.

    At the optimum :math:`e^{s_k} v_k = 1`. It is twice `Uncertainty` in its regression form, with the sign of
    :math:`s_k` turned.

    The values have to be positive, or :math:`s_k` grows without bound; that is not checked. The parameter
    ``log_scale`` goes to the optimizer, without weight decay, which would pull the scales to 1:
    `PathLossModule.check_optimizer` says if it is not there.

    Shape:
        ``[K]`` values; a 0-dim total.

    Examples:
        >>> import torch
        >>> from torch_pathloss.weighting import IMTLL
        >>> weighting = IMTLL().bind(["a", "b"])
        >>> with torch.no_grad():
        ...     _ = weighting.log_scale.copy_(torch.tensor([0.5, 2.0]).log())
        >>> values, seen = torch.tensor([2.0, 0.5]), torch.tensor([True, True])
        >>> total, effective = weighting(values, seen)
        >>> total.item(), effective  # 0.5 * 2 - ln 0.5 + 2 * 0.5 - ln 2
        (2.0, tensor([0.5000, 2.0000]))

    References:
        Liu et al., Towards Impartial Multi-Task Learning, ICLR 2021.
    """

    log_scale: nn.Parameter

    def setup(self, names: tuple[str, ...]) -> None:
        self.log_scale = nn.Parameter(torch.zeros(len(names)))

    def scale(self) -> Tensor:
        return self.log_scale.exp()

    def regularizer(self) -> Tensor:
        return -self.log_scale
