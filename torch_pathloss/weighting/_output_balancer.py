"""Gradients at the outputs, each with a share of one norm."""

from __future__ import annotations

import math
from typing import ClassVar, final

import torch
from torch import Tensor

from torch_pathloss import _paths
from torch_pathloss._errors import ConstructionError, listed
from torch_pathloss._paths import Path
from torch_pathloss.weighting._base import Weighted, Weighting, over_ranks, pinned


@final
class OutputBalancer(Weighting):
    r"""Gives the gradient of each term the share of its weight, whatever the scale of its value.

    With :math:`g_k` the gradient of the value :math:`v_k` at the leaves of the output, the gradient that goes into the
    model is

    .. math::
        \sum_{k \in S} e_k g_k, \qquad
        e_k = R \, \frac{w_k}{\sum_{j \in S} w_j} \cdot \frac{1}{\langle \lVert g_k \rVert_2 \rangle_\beta}

    and the total is :math:`L = \sum_{k \in S} e_k v_k` with :math:`e_k` as constants.

    where

    - :math:`w_k` is the weight that the user set: the part of the gradient that term :math:`k` makes,
    - :math:`\langle \cdot \rangle_\beta` is the exponential moving average over the calls in which the term is seen,
      this one included, corrected for its start,
    - :math:`R` is the norm of all together,
    - :math:`S` are the terms that are seen.

    A term whose gradient has been 0 so far has the effective weight 0. Where gradients are not recorded, the averages
    of earlier calls are used, and 1 for a term without one.
    The paper's own code takes the norm for each sample and averages it; this is the formula of the paper.

    Args:
        norm: :math:`R`. Default: 1.0 (the paper, section 3.4).
        decay: :math:`\beta`. Default: 0.999 (the paper, section 3.4).
        feature: the path in the output of a tensor of the model's graph at which the norms are taken instead. Not in
            compiled code. Default: ``None``.

    Shape:
        ``[K]`` values and norms; a 0-dim total.

    Raises:
        ConstructionError: if ``norm`` is not positive and finite, or ``decay`` is not in [0, 1).

    Examples:
        >>> import torch
        >>> from torch import nn
        >>> from torch_pathloss import PathLossModule
        >>> from torch_pathloss.weighting import OutputBalancer
        >>> losses = {"a": nn.MSELoss(), "b": nn.MSELoss()}
        >>> criterion = PathLossModule(losses, weights={"b": 3.0}, weighting=OutputBalancer())
        >>> output = {"a": torch.full((4,), 100.0), "b": torch.full((4,), 0.01)}
        >>> _, gradients = criterion.value_and_grad(output, {"a": torch.zeros(4), "b": torch.zeros(4)})
        >>> gradients["a"].norm(), gradients["b"].norm()
        (tensor(0.2500), tensor(0.7500))

    References:
        Défossez, Copet, Synnaeve and Adi, High Fidelity Neural Audio Compression, TMLR 2023, section 3.4, "Balancer".
    """

    uses_gradients: ClassVar[bool] = True

    average: Tensor
    mass: Tensor

    def __init__(self, norm: float = 1.0, *, decay: float = 0.999, feature: str | Path | None = None) -> None:
        super().__init__()
        problems = []
        if not (math.isfinite(norm) and norm > 0):
            problems.append(f"norm must be finite and positive, not {norm!r}.")
        if not 0 <= decay < 1:
            problems.append(f"decay must be at least 0 and less than 1, not {decay!r}.")
        if problems:
            raise ConstructionError(f"OutputBalancer cannot be built:{listed(problems)}")
        self.norm = norm
        self.decay = decay
        self.feature: Path | None = None if feature is None else _paths.parse(feature)

    def setup(self, names: tuple[str, ...]) -> None:
        self.register_buffer("average", torch.zeros(len(names)))
        self.register_buffer("mass", torch.zeros(len(names)))

    def forward(
        self, values: Tensor, seen: Tensor, weights: Tensor | None = None, norms: Tensor | None = None
    ) -> Weighted:
        update = self.updates()
        with torch.no_grad():
            if update and norms is not None:
                self._record(norms, seen)
            mean = self.average / self.mass.clamp(min=torch.finfo(self.mass.dtype).tiny)
            scale = torch.where(self.mass == 0, 1, torch.where(mean > 0, 1 / mean, 0))
            share = torch.where(seen, torch.ones_like(scale) if weights is None else weights, 0)
            whole = share.sum()
            effective = pinned(self.norm * share / torch.where(whole == 0, 1, whole) * scale)
        return Weighted((values * effective).sum(), effective)

    def _record(self, norms: Tensor, seen: Tensor) -> None:
        """Moves the averages, which are sums over their mass, rounded alike."""
        norms, known = over_ranks(norms, seen)
        for buffer, latest in ((self.average, norms), (self.mass, torch.ones_like(norms))):
            buffer.copy_(torch.where(known, self.decay * buffer + (1 - self.decay) * latest, buffer))

    def extra_repr(self) -> str:
        feature = "" if self.feature is None else f", feature={_paths.format(self.feature)!r}"
        return f"norm={self.norm:g}, decay={self.decay:g}{feature}"
