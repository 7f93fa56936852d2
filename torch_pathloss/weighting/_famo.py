"""Fast Adaptive Multitask Optimization."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Literal, final

import torch
from torch import Tensor

from torch_pathloss._errors import ConstructionError, listed
from torch_pathloss._paths import Path
from torch_pathloss.weighting._base import Weighted, Weighting, equal_to, over_ranks

Optimizer = Literal["adam", "sgd"]

EPSILON = 1e-8
BETAS = (0.9, 0.999)


@final
class FAMO(Weighting):
    r"""FAMO: weights with which the logarithms of all values fall at one rate.

    .. math::
        L = c \sum_{k \in S} z_k \log d_k, \qquad d_k = v_k - m_k + \epsilon, \qquad
        c = \Big( \sum_{k \in S} \frac{z_k}{d_k} \Big)^{-1}, \qquad
        z_k = \frac{w_k e^{\xi_k}}{\sum_j w_j e^{\xi_j}}

    and, after the optimizer's step, with the values :math:`v'_k` of the same batch, a step of Adam along

    .. math::
        g_k = z_k \Big( \delta_k - \sum_j z_j \delta_j \Big) + \gamma \xi_k, \qquad
        \delta_k = \log d_k - \log d'_k

    where

    - :math:`v_k` is the value of term :math:`k`; with several processes its mean over those that see a finite one,
    - :math:`m_k` is a value that :math:`v_k` does not fall below, and :math:`\epsilon` is 1e-8. Where :math:`v_k` is
      below :math:`m_k` the total is NaN,
    - :math:`c` is a constant for the gradient, so that the effective weights :math:`c z_k / d_k` have the sum 1,
    - :math:`\xi_k` are the logits, kept in a buffer,
    - :math:`w_k` is the weight that the user set. A factor of a value would change nothing in the gradient of its
      logarithm; as a factor of :math:`z_k` it says from which preference the logits start, and to which :math:`\gamma`
      pulls them back,
    - :math:`S` is the set of the terms that are seen. The logit of a term changes where the term was seen before and
      after the step; the sum over :math:`j` is then over such terms, with :math:`z` scaled to the sum 1.

    The total may be negative, and is no measure of progress.

    Call `PathLossModule.update` after each optimizer step; without it the logits stay. A second `update` after one call
    changes nothing.

    Public implementations disagree on :math:`\gamma`, the weight decay: the paper's algorithm 2, LibMTL and TorchJD
    have 1e-3, the authors' ``famo.py`` has 0.01 as its default. They agree on Adam, where the paper writes a plain
    step, on the rate of 0.025, and on adding the decay to the gradient, as `torch.optim.Adam` does.

    Args:
        minimum: :math:`m_k`, for all terms or by name, 0 for those that are not named. Default: 0.
        lr: the rate at which the logits are learned. Default: 0.025, as in the paper.
        weight_decay: :math:`\gamma`. Default: 1e-3.
        optimizer: ``"adam"``, or ``"sgd"``, the plain step of the paper's algorithm. Default: ``"adam"``.

    Shape:
        ``[K]`` values; a 0-dim total.

    Raises:
        ConstructionError: if an option is out of its range; when the container is built, for a name that no term has.

    Examples:
        >>> import torch
        >>> from torch import nn
        >>> from torch_pathloss import PathLossModule
        >>> from torch_pathloss.weighting import FAMO
        >>> criterion = PathLossModule({"a": nn.L1Loss(), "b": nn.L1Loss()}, weighting=FAMO())
        >>> model = nn.Parameter(torch.tensor([4.0, 1.0]))
        >>> optimizer = torch.optim.SGD([model], lr=0.5)
        >>> target = {"a": torch.tensor(0.0), "b": torch.tensor(0.0)}
        >>> criterion({"a": model[0], "b": model[1]}, target).backward()
        >>> criterion.last.weights  # proportional to 1/4 and 1/1
        {'a': tensor(0.2000), 'b': tensor(0.8000)}
        >>> optimizer.step()
        >>> criterion.update({"a": model[0], "b": model[1]}, target)
        >>> criterion.weighting.logits  # a fell less, and gets more
        tensor([ 0.0250, -0.0250])

    References:
        Liu, Feng, Stone and Liu, FAMO: Fast Adaptive Multitask Optimization, NeurIPS 2023, algorithms 1 and 2.
        Code: github.com/Cranial-XIX/FAMO.
    """

    logits: Tensor
    minimum: Tensor
    before: Tensor
    shares: Tensor
    first_moment: Tensor
    second_moment: Tensor
    steps: Tensor

    def __init__(
        self,
        minimum: float | Mapping[str | Path, float] = 0.0,
        *,
        lr: float = 0.025,
        weight_decay: float = 1e-3,
        optimizer: Optimizer = "adam",
    ) -> None:
        super().__init__()
        least = minimum.values() if isinstance(minimum, Mapping) else [minimum]
        problems = [f"minimum must be finite, not {m!r}." for m in least if not math.isfinite(m)]
        for option, value in (("lr", lr), ("weight_decay", weight_decay)):
            if not value >= 0:
                problems.append(f"{option} must be at least 0, not {value!r}.")
        if optimizer not in ("adam", "sgd"):
            problems.append(f"optimizer must be one of 'adam', 'sgd', not {optimizer!r}.")
        if problems:
            raise ConstructionError(f"FAMO cannot be built:{listed(problems)}")
        self.least = dict(minimum) if isinstance(minimum, Mapping) else minimum
        self.lr = lr
        self.weight_decay = weight_decay
        self.optimizer = optimizer

    def setup(self, names: tuple[str, ...]) -> None:
        minimum = torch.tensor(self.by_name("minimum", self.least, names, 0.0))
        self.register_buffer("minimum", minimum, persistent=False)
        self.register_buffer("logits", torch.zeros(len(names)))
        self.register_buffer("before", torch.ones(len(names)))
        self.register_buffer("shares", torch.zeros(len(names)))
        self.register_buffer("first_moment", torch.zeros(len(names)))
        self.register_buffer("second_moment", torch.zeros(len(names)))
        self.register_buffer("steps", torch.zeros(len(names), dtype=torch.int64))

    def forward(
        self, values: Tensor, seen: Tensor, weights: Tensor | None = None, norms: Tensor | None = None
    ) -> Weighted:
        update = self.updates()
        mean, anywhere = over_ranks(values.detach(), seen, update)
        distance = torch.where(anywhere | seen, self._distance(equal_to(mean, values, seen)), 1)
        with torch.no_grad():
            shares = torch.softmax(self.logits, 0)
            if weights is not None:
                shares = shares * weights
            if update:
                self.before.copy_(mean)
                self.shares.copy_(torch.where(anywhere, shares, 0))
            factors = _normalised(torch.where(anywhere | seen, shares / distance, 0))
        total = (factors * distance.detach() * distance.log()).sum()
        return Weighted(total, torch.where(seen, factors, 0))

    @torch.no_grad()
    def update(self, values: Tensor, seen: Tensor) -> None:
        """Learns from the values of the latest call's batch after the optimizer's step; in training mode only.

        Args:
            values: ``[K]``.
            seen: ``[K]``, bool.
        """
        if not self.training:
            return
        mean, anywhere = over_ranks(values.detach(), seen)
        fall = self._distance(self.before).log() - self._distance(mean).log()
        usable = anywhere & (self.shares > 0) & fall.isfinite()
        shares = _normalised(torch.where(usable, self.shares, 0))
        fall = torch.where(usable, fall, 0).to(shares.dtype)
        gradient = shares * (fall - (shares * fall).sum()) + self.weight_decay * self.logits
        direction = self._adam(gradient, usable) if self.optimizer == "adam" else gradient
        self.logits.sub_(torch.where(usable, self.lr * direction, 0))
        self.shares.zero_()

    def _distance(self, values: Tensor) -> Tensor:
        return values - self.minimum + EPSILON

    def _adam(self, gradient: Tensor, usable: Tensor) -> Tensor:
        """Returns the direction of `torch.optim.Adam`, for each term after the number of its own steps."""
        for moment, power, beta in zip((self.first_moment, self.second_moment), (1, 2), BETAS, strict=True):
            moment.copy_(torch.where(usable, moment.lerp(gradient**power, 1 - beta), moment))
        self.steps.add_(usable)
        # 1 - beta^steps, which float32 would round
        first, second = (-torch.expm1(self.steps.clamp(min=1) * math.log(beta)) for beta in BETAS)
        return self.first_moment / first / ((self.second_moment / second).sqrt() + EPSILON)

    def extra_repr(self) -> str:
        return f"lr={self.lr:g}, weight_decay={self.weight_decay:g}, optimizer={self.optimizer!r}"


def _normalised(shares: Tensor) -> Tensor:
    """Returns shares with the sum 1; zeros as they are."""
    total = shares.sum()
    return shares / torch.where(total == 0, 1, total)
