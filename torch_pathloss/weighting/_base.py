"""What every weighting is: state for each term, values and a seen mask in, a total and effective weights out."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from torch_pathloss import _paths
from torch_pathloss._errors import ArgumentError, ConstructionError, PathLossError, listed
from torch_pathloss._names import Names, names_from_tensor, names_to_tensor
from torch_pathloss._paths import Path
from torch_pathloss._ranks import sum_over_ranks, world_size
from torch_pathloss._term import Present

Self = TypeVar("Self", bound="Weighting")
Option = TypeVar("Option")


class Weighted(NamedTuple):
    """What a weighting returns."""

    total: Tensor
    """The scalar to differentiate."""
    weights: Tensor
    """The effective weights ``[K]``, detached: the derivative of the total by each value; 0 for a term not seen."""


class Weighting(nn.Module, ABC):
    """A rule from the values of the terms to a total. Its state is in buffers and parameters.

    A subclass makes its state in `setup` and combines values in `forward`. State changes only where `updates()` says
    so, in place, without a read from the device and without a branch on data. What is made of state that the same call
    changes goes through `pinned` before it meets the values.
    """

    uses_gradients: ClassVar[bool] = False
    """Whether `forward` is given ``norms``, the norm of the gradient of each value at the outputs, in training.
    Such a weighting has no parameters, which would get no gradient; its total is the sum of weight times
    value."""

    feature: Path | None = None
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

    def by_name(
        self, option: str, given: Option | Mapping[str | Path, Option], names: Sequence[str], default: Option
    ) -> list[Option]:
        """Returns an option for each term: one value for all, or a mapping by name, in any spelling.

        Raises:
            ConstructionError: if the mapping names a term that does not exist.
        """
        if not isinstance(given, Mapping):
            return [given] * len(names)
        known, found, problems = Names(map(_paths.parse_name, names)), [default] * len(names), []
        for name, value in given.items():
            try:
                found[known.index(name)] = value
            except PathLossError as error:
                problems.append(f"{option}: {error}")
        if problems:
            raise ConstructionError(f"{type(self).__name__} does not fit the terms:{listed(problems)}")
        return found

    def needs_norms(self) -> bool:
        """Whether a call that records gradients has to compute those of each term."""
        return self.uses_gradients and self.training

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
        """Leaves nothing below float32: a learned number in bfloat16 would not move by a small step."""

        def keep(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            if tensor.is_floating_point() and moved.dtype.itemsize < 4 <= tensor.dtype.itemsize:
                return tensor.to(moved.device)
            return moved

        super()._apply(keep, recurse)  # type: ignore[no-untyped-call]
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
            values: ``[K]``, detached: the mean of each value over the processes that saw a finite one; else 0. Without
                ``update`` those of this process, which may be the only one that evaluates.
            seen: ``[K]``, bool: whether any process saw a finite value.
            update: whether to change the state.
        """

    def forward(
        self, values: Tensor, seen: Tensor, weights: Tensor | None = None, norms: Tensor | None = None
    ) -> Weighted:
        update = self.updates()
        with torch.no_grad():
            effective = self.factors(*over_ranks(values.detach(), seen, update), update)
            if weights is not None:
                effective = effective * weights
            effective = torch.where(seen, effective, 0)
            if self.weighted_mean:
                share = effective.sum()
                effective = effective / torch.where(share == 0, 1, share)
            effective = pinned(effective)
        return Weighted((values * effective).sum(), effective)  # torch.dot would not promote float32 factors to float64

    def extra_repr(self) -> str:
        return "weighted_mean=True" if self.weighted_mean else ""


def over_ranks(values: Tensor, seen: Tensor, together: bool = True) -> tuple[Tensor, Tensor]:
    """Returns the mean of each value over the processes that saw a finite one, 0 where none did, and whether any did.

    A loss that is not finite, which a GradScaler skips, must not stay in a moving average for ever.

    Args:
        values: ``[K]``, detached.
        seen: ``[K]``, bool.
        together: whether every process calls this. `Weighting.updates` says so: an evaluation may run on one alone,
            and would wait for the others for ever.
    """
    seen = seen & values.isfinite()
    if not together or world_size() == 1:
        return torch.where(seen, values, 0), seen
    summed = sum_over_ranks(torch.stack([torch.where(seen, values, 0), seen.to(values.dtype)]))
    return summed[0] / summed[1].clamp(min=1), summed[1] > 0


def pinned(tensor: Tensor) -> Tensor:
    """Returns a tensor of at least one dimension that compiled code keeps for backward instead of computing it again.

    What is made of state that the same call changes must go through this before it meets the values. Else Inductor's
    partitioner may compute it again in backward, from the state of the next step, and the gradients are silently wrong
    (https://github.com/pytorch/pytorch/pull/197039, torch 2.11 to 2.13). It computes again only what is on its list of
    cheap operations, where flip is not; a flip costs no kernel of its own.

    Raises:
        ArgumentError: under ``activation_memory_budget`` below 1, by which everything is computed again.
    """
    if not torch.compiler.is_compiling():
        return tensor
    if torch._functorch.config.activation_memory_budget < 1:
        raise ArgumentError(
            "A weighting cannot be compiled with torch._functorch.config.activation_memory_budget below 1, by which "
            "backward would compute its weights again from the state of the next step. Set it to 1, or do not compile "
            "the criterion."
        )
    return tensor.flip(0).flip(0)


def equal_to(mean: Tensor, values: Tensor, seen: Tensor) -> Tensor:
    """Returns a tensor that equals the mean values of `over_ranks`, and whose derivative by this process's own is 1.

    For a total that is no sum: made of the mean values, it gives every process the same effective weights, so that the
    mean of the gradients over the processes is the gradient of the total. NaN where an own value is not finite.
    """
    return torch.where(seen, values - values.detach(), 0) + mean


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
