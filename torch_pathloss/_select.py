"""Selecting samples: masks, and arguments that are safe where a mask selects nothing.

Where a loss is masked after it was computed, its gradient is NaN as soon as one of its factors is (0 times NaN).
So the arguments of samples that are not selected are replaced before the criterion sees them: by those of a sample
that is selected, which the criterion has to stand anyway, or by a constant where there is none.
No boolean indexing: shapes do not depend on the mask, and nothing is read from the device.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from torch_pathloss import _tree
from torch_pathloss._errors import ArgumentError, CriterionReturnError

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


def safe(argument: Any, mask: Tensor, is_first: bool, elementwise: bool, classwise: bool) -> Any:
    """Returns an argument, a tensor or a tree of them, with other values where nothing is selected.

    Args:
        argument: what a criterion would be called with.
        mask: bool, 0-dim or with one element a sample.
        is_first: whether it is the criterion's first argument.
        elementwise, classwise: whether the criterion is known to compare element by element, or to have its classes
            in the second dimension of its arguments.

    Raises:
        ArgumentError: if a tensor has no sample for each element of the mask.
    """
    constant = _FIRST if is_first else _OTHER

    def replaced(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        if mask.ndim == 0:
            return torch.where(mask, leaf, _constant(leaf, constant))
        if leaf.ndim == 0:
            return torch.where(mask.any(), leaf, _constant(leaf, constant))
        if _has_classes(leaf, mask, elementwise, classwise):
            return _rows_replaced(leaf.movedim(1, -1), mask, constant).movedim(-1, 1)
        return _rows_replaced(leaf, mask, constant)

    return replaced(argument) if isinstance(argument, Tensor) else _tree.map_leaves(replaced, argument)


def _has_classes(leaf: Tensor, mask: Tensor, elementwise: bool, classwise: bool) -> bool:
    """Whether the second dimension of a tensor is not one of the mask's, as in the logits of a cross-entropy."""
    leading = leaf.shape[: mask.ndim] == mask.shape
    behind_classes = mask.ndim > 1 and leaf.shape[:1] + leaf.shape[2:] == mask.shape
    if not leading and not behind_classes:
        raise ArgumentError(
            f"its where has shape {tuple(mask.shape)}, but an argument has shape {tuple(leaf.shape)}. "
            "The first dimensions of every argument from the output and the target must be those of where, or those of "
            "(N, C, d1, ...) where it is (N, d1, ...). Give what is not per sample as an Input or a constant."
        )
    if leading and behind_classes and not elementwise and not classwise:
        raise ArgumentError(
            f"its where has shape {tuple(mask.shape)} and an argument {tuple(leaf.shape)}, "
            "which may be read as (N, d1, ...) or as (N, C, d1, ...). "
            "Give where as many dimensions as the argument has, or one dimension."
        )
    return behind_classes and (classwise or not leading)


def _rows_replaced(leaf: Tensor, mask: Tensor, constant: float) -> Tensor:
    spread = mask.reshape(mask.shape + (1,) * (leaf.ndim - mask.ndim))
    if mask.numel() == 0:
        return leaf
    # A tensor of one element as the index: a 0-dim one would be read from the device.
    flat = mask.reshape(-1).to(torch.uint8).argmax().reshape(1)
    indices = []
    for size in reversed(mask.shape):
        indices.append(flat % size)
        flat = flat // size
    selected = leaf.detach()[tuple(reversed(indices))]
    return torch.where(spread, leaf, torch.where(mask.any(), selected, _constant(leaf, constant)))


def _constant(leaf: Tensor, constant: float) -> Tensor:
    """Returns a constant of the same dtype; integers and bools get 0."""
    is_number = leaf.is_floating_point() or leaf.is_complex()
    return torch.full((), constant if is_number else 0, dtype=leaf.dtype, device=leaf.device)


def call_guarded(module: nn.Module, mask: Tensor, positional: list[Any], keywords: dict[str, Any]) -> Any:
    """Calls a criterion whose parameters get no gradient, not even NaN, where nothing is selected."""
    own = {name: parameter for name, parameter in module.named_parameters() if parameter.requires_grad}
    if not own:
        return module(*positional, **keywords)
    any_selected = mask.any()
    guarded = {name: torch.where(any_selected, parameter, parameter.detach()) for name, parameter in own.items()}
    return torch.func.functional_call(module, guarded, tuple(positional), keywords)
