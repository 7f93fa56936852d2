"""Sums over the processes of torch.distributed, where there are several."""

from __future__ import annotations

import torch.distributed as dist
from torch import Tensor


def world_size() -> int:
    """Returns the number of processes of the default group; 1 without one."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def sum_over_ranks(tensor: Tensor) -> Tensor:
    """Returns the sum of a tensor over all processes, without gradient. Every process has to call it.

    The tensor itself where there is one process only. Traces under Dynamo.
    """
    if world_size() == 1:
        return tensor
    total = tensor.detach().clone()
    dist.all_reduce(total)
    return total
