"""What each of two processes does in `test_distributed.py`. Run as ``python _ranks.py RANK FILE CASE``."""

from __future__ import annotations

import sys

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from torch_pathloss import PathLossModule


class Heads(nn.Module):
    """Two heads over one body, and a criterion with a parameter of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.a, self.b = nn.Linear(3, 4), nn.Linear(4, 2), nn.Linear(4, 1)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        x = self.body(x).tanh()
        return {"a": self.a(x), "b": self.b(x)}


def data(rank: int | None) -> tuple[Tensor, dict[str, Tensor]]:
    """Returns the rows of one rank, or all of them."""
    generator = torch.Generator().manual_seed(7)
    x, a, b = (torch.randn(8, n, generator=generator) for n in (3, 2, 1))
    rows = slice(None) if rank is None else slice(4 * rank, 4 * rank + 4)
    return x[rows], {"a": a[rows], "b": b[rows]}


def model_and_criterion() -> tuple[nn.Module, PathLossModule]:
    torch.manual_seed(0)
    return Heads(), PathLossModule({"a": nn.MSELoss(), "b": nn.L1Loss()}, weights={"b": 0.5})


def gradients(model: nn.Module) -> dict[str, Tensor | None]:
    return {name.removeprefix("module."): p.grad for name, p in model.named_parameters()}


def work(rank: int, case: str) -> object:
    model, criterion = model_and_criterion()
    x, target = data(rank)
    order: list[str] = []
    for name, parameter in model.named_parameters():
        parameter.register_post_accumulate_grad_hook(lambda _, name=name: order.append(name))
    ddp = DistributedDataParallel(model)
    # the head b has no target on rank 1; DDP waits for its parameters all the same
    given = {**target, "b": None} if case.startswith("absent") and rank == 1 else target
    if case.startswith("compiled"):
        criterion.compile(backend="aot_eager")
    for _ in range(2):  # the second step finds the buckets rebuilt
        order.clear()
        for parameter in model.parameters():
            parameter.grad = None
        if case.endswith("backward"):
            criterion.backward(ddp(x), given)
        elif case.endswith("consume"):
            criterion.backward(ddp(x), given, consume=True)
        elif case == "grad_in_forward":
            PathLossModule({"a": nn.MSELoss(), "b": nn.L1Loss()}, weights={"b": 0.5}, grad_in_forward=True)(
                ddp(x), given
            ).backward()
        else:
            criterion(ddp(x), given).backward()
    return {"gradients": gradients(ddp), "hooks": sorted(order)}


def main() -> None:
    rank, file, case = int(sys.argv[1]), sys.argv[2], sys.argv[3]
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=2)
    try:
        torch.save(work(rank, case), f"{file}.{rank}")
        dist.barrier()
    finally:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
