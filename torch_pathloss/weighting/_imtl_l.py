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
        >>> from torch import nn
        >>> from torch_pathloss import PathLossModule
        >>> from torch_pathloss.weighting import IMTLL
        >>> criterion = PathLossModule({"a": nn.L1Loss(), "b": nn.L1Loss()}, weighting=IMTLL())
        >>> optimizer = torch.optim.SGD(criterion.parameters(), lr=0.1)
        >>> output = {"a": torch.full((2,), 4.0), "b": torch.full((2,), 0.5)}
        >>> for _ in range(100):
        ...     optimizer.zero_grad()
        ...     criterion(output, {"a": torch.zeros(2), "b": torch.zeros(2)}).backward()
        ...     optimizer.step()
        >>> criterion.last.weights  # 1/4 and 1/0.5
        {'a': tensor(0.2500), 'b': tensor(1.9999)}

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
