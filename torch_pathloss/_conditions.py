"""Missing labels: masks from the marks that data sets put in the place of what is not known."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor

from torch_pathloss import _tree
from torch_pathloss._errors import ArgumentError, ConstructionError
from torch_pathloss._term import Shared, Source

Per: TypeAlias = Literal["sample", "element"]


def known(source: Source, *, missing: float = math.nan, per: Per = "sample") -> Shared:
    """Returns a source of the mask of what is known: the ``where`` of a term whose labels are missing for some samples.

    Args:
        source: where the labels come from, such as ``Target("age")``.
        missing: what stands for a missing label: NaN, or a number such as -1 or -100. Default: NaN.
        per: ``"sample"`` for a mask of the first dimension, in which a sample is known if all of its elements are;
            ``"element"`` for a mask of all dimensions, for criteria that compare element by element and for pixels.
            Default: ``"sample"``.

    Raises:
        ConstructionError: if ``source`` is no source, ``missing`` no number, or ``per`` is unknown.
        ArgumentError: in a call, if the labels are no tensor, or their type cannot hold the mark, so that nothing
            would ever be missing.

    Examples:
        >>> import torch
        >>> from torch import nn
        >>> from torch_pathloss import PathLossModule, Target, Term, known
        >>> age = Term(nn.MSELoss(reduction="none"), where=known(Target("age")), reduction="mean")
        >>> criterion = PathLossModule({"age": age})
        >>> output = {"age": torch.tensor([30.0, 40.0], requires_grad=True)}
        >>> loss = criterion(output, {"age": torch.tensor([33.0, torch.nan])})
        >>> loss.backward()
        >>> loss.item(), output["age"].grad.tolist()  # 3 squared, and twice the difference
        (9.0, [-6.0, 0.0])
    """
    if not isinstance(source, Source):
        raise ConstructionError(f"known() needs a source, such as Target('age'), not {source!r}.")
    if isinstance(missing, bool) or not isinstance(missing, (int, float)):
        raise ConstructionError(
            f"known() needs the number that marks a missing label, such as math.nan or -1, not {missing!r}. "
            "Labels of which some are None are no tensor yet: fill them where batches are made, with "
            "torch_pathloss.filled(labels)."
        )
    if per not in ("sample", "element"):
        raise ConstructionError(f"per must be one of 'sample', 'element', not {per!r}.")
    if math.isnan(missing):
        return Shared(is_not_nan, source, per=per)
    return Shared(is_not, source, missing=missing, per=per)


def is_not_nan(labels: Any, per: Per) -> Tensor:
    """Returns which labels are not NaN."""
    _check_tensor(labels)
    if not _can_hold(labels.dtype, math.nan):
        raise ArgumentError(
            f"known() looks for NaN in labels of {labels.dtype}, which cannot hold it. "
            "Say what marks a missing label, as in known(source, missing=-1)."
        )
    return _per(per, ~labels.isnan())


def is_not(labels: Any, missing: float, per: Per) -> Tensor:
    """Returns which labels are not the mark."""
    _check_tensor(labels)
    if not _can_hold(labels.dtype, missing):
        raise ArgumentError(
            f"known() looks for {missing!r} in labels of {labels.dtype}, which cannot hold it. "
            "Mark missing labels with a number of their type, or give them a type that can."
        )
    return _per(per, labels != missing)


def _per(per: Per, is_known: Tensor) -> Tensor:
    return is_known if per == "element" or is_known.ndim < 2 else is_known.flatten(1).all(1)


def _check_tensor(labels: Any) -> None:
    if not isinstance(labels, Tensor):
        raise ArgumentError(
            f"known() needs labels in one tensor, not {_tree.describe(labels)}. "
            "Make it where batches are made, with torch_pathloss.filled(labels)."
        )


def _can_hold(dtype: torch.dtype, number: float) -> bool:
    if dtype is torch.bool or dtype.is_complex:
        return False
    if dtype.is_floating_point:
        return not math.isfinite(number) or abs(number) <= torch.finfo(dtype).max
    limits = torch.iinfo(dtype)
    return math.isfinite(number) and number == int(number) and limits.min <= number <= limits.max


def filled(labels: Sequence[Any], *, missing: float = math.nan) -> Tensor | None:
    """Returns the labels of the samples of a batch, of which some are `None`, as one tensor with marks in their places.

    For the function that makes batches (``collate_fn``): a list whose `None` stand elsewhere in each batch would be
    another structure each time, and compiled anew.

    Args:
        labels: a tensor, a number or `None` for each sample. Tensors have one shape and type.
        missing: what stands in every element of a missing label. Default: NaN.

    Returns:
        The labels with a new first dimension, or `None` if all are missing, which makes the term absent.

    Raises:
        ArgumentError: if the type of the labels cannot hold the mark.

    Examples:
        >>> import torch
        >>> from torch_pathloss import filled
        >>> filled([33.0, None, 27.0])
        tensor([33., nan, 27.])
        >>> filled([torch.tensor([1, 2]), None], missing=-1)
        tensor([[ 1,  2],
                [-1, -1]])
    """
    some = next((label for label in labels if isinstance(label, Tensor)), None)
    if some is None:  # numbers, which have no type yet
        numbers = [missing if label is None else label for label in labels]
        return None if all(label is None for label in labels) else torch.tensor(numbers)
    if not _can_hold(some.dtype, missing):
        raise ArgumentError(
            f"filled() would mark missing labels of {some.dtype} with {missing!r}, which that type cannot hold. "
            "Mark them with another number, as in filled(labels, missing=-1)."
        )
    mark = torch.full_like(some, missing)
    return torch.stack([mark if label is None else label for label in labels])
