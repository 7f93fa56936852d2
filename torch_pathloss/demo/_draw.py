"""The pictures of a run."""

from __future__ import annotations

from math import nan
from typing import TYPE_CHECKING, Any

import torch
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator
from torch import Tensor, nn

from torch_pathloss.demo._data import SIZE, Canvases
from torch_pathloss.demo._display import in_words

if TYPE_CHECKING:
    from torch_pathloss.demo._train import Epoch

TRUE, PREDICTED = "#39d353", "#ff8c1a"


def curves(epochs: list[Epoch]) -> Figure:
    """Draws the total and every term over the epochs, and the validation's metrics."""
    names = [name for name in epochs[0].terms if not name.startswith("weights/")]
    columns = 4
    rows = -(-(len(names) + 1) // columns)
    figure = Figure(figsize=(3.0 * columns, 2.4 * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    numbers = [epoch.number for epoch in epochs]
    line: dict[str, Any] = {"linewidth": 1.8, "marker": "o" if len(epochs) == 1 else None}  # one point makes no line
    for axis, name in zip(axes, names, strict=False):
        axis.plot(numbers, [epoch.terms.get(name, nan) for epoch in epochs], color="#1f6feb", **line)
        axis.set_title(name.removeprefix("terms/"), fontsize=10)
        axis.set_ylim(bottom=0)
    metrics = axes[len(names)]
    for name, colour in zip(epochs[0].metrics, ("#8250df", "#1a7f37", "#bf8700"), strict=False):
        metrics.plot(numbers, [epoch.metrics[name] for epoch in epochs], label=in_words(name), color=colour, **line)
    metrics.set_title("validation", fontsize=10)
    metrics.set_ylim(0, 1.02)
    metrics.legend(fontsize=8, loc="lower right")
    for axis in axes:
        axis.grid(alpha=0.25)
        axis.tick_params(labelsize=8)
        axis.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        axis.spines[["top", "right"]].set_visible(False)
    for axis in axes[len(names) + 1 :]:
        axis.set_visible(False)
    for axis in axes[max(0, len(names) + 1 - columns) :]:
        axis.set_xlabel("epoch", fontsize=9)
    figure.supylabel("mean over the epoch", fontsize=9)
    return figure


@torch.no_grad()
def predictions(model: nn.Module, canvases: Canvases, columns: int = 8, rows: int = 3) -> Figure:
    """Draws canvases with the true box and the predicted one, and what the model takes the digit for."""
    model.eval()
    batch = canvases.batch(torch.arange(columns * rows))
    output = model(batch.images)
    figure = Figure(figsize=(1.35 * columns, 1.6 * rows + 0.6), layout="constrained")
    for number, axis in enumerate(figure.subplots(rows, columns, squeeze=False).ravel()):
        axis.imshow(batch.images[number, 0].cpu(), cmap="gray", vmin=0, vmax=1, extent=(0, SIZE, SIZE, 0))
        axis.set_axis_off()
        confidence = output["detection"]["confidence"][number].sigmoid().item()
        label = int(batch.target["classification"][number])
        guess = int(output["classification"][number].argmax())
        if label >= 0:
            _box(axis, batch.target["detection"]["bbox"][number], TRUE, "-")
        if confidence > 0.5:
            _box(axis, output["detection"]["bbox"][number], PREDICTED, "--")
        says = f"{guess}" if confidence > 0.5 else "empty"
        right = says == (f"{label}" if label >= 0 else "empty")
        truth = "" if right else f" (is {label if label >= 0 else 'empty'})"
        axis.set_title(f"{says}{truth}  {confidence:.0%}", fontsize=8, color="black" if right else "#cf222e")
    handles = [
        Rectangle((0, 0), 1, 1, fill=False, edgecolor=TRUE, linewidth=1.8, label="true box"),
        Rectangle((0, 0), 1, 1, fill=False, edgecolor=PREDICTED, linestyle="--", linewidth=1.8, label="predicted box"),
    ]
    figure.suptitle("held-out canvases: the digit read and the confidence that there is one", fontsize=9)
    figure.legend(handles=handles, loc="outside lower center", ncols=2, fontsize=9, frameon=False)
    return figure


def _box(axis: Any, box: Tensor, colour: str, style: str) -> None:
    left, top, right, bottom = (SIZE * box).tolist()
    axis.add_patch(
        Rectangle((left, top), right - left, bottom - top, fill=False, edgecolor=colour, linestyle=style, linewidth=1.6)
    )
