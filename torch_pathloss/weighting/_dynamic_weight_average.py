"""Weights from the rate at which each value falls."""

from __future__ import annotations

from typing import final

import torch
from torch import Tensor

from torch_pathloss._errors import ArgumentError, ConstructionError, listed
from torch_pathloss.weighting._base import Factors


@final
class DynamicWeightAverage(Factors):
    r"""DWA: a term whose value falls slowly gets a larger factor.

    .. math::
        L = \sum_{k \in S} w_k f_k v_k, \qquad
        f_k = K \frac{\exp(r_k / T)}{\sum_j \exp(r_j / T)}, \qquad
        r_k = \frac{\bar v_k(t-1)}{\bar v_k(t-2)}

    where

    - :math:`v_k` is the value of term :math:`k`, and :math:`w_k` the weight that the user set,
    - :math:`S` is the set of the terms that are seen, and :math:`K` the number of all terms,
    - :math:`\bar v_k(t-1)` and :math:`\bar v_k(t-2)` are the means of the unweighted values over the steps of the last
      two epochs, or windows, in which term :math:`k` was seen; :math:`r_k` is 1 until there are two, and where the
      ratio is not finite,
    - :math:`T` is the temperature.

    Call `end_epoch` at the end of each epoch; if nobody calls it, the factors stay 1. Or give a ``window``.

    Public implementations agree on the formula and not on :math:`t`. It is an epoch in the authors' code and in LibMTL,
    and what lies between two calls of ``step`` in TorchJD, as it is here; a ``window`` of :math:`n` is TorchJD's with a
    ``step`` after every :math:`n` values of a term. The code of Nash-MTL and of FAMO slides two windows of 25 steps
    on by one at each step, of which the later holds the present value too, and fills the older with ones at the start.

    Args:
        window: how many steps an epoch has for this purpose, counted for each term where it was seen. Default:
            ``None``, `end_epoch` says so.
        temperature: :math:`T`; a larger one makes the factors more alike. Default: 2, as in the paper (section 3.3).
        weighted_mean: whether the effective weights are divided by their sum. Default: ``False``.

    Shape:
        ``[K]`` values; a 0-dim total.

    Raises:
        ConstructionError: if the temperature is not above 0, or the window not a positive number of steps.

    Examples:
        >>> import torch
        >>> from torch import nn
        >>> from torch_pathloss import PathLossModule
        >>> from torch_pathloss.weighting import DynamicWeightAverage
        >>> weighting = DynamicWeightAverage()
        >>> criterion = PathLossModule({"a": nn.L1Loss(), "b": nn.L1Loss()}, weighting=weighting)
        >>> target = {"a": torch.zeros(2), "b": torch.zeros(2)}
        >>> for a, b in [(8.0, 2.0), (4.0, 2.0), (2.0, 2.0)]:  # a falls, b does not
        ...     loss = criterion({"a": torch.full((2,), a), "b": torch.full((2,), b)}, target)
        ...     weighting.end_epoch()
        >>> criterion.last.weights  # 2 softmax([4/8, 2/2] / 2)
        {'a': tensor(0.8756), 'b': tensor(1.1244)}

    References:
        Liu, Johns and Davison, End-to-End Multi-Task Learning with Attention, CVPR 2019, section 3.3.
        Code: github.com/lorenmt/mtan, github.com/AvivNavon/nash-mtl.
    """

    sums: Tensor
    counts: Tensor
    recent: Tensor
    older: Tensor

    def __init__(self, window: int | None = None, *, temperature: float = 2.0, weighted_mean: bool = False) -> None:
        super().__init__(weighted_mean=weighted_mean)
        problems = []
        if window is not None and (not isinstance(window, int) or window < 1):
            problems.append(f"window must be a number of steps of at least 1, or None, not {window!r}.")
        if not temperature > 0:
            problems.append(f"temperature must be above 0, not {temperature!r}.")
        if problems:
            raise ConstructionError(f"DynamicWeightAverage cannot be built:{listed(problems)}")
        self.window = window
        self.temperature = temperature

    def setup(self, names: tuple[str, ...]) -> None:
        self.register_buffer("sums", torch.zeros(len(names)))
        self.register_buffer("counts", torch.zeros(len(names), dtype=torch.int64))
        for mean in ("recent", "older"):  # NaN: there is none
            self.register_buffer(mean, torch.full((len(names),), torch.nan))

    def factors(self, values: Tensor, seen: Tensor, update: bool) -> Tensor:
        rates = self.recent / self.older
        rates = torch.where(rates.isfinite(), rates, 1)
        factors = len(rates) * torch.softmax(rates / self.temperature, 0)
        if update:
            self.sums.add_(values)
            self.counts.add_(seen)
            if self.window is not None:
                self._roll(self.counts >= self.window)
        return factors

    @torch.no_grad()
    def end_epoch(self) -> None:
        """Takes the means over the epoch that ends. A term that was not seen in it keeps those that it has.

        Raises:
            ArgumentError: if there is a window.
        """
        if self.window is not None:
            raise ArgumentError(
                f"This DynamicWeightAverage takes its means over windows of {self.window} steps by itself. "
                "Leave out end_epoch(), or the window."
            )
        self._roll(self.counts > 0)

    def _roll(self, ended: Tensor) -> None:
        """Takes the means of the terms whose epoch has ended."""
        self.older.copy_(torch.where(ended, self.recent, self.older))
        self.recent.copy_(torch.where(ended, self.sums / self.counts, self.recent))
        self.sums.masked_fill_(ended, 0)
        self.counts.masked_fill_(ended, 0)

    def extra_repr(self) -> str:
        shown = [f"window={self.window}"] if self.window is not None else []
        shown += [f"temperature={self.temperature:g}", super().extra_repr()]
        return ", ".join(filter(None, shown))
