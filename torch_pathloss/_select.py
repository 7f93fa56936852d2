"""Selecting samples: masks, and arguments that are safe where a mask selects nothing.

Where a loss is masked after it was computed, its gradient is NaN as soon as one of its factors is (0 times NaN).
So the arguments of samples that are not selected are replaced before the criterion sees them: by those of a sample
that is selected, which the criterion has to stand anyway, or by a constant where there is none. Criteria of torch are
known to stand the constants, so they get them at once, which costs less.
No boolean indexing: shapes do not depend on the mask, and nothing is read from the device.
"""

from __future__ import annotations

from typing import Any, final

import torch
from torch import Tensor, nn

from torch_pathloss import _tree
from torch_pathloss._errors import ArgumentError, CriterionReturnError
from torch_pathloss._plan import Call
from torch_pathloss._term import spread

# What stands for an argument when no sample is selected: a probability, a difference from the target that a square
# root and a quotient can stand, a target that a logarithm can, and the first class.
_FIRST, _OTHER = 0.5, 1.0


def checked_mask(mask: Any, device: torch.device) -> Tensor:
    """Returns a mask if it is one.

    Raises:
        CriterionReturnError: if it is no bool tensor.
        ArgumentError: if it lies on another device than the weights.
    """
    if not isinstance(mask, Tensor) or mask.dtype is not torch.bool:
        found = f"a tensor of {mask.dtype}" if isinstance(mask, Tensor) else _tree.describe(mask)
        raise CriterionReturnError(f"its where gave {found}. It must give a bool tensor.")
    if mask.device != device:
        raise ArgumentError(
            f"its where is on {mask.device}, but the weights are on {device}. Move it to the outputs' device."
        )
    return mask.detach()


def checked_result(result: Tensor, mask: Tensor, reduces: bool) -> Tensor:
    """Returns an unreduced result if a mask of samples fits it.

    Raises:
        ArgumentError: if the criterion reduces by itself, or the shapes do not agree.
    """
    if result.ndim == 0 or not reduces:
        raise ArgumentError(
            f"its where selects samples, with shape {tuple(mask.shape)}, "
            f"but {'its criterion reduces by itself' if result.ndim == 0 else 'it has no reduction'}. "
            'Build the criterion with reduction="none" and wrap it as Term(criterion, where=..., reduction="mean").'
        )
    if mask.shape != result.shape[: mask.ndim]:
        raise ArgumentError(
            f"its where has shape {tuple(mask.shape)}, but its criterion returned shape {tuple(result.shape)}. "
            "The first dimensions must agree."
        )
    return result


@final
class Selection:
    """A mask, and what stands for the arguments of the samples that it leaves out.

    Args:
        mask: bool, 0-dim or with one element a sample.
        call: the call, which knows whether the criterion is one of torch's: these stand constants, and compare element
            by element or have their classes in the second dimension of their arguments.
    """

    def __init__(self, mask: Tensor, call: Call) -> None:
        self.mask = mask
        self._call = call
        self._is_known = call.is_elementwise or call.is_classwise
        self._first: tuple[Tensor, ...] = ()
        if mask.ndim == 0:
            self.any = mask
        elif self._is_known or mask.numel() == 0:
            self.any = mask.any()
        else:
            self.any, self._first = _first(mask)
        self._rest = ~mask if self._is_known else ~self.any

    def safe(self, argument: Any, is_first: bool) -> Any:
        """Returns an argument, a tensor or a tree of them, with other values where nothing is selected.

        Args:
            argument: what a criterion would be called with.
            is_first: whether it is the criterion's first argument.

        Raises:
            ArgumentError: if a tensor has no sample for each element of the mask.
        """

        def replaced(leaf: Any) -> Any:
            if not isinstance(leaf, Tensor):
                return leaf
            constant = _constant(leaf, is_first)
            if leaf.ndim == 0 or self.mask.ndim == 0:
                return leaf.masked_fill(~self.any, constant)
            if _has_classes(leaf, self.mask, self._call):
                return self._rows_replaced(leaf.movedim(1, -1), constant).movedim(-1, 1)
            return self._rows_replaced(leaf, constant)

        return replaced(argument) if isinstance(argument, Tensor) else _tree.map_leaves(replaced, argument)

    def _rows_replaced(self, leaf: Tensor, constant: float) -> Tensor:
        if self._is_known:
            return leaf.masked_fill(spread(self._rest, leaf), constant)
        if not self._first:  # there are no samples
            return leaf
        stand_in = leaf.detach()[self._first].masked_fill(self._rest, constant)
        return torch.where(spread(self.mask, leaf), leaf, stand_in)

    def call(self, module: nn.Module, positional: list[Any], keywords: dict[str, Any]) -> Any:
        """Calls a criterion whose parameters get no gradient, not even NaN, where nothing is selected."""
        own: dict[str, Tensor] = {}
        if module._parameters or module._modules:  # most criteria have neither
            own = {name: parameter for name, parameter in module.named_parameters() if parameter.requires_grad}
        if not own:
            return module(*positional, **keywords)
        guarded = {name: torch.where(self.any, parameter, parameter.detach()) for name, parameter in own.items()}
        return torch.func.functional_call(module, guarded, tuple(positional), keywords)


def _first(mask: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Returns whether anything is selected, and the index of a sample that is, one tensor a dimension."""
    if mask.numel() == 0:
        return mask.any(), ()
    # The index stays a tensor of one element: a 0-dim one would be read from the device.
    found, position = mask.reshape(-1).max(0, keepdim=True)
    indices: list[Tensor] = []
    for size in reversed(mask.shape[1:]):
        indices.insert(0, position % size)
        position = position // size
    return found.squeeze(0), (position, *indices)


def _has_classes(leaf: Tensor, mask: Tensor, call: Call) -> bool:
    """Whether the second dimension of a tensor is not one of the mask's, as in the logits of a cross-entropy."""
    leading = leaf.shape[: mask.ndim] == mask.shape
    behind_classes = mask.ndim > 1 and leaf.shape[:1] + leaf.shape[2:] == mask.shape
    if not leading and not behind_classes:
        raise ArgumentError(
            f"its where has shape {tuple(mask.shape)}, but an argument has shape {tuple(leaf.shape)}. "
            "The first dimensions of every argument from the output and the target must be those of where, or those of "
            "(N, C, d1, ...) where it is (N, d1, ...). Give what is not per sample as an Input or a constant."
        )
    if leading and behind_classes and not call.is_elementwise and not call.is_classwise:
        raise ArgumentError(
            f"its where has shape {tuple(mask.shape)} and an argument {tuple(leaf.shape)}, "
            "which may be read as (N, d1, ...) or as (N, C, d1, ...). "
            "Give where as many dimensions as the argument has, or one dimension."
        )
    return behind_classes and (call.is_classwise or not leading)


def _constant(leaf: Tensor, is_first: bool) -> float:
    if not (leaf.is_floating_point() or leaf.is_complex()):
        return 0
    return _FIRST if is_first else _OTHER
