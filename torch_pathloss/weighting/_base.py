"""What every weighting is: state for each term, values and a seen mask in, a total and effective weights out."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from torch_pathloss._errors import ConstructionError
from torch_pathloss._names import names_from_tensor, names_to_tensor
from torch_pathloss._paths import Path
from torch_pathloss._ranks import sum_over_ranks
from torch_pathloss._term import Present
from torch_pathloss._weights import keep_float32

Self = TypeVar("Self", bound="Weighting")


class Weighted(NamedTuple):
    """What a weighting returns."""

    total: Tensor
    """The scalar to differentiate."""
    weights: Tensor
    """The effective weights ``[K]``, detached: the derivative of the total by each value; 0 for a term not seen."""


class Weighting(nn.Module, ABC):
    """A rule from the values of the terms to a total. Its state is in buffers and parameters.

    A subclass makes its state in `setup` and combines values in `forward`. State changes only where `updates()` says
    so, in place, without a read from the device and without a branch on data.
    """

    uses_gradients: ClassVar[bool] = False
    """Whether `forward` is given ``norms``, the norm of the gradient of each value at the outputs, in calls that record
    gradients. Such a weighting has no parameters, which would get no gradient; its total is the sum of weight times
    value."""

    feature: str | Path | None = None
    """The path in the output of the tensor at which ``norms`` are taken instead."""

    def __init__(self) -> None:
        super().__init__()
        self._names: tuple[str, ...] = ()
        self.register_load_state_dict_pre_hook(_refuse_other_names)  # type: ignore[no-untyped-call]

    def bind(self: Self, names: Sequence[str]) -> Self:
        """Makes the state for these terms, and returns the weighting. The container calls it, once.

        Raises:
            ConstructionError: if the weighting is bound already, or does not fit the terms.
        """
        if self._names:
            raise ConstructionError(
                f"This {type(self).__name__} keeps the state of the terms {', '.join(map(repr, self._names))} already. "
                "Make one weighting for each criterion."
            )
        self.setup(tuple(names))
        self._names = tuple(names)
        return self

    @abstractmethod
    def setup(self, names: tuple[str, ...]) -> None:
        """Registers buffers and parameters for terms of these names."""

    @abstractmethod
    def forward(
        self, values: Tensor, seen: Tensor, weights: Tensor | None = None, norms: Tensor | None = None
    ) -> Weighted:
        """Combines the values of one call.

        Args:
            values: ``[K]``, differentiable, at least float32; 0 for a term that is not seen.
            seen: ``[K]``, bool: whether each term is present in this call, with a selection that is not empty.
            weights: ``[K]``, detached: the weights that the user set. Default: all 1.
            norms: ``[K]``, detached: see `uses_gradients`.
        """

    def updates(self) -> bool:
        """Whether a call changes the state: in training mode, and where gradients are recorded."""
        return self.training and torch.is_grad_enabled()

    def check_present(self, present: Sequence[Present]) -> None:
        """Raises if the weighting cannot do without a term that is absent."""

    def get_extra_state(self) -> Tensor:
        """Returns the names as a tensor of bytes, so that a checkpoint gives state to the term that it belongs to."""
        return names_to_tensor(self._names)

    def set_extra_state(self, state: Tensor) -> None:
        """Does nothing: the names were compared before anything was loaded."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Weighting:
        keep_float32(self, fn, super()._apply)
        return self


class Factors(Weighting):
    r"""A weighting that multiplies each value by a factor which is no function of the gradient.

    With :math:`w_k` the weights that the user set, :math:`f_k` the factors and :math:`S` the terms that are seen, the
    effective weights are :math:`e_k = w_k f_k` for :math:`k \in S` and 0 for the others, and the total is
    :math:`\sum_k e_k v_k`.

    Args:
        weighted_mean: whether the effective weights are divided by their sum, so that the total is a mean.
            Default: ``False``.
    """

    def __init__(self, *, weighted_mean: bool = False) -> None:
        super().__init__()
        self.weighted_mean = weighted_mean

    @abstractmethod
    def factors(self, values: Tensor, seen: Tensor, update: bool) -> Tensor:
        """Returns the factors ``[K]``, and changes the state if ``update``. Runs without gradients.

        Args:
            values: ``[K]``, detached: the mean of each value over the processes that saw a finite one; else 0.
            seen: ``[K]``, bool: whether any process saw a finite value.
            update: whether to change the state.
        """

    def forward(
        self, values: Tensor, seen: Tensor, weights: Tensor | None = None, norms: Tensor | None = None
    ) -> Weighted:
        update = self.updates()
        with torch.no_grad():
            effective = self.factors(*over_ranks(values.detach(), seen), update).to(values.dtype)
            if weights is not None:
                effective = effective * weights
            effective = torch.where(seen, effective, 0)
            if self.weighted_mean:
                share = effective.sum()
                effective = effective / torch.where(share == 0, 1, share)
        return Weighted(torch.dot(values, effective), effective)

    def extra_repr(self) -> str:
        return "weighted_mean=True" if self.weighted_mean else ""


def over_ranks(values: Tensor, seen: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the mean of each value over the processes that saw a finite one, 0 where none did, and whether any did.

    A loss that is not finite, which a GradScaler skips, must not stay in a moving average for ever.
    """
    seen = seen & values.isfinite()
    summed = sum_over_ranks(torch.stack([torch.where(seen, values, 0), seen.to(values.dtype)]))
    return summed[0] / summed[1].clamp(min=1), summed[1] > 0


def _refuse_other_names(
    module: Weighting, state: dict[str, Any], prefix: str, _: Any, __: bool, ___: Any, ____: Any, errors: list[str]
) -> None:
    saved = state.get(f"{prefix}_extra_state")
    if saved is None:
        return  # torch tells what is missing
    theirs = names_from_tensor(saved)
    if theirs == list(module._names):
        return
    for key in [key for key in state if key.startswith(prefix)]:  # so that nothing is changed
        if (own := module.state_dict().get(key.removeprefix(prefix))) is not None:
            state[key] = own
    errors.append(
        f"The state of {type(module).__name__} was saved for the terms {theirs}, and this criterion has "
        f"{list(module._names)}. Give the terms in the same order, since an optimizer's state is kept by position, "
        f"or load without the keys that start with {prefix!r}."
    )
