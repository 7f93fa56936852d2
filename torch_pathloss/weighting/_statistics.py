"""What the weightings share that keep statistics of each term."""

from __future__ import annotations

import torch
from torch import Tensor

TINY = 1e-8
"""What takes the place of a smaller denominator. A statistic of a loss is as small only where the loss is 0."""


def finite_in(state: Tensor, values: Tensor, seen: Tensor) -> tuple[Tensor, Tensor]:
    """Returns values in the dtype of the state, 0 where they do not fit, and which do: 1e39 is infinite in float32."""
    values = values.to(state.dtype)
    seen = seen & values.isfinite()
    return torch.where(seen, values, 0), seen


def shares(scores: Tensor, ready: Tensor, seen: Tensor) -> Tensor:
    """Returns factors that sum to 1 over the terms that are seen.

    Each of the terms gets an equal share at first. Those that are ready then divide theirs anew, in proportion to
    their scores, so that a term which joins late neither waits with a factor of 0 nor takes from the others.

    Args:
        scores: ``[K]``, not negative, and finite where ``ready``.
        ready: ``[K]``, bool: whether a term has the statistics that its score needs.
        seen: ``[K]``, bool. The factors of the other terms are 0.
    """
    equal = seen / seen.sum().clamp(min=1)
    scores = torch.where(ready & seen, scores, 0)
    total = scores.sum()
    divided = scores * (torch.where(ready, equal, 0).sum() / torch.where(total == 0, 1, total))
    return torch.where(ready & (total > 0), divided, equal).to(scores.dtype)
