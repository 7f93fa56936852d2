"""Draws the pictures of docs/schedules.md and docs/conflicts.md.

python -m bench.pictures
"""

from __future__ import annotations

import pathlib
from typing import Any

import torch
from torch import nn

from torch_pathloss import Conflicts, PathLossModule, Term, plot_schedules
from torch_pathloss.demo._data import load, place
from torch_pathloss.demo._model import Detector, make_criterion, sample_weight
from torch_pathloss.demo._train import Settings, train
from torch_pathloss.schedules import alternate, cosine, cyclical, exponential, linear, one_cycle, piecewise

IMAGES = pathlib.Path(__file__).parents[1] / "docs" / "images"


def schedules() -> Any:
    weights = {
        "constant": 1.5,
        "linear": linear(0.0, 1.0, steps=50, begin=20),
        "cosine": cosine(1.0, 0.0, steps=100),
        "exponential": exponential(2.0, 0.1, steps=80),
        "piecewise": piecewise({0: 0.5, 30: linear(1.0, 2.0, steps=20), 70: 0.25}),
        "cyclical": cyclical(100, cycles=4),
        "one_cycle": one_cycle(1.0, 100),
        "alternate": 1.2 * alternate(20, 10),
        "cosine * cyclical": cosine(1.0, 0.0, steps=100) * cyclical(100, cycles=4),
    }
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8.4, 5.4), layout="constrained")
    for axis, (name, weight) in zip(figure.subplots(3, 3, sharex=True).ravel(), weights.items(), strict=True):
        plot_schedules(PathLossModule({"x": Term(nn.MSELoss(), weight=weight)}), steps=110, ax=axis)
        axis.get_legend().remove()
        axis.set_title(name, fontsize=9)
        axis.set(xlabel="", ylabel="")
        axis.set_ylim(-0.1, 2.1)
        axis.tick_params(labelsize=8)
    figure.supxlabel("step", fontsize=9)
    figure.supylabel("weight", fontsize=9)
    return figure


class _Quiet:
    def step(self, *args: Any) -> None: ...

    def epoch(self, *args: Any) -> None: ...


def conflicts() -> Conflicts:
    """Returns how the terms of the demo pull at its shared layer, after one epoch."""
    torch.manual_seed(0)
    digits, held_out = load(seed=0)
    validation = place(held_out, 1, seed=1)
    model, criterion = Detector(), make_criterion()
    train(model, criterion, digits, validation, Settings(epochs=1), _Quiet())
    output, target = model(validation.images), validation.target
    shared = [*model.stages.parameters(), *model.neck.parameters()]
    return criterion.conflicts(output, target, sample_weight=sample_weight(target), wrt=shared)


def main() -> None:
    schedules().savefig(IMAGES / "schedules.png", dpi=100)
    found = conflicts()
    print(found)
    found.plot().savefig(IMAGES / "conflicts.png", dpi=100)


if __name__ == "__main__":
    main()
