"""Each value divided by its moving average."""

from __future__ import annotations

import math
from typing import Literal, final, get_args

import torch
from torch import Tensor

from torch_pathloss._errors import ConstructionError, listed
from torch_pathloss.weighting._base import Factors
from torch_pathloss.weighting._statistics import TINY, finite_in

Scale = Literal["one", "initial", "mean"]


@final
class EMANormalized(Factors):
    r"""Each value divided by its exponential moving average, so that no term counts more for its unit.

    .. math::
        f_k = \frac{s_k}{\max(m_k, 10^{-8})}, \qquad
        m_k \leftarrow m_k + \frac{1 - d}{1 - d^{n_k}} \left(|v_k| - m_k\right)

    where

    - :math:`v_k` is the value of a term and :math:`n_k` the number of updates in which it was seen;
    - :math:`m_k` is the moving average of :math:`|v_k|` with decay :math:`d`, bias corrected: after the first
      update it is the first value itself;
    - :math:`s_k` is the size that a value is brought to: 1, or the term's own size at the start
      (the mean of its first `initial_updates` values, or as many as there are), or the mean of the moving averages
      of the terms that are seen.

    An average goes on only with the updates in which its term is seen. A term that was never seen in an update has the
    factor 1. The gradient is that of :math:`v_k / m_k` with :math:`m_k` constant, so it is the gradient of
    :math:`\log v_k` where the average is near the value. A value that goes to 0 gets a factor of up to :math:`10^8`,
    and takes over the training: this is for values that stay above 0.

    Args:
        scale: ``"one"``, ``"initial"`` or ``"mean"``, see above. ``"initial"`` keeps the balance that the weights gave
            at the start, ``"mean"`` keeps the size of the total. Default: ``"one"``.
        decay: :math:`d`, in :math:`[0, 1)`. Default: 0.9, as in OpenVINO.
        initial_updates: see above; for ``scale="initial"`` only. Default: 10.
        weighted_mean: whether the effective weights are divided by their sum. Default: ``False``.

    Shape:
        ``[K]`` values; a 0-dim total.

    Raises:
        ConstructionError: if an argument is not one of the above.

    Examples:
        >>> import torch
        >>> from torch import nn
        >>> from torch_pathloss import PathLossModule
        >>> from torch_pathloss.weighting import EMANormalized
        >>> criterion = PathLossModule({"a": nn.L1Loss(), "b": nn.L1Loss()}, weighting=EMANormalized())
        >>> output = {"a": torch.full((2,), 1000.0), "b": torch.full((2,), 0.001)}
        >>> criterion(output, {"a": torch.zeros(2), "b": torch.zeros(2)})  # 1000 / 1000 + 0.001 / 0.001
        tensor(2.)

    References:
        A practice without a paper of its own. ``scale="mean"`` and the decay are those of ``balance_losses`` in
        OpenVINO's `fork of mmaction2
        <https://github.com/openvinotoolkit/mmaction2>`_, whose average is not bias corrected since it starts from the
        first value, which weighs more there for some :math:`1 / (1 - d)` updates.
    """

    mean: Tensor
    initial: Tensor
    count: Tensor

    def __init__(
        self, *, scale: Scale = "one", decay: float = 0.9, initial_updates: int = 10, weighted_mean: bool = False
    ) -> None:
        super().__init__(weighted_mean=weighted_mean)
        problems = []
        if scale not in get_args(Scale):
            problems.append(f"scale must be one of {', '.join(map(repr, get_args(Scale)))}, not {scale!r}.")
        if not 0 <= decay < 1:
            problems.append(f"decay must be at least 0 and below 1, not {decay!r}.")
        if not (isinstance(initial_updates, int) and initial_updates >= 1):
            problems.append(f"initial_updates must be an integer of at least 1, not {initial_updates!r}.")
        if problems:
            raise ConstructionError(f"EMANormalized cannot be built:{listed(problems)}")
        self.scale = scale
        self.decay = decay
        self.initial_updates = initial_updates
        self._log_decay = math.log(decay) if decay else -math.inf

    def setup(self, names: tuple[str, ...]) -> None:
        self.register_buffer("mean", torch.zeros(len(names)))
        self.register_buffer("initial", torch.zeros(len(names)))
        self.register_buffer("count", torch.zeros(len(names), dtype=torch.int64))

    def factors(self, values: Tensor, seen: Tensor, update: bool) -> Tensor:
        if update:
            self._record(*finite_in(self.mean, values, seen))
        known = self.count > 0
        return torch.where(known, self._size(seen & known) / self.mean.clamp(min=TINY), 1)

    def _record(self, values: Tensor, seen: Tensor) -> None:
        self.count.add_(seen)
        number = self.count.clamp(min=1).to(self.mean.dtype)
        # expm1, since 1 - decay**n loses its digits to cancellation for a decay near 1
        rate = (1 - self.decay) / -torch.expm1(number * self._log_decay)
        self.mean.copy_(torch.where(seen, self.mean.lerp(values.abs(), rate), self.mean))
        early = seen & (self.count <= self.initial_updates)
        self.initial.copy_(torch.where(early, self.initial.lerp(values.abs(), 1 / number), self.initial))

    def _size(self, seen: Tensor) -> Tensor:
        if self.scale == "one":
            return torch.ones_like(self.mean)
        if self.scale == "initial":
            return self.initial
        return torch.where(seen, self.mean, 0).sum() / seen.sum().clamp(min=1)

    def extra_repr(self) -> str:
        text = f"scale={self.scale!r}, decay={self.decay}"
        if self.scale == "initial":
            text += f", initial_updates={self.initial_updates}"
        return ", ".join(filter(None, [text, super().extra_repr()]))
