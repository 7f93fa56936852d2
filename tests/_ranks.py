"""What each of two processes does in `test_distributed.py`. Run as ``python _ranks.py RANK FILE CASE``."""

from __future__ import annotations

import contextlib
import sys

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from torch_pathloss import PathLossModule, Shared, Target, Term


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


class Detector(nn.Module):
    """Three boxes and four tokens for each sample, in double precision."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body, self.box, self.token = nn.Linear(3, 4), nn.Linear(4, 6), nn.Linear(4, 4)
        self.double()

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        x = self.body(x).tanh()
        return {"box": self.box(x).unflatten(1, (3, 2)), "token": self.token(x)}


SPLIT = 5  # rank 0 has five samples, rank 1 three
MICRO = {"equal": ([2, 1, 1, 1], [1, 0, 1, 1]), "unequal": ([1, 4], [2, 0, 1])}  # samples of each micro-batch, by rank


def detections(case: str = "") -> tuple[Tensor, dict[str, Tensor]]:
    """Returns all samples. The last three, those of rank 1, have no box; what is not valid is NaN."""
    generator = torch.Generator().manual_seed(3)
    x, box, token = (torch.randn(8, *n, generator=generator, dtype=torch.float64) for n in ((3,), (3, 2), (4,)))
    boxes = torch.tensor([3, 1, 2, 0, 1, 0, 0, 0]) * ("no boxes" not in case)
    tokens = torch.tensor([1, 4, 0, 2, 3, 0, 1, 0])
    has_box, has_token = torch.arange(3) < boxes[:, None], torch.arange(4) < tokens[:, None]
    target = {
        "box": torch.where(has_box[..., None], box, torch.nan),
        "token": torch.where(has_token, token, torch.nan),
        "has_box": has_box,
        "has_token": has_token,
    }
    return x, target


def normalized_criterion() -> PathLossModule:
    box = Term(nn.L1Loss(reduction="none"), where=Target("has_box"), reduction="sum", normalizer=Target("has_box"))
    count = Shared(torch.sum, Target("has_token"))
    token = Term(nn.MSELoss(reduction="none"), where=Target("has_token"), reduction="sum", normalizer=count)
    return PathLossModule({"box": box, "token": token}, weights={"token": 0.5})


def rows(tree: object, start: int, end: int) -> object:
    return {name: tensor[start:end] for name, tensor in tree.items()} if isinstance(tree, dict) else tree[start:end]


NORMALIZED = [
    "call",
    "backward",
    "compiled call",
    "compiled backward",
    "call, no boxes",
    "call, absent",
    "compiled call, absent",
    "micro-batches",
    "unequal micro-batches",
    "micro-batches, no boxes",
    "compiled micro-batches",
]


def normalized(rank: int, case: str) -> object:
    x, target = (rows(tree, *((0, SPLIT), (SPLIT, 8))[rank]) for tree in detections(case))
    model, criterion = Detector(), normalized_criterion()
    ddp = DistributedDataParallel(model)
    if "compiled" in case:
        criterion.compile(backend="aot_eager")
    if "absent" in case and rank == 1:
        target = {**target, "box": None, "has_box": None}
    if "micro" in case:
        loss = accumulated(ddp, criterion, x, target, MICRO["unequal" if "unequal" in case else "equal"][rank])
    elif "backward" in case:
        loss = criterion.backward(ddp(x), target)
    else:
        loss = criterion(ddp(x), target)
        loss.backward()
    return {"loss": loss.detach(), "gradients": gradients(ddp), "log": criterion.last.log()}


def accumulated(ddp: DistributedDataParallel, criterion: PathLossModule, x: Tensor, target: object, sizes: list[int]):
    starts = [sum(sizes[:i]) for i in range(len(sizes))]
    xs, targets = ([rows(t, i, i + n) for i, n in zip(starts, sizes, strict=True)] for t in (x, target))
    total = torch.zeros((), dtype=x.dtype)
    with criterion.accumulate(targets):
        for i, (part, t) in enumerate(zip(xs, targets, strict=True)):
            with contextlib.nullcontext() if i == len(xs) - 1 else ddp.no_sync():
                loss = criterion(ddp(part), t) / len(xs)
                loss.backward()
            total += loss.detach()
    return total


def main() -> None:
    rank, file, case = int(sys.argv[1]), sys.argv[2], sys.argv[3]
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=2)
    try:
        found = {each: normalized(rank, each) for each in NORMALIZED} if case == "normalized" else work(rank, case)
        torch.save(found, f"{file}.{rank}")
        dist.barrier()
    finally:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
