"""A model with a criterion and a weighting, and its training. Run as ``python _container.py FOLDER`` it goes on."""

from __future__ import annotations

import pathlib
import sys
from typing import Any

import torch
from _cases import CASES, Case
from torch import Tensor, nn

from torch_pathloss import PathLossModule, Term
from torch_pathloss.schedules import alternate, linear


class Heads(nn.Module):
    """Heads over one feature, which is an output too."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.a, self.c, self.d = nn.Linear(3, 4), nn.Linear(4, 2), nn.Linear(4, 1), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> dict[str, Any]:
        feature = self.body(x).tanh()
        return {"a": self.a(feature), "b": {"c": self.c(feature)}, "d": [self.d(feature)], "feature": feature}


def criterion_of(case: Case, where: Any = None, schedules: bool = False, **keywords: Any) -> PathLossModule:
    losses = {"a": Term(nn.MSELoss(), where=where), "b.c": nn.L1Loss(), "d.*": nn.MSELoss()}
    weights = {"b.c": 0.5, "d.*": 2.0}
    if schedules:
        weights = {"b.c": linear(0.5, 1.0, steps=8), "d.*": 2.0 * alternate(3, 2) + alternate(3, 2, phase=1)}
    return PathLossModule(losses, weights=weights, weighting=case.make(), **keywords)


def batch(step: int) -> tuple[Tensor, dict[str, Any]]:
    """Returns a batch that the step alone decides; in every third there is no target for one of the terms."""
    generator = torch.Generator().manual_seed(step)
    x, a, c, d = (torch.randn(6, n, generator=generator) for n in (3, 2, 1, 2))
    return x, {"a": a, "b": {"c": c}, "d": [d]}


def train(
    case: Case, steps: range, how: str = "forward", backend: Any = None, save: Any = None, load: Any = None
) -> tuple[Heads, PathLossModule, list[dict[str, float]]]:
    """Trains for some steps and returns the model, the criterion, and what each step logged."""
    torch.manual_seed(0)
    heads, criterion = Heads(), criterion_of(case, schedules=True, grad_in_forward=how == "grad_in_forward")
    optimizer = torch.optim.SGD([*heads.parameters(), *criterion.parameters()], lr=0.01, momentum=0.9)
    if load is not None:
        state = torch.load(load, weights_only=True)
        for part, name in ((heads, "model"), (criterion, "criterion"), (optimizer, "optimizer")):
            part.load_state_dict(state[name])
    call: Any = criterion
    if how == "compiled by torch":
        call = torch.compile(criterion, backend=backend, fullgraph=True)
    elif backend is not None:
        criterion.compile(backend=backend)
    logs = []
    for step in steps:
        x, target = batch(step)
        optimizer.zero_grad()
        if how.endswith("backward"):
            criterion.backward(heads(x), target)
        else:
            call(heads(x), target).backward()
        optimizer.step()
        case.after(criterion.weighting, step, *after(criterion, heads, x, target))
        criterion.step()
        logs.append(criterion.last.log())
    if save is not None:
        state = {"model": heads, "criterion": criterion, "optimizer": optimizer}
        torch.save({name: part.state_dict() for name, part in state.items()}, save)
    return heads, criterion, logs


@torch.no_grad()
def after(criterion: PathLossModule, heads: Heads, x: Tensor, target: Any) -> tuple[Tensor, Tensor]:
    """Returns the values after the step, as `PathLossModule.update` does, and that all terms are seen."""
    values = torch.stack(list(criterion.terms(heads(x), target).values()))
    return values, torch.ones(len(values), dtype=torch.bool)


def resumed(folder: pathlib.Path) -> None:
    for number, case in enumerate(CASES):
        heads, criterion, logs = train(case, range(10, 20), load=folder / f"{number}.pt")
        found = {"logs": logs, "model": heads.state_dict(), "criterion": criterion.state_dict()}
        torch.save(found, folder / f"{number}.pt.resumed")


if __name__ == "__main__":
    torch.set_num_threads(1)
    resumed(pathlib.Path(sys.argv[1]))
