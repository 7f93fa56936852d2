"""What each of two processes does in `test_laws.py`. Run as ``python _processes.py RANK FILE``."""

from __future__ import annotations

import sys

import torch
import torch.distributed as dist
from _cases import CASES, Case, norms_of, seen_at, state_of, values_of


def work(case: Case, rank: int) -> dict[str, object]:
    """Trains on values of its own, without DistributedDataParallel; the process 1 misses what the other sees."""
    weighting = case.bound()
    optimizer = torch.optim.SGD(weighting.parameters(), lr=0.1) if list(weighting.parameters()) else None
    effective = []
    for step in range(6):
        seen = seen_at(step + rank) if step else torch.ones(3, dtype=torch.bool)
        values = torch.where(seen, values_of(10 * step + rank), 0).requires_grad_()
        total, weights = weighting(values, seen, None, norms_of(weighting, step + 10 * rank))
        total.backward()
        if optimizer:
            optimizer.step()
            optimizer.zero_grad()
        case.after(weighting, step, values.detach() / 2, seen)
        effective.append((weights, seen))
    weighting.eval()
    if rank == 0:  # an evaluation on one process does not wait for the other
        weighting(values_of(0), torch.ones(3, dtype=torch.bool), None, norms_of(weighting, 0))
    return {"state": state_of(weighting), "effective": effective}


def main() -> None:
    rank, file = int(sys.argv[1]), sys.argv[2]
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=2)
    try:
        torch.save({case.name: work(case, rank) for case in CASES}, f"{file}.{rank}")
        dist.barrier()
    finally:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
