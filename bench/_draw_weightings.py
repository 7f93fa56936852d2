"""Draws what bench.weightings measured."""

from __future__ import annotations

import math
import statistics
from typing import Any

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import ScalarFormatter

from bench import _digits, _toy
from bench._rules import FIXED

FIXED_COLOUR, OURS = "#bf8700", "#1f6feb"
STARTS = ("#1f6feb", "#cf222e", "#2da44e", "#8250df", "#bf8700")
COLUMNS = 6
LABELS = {"accuracy": "accuracy", "mean_iou": "mean IoU", "ink_loss": "ink loss"}


def figure(results: dict[str, Any]) -> Figure:
    """Returns paths on the toy above, and the digits' metrics below."""
    rows = math.ceil(len(results["toy"]) / COLUMNS)
    whole = Figure(figsize=(12, 2.0 * rows + 5.4), layout="constrained")
    above, below = whole.subfigures(2, 1, height_ratios=[2.0 * rows, 5.2])
    above.suptitle("toy: the path of each start, the front in grey, the end as a dot", fontsize=10)
    axes = above.subplots(rows, COLUMNS, sharex=True, sharey=True).flatten()
    grid = plane()
    for axis, (name, runs) in zip(axes, results["toy"].items(), strict=False):
        draw_paths(axis, name, runs, grid)
    for axis in axes[len(results["toy"]) :]:
        axis.set_visible(False)
    below.suptitle("digits: held-out metrics, three seeds and their mean; lines: the fixed weights", fontsize=10)
    for axis, metric in zip(below.subplots(1, len(LABELS), sharey=True), LABELS, strict=True):
        draw_metric(axis, metric, results["digits"])
    return whole


def plane() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    first, second = torch.meshgrid(torch.linspace(-11, 11, 111), torch.linspace(-11, 11, 111), indexing="xy")
    points = torch.stack([first, second], -1)
    return first, second, _toy.loss_at(points, 0) + _toy.loss_at(points, 1)


def draw_paths(axis: Axes, name: str, runs: list[dict[str, Any]], grid: tuple[torch.Tensor, ...]) -> None:
    axis.contour(*grid, levels=12, colors="#d0d7de", linewidths=0.5, linestyles="solid")
    axis.plot([-7, 7], [-8, -8], color="#8c959f", linewidth=3, solid_capstyle="round")
    for colour, found in zip(STARTS, runs, strict=False):  # the first seed
        path = _toy.points(found["path"])
        axis.plot(*zip(*path, strict=True), color=colour, linewidth=1)
        axis.plot(*path[-1], "o", color=colour, markersize=4)
    reached = sum(found["gap"] < _toy.NEAR for found in runs)
    axis.set_title(f"{name}: {reached} of {len(runs)}", fontsize=8)
    axis.set(xlim=(-11, 11), ylim=(-11, 11), xticks=[], yticks=[])


def draw_metric(axis: Axes, metric: str, digits: dict[str, Any]) -> None:
    names = list(digits)[::-1]
    fixed = {rule.name for rule in FIXED}
    for height, name in enumerate(names):
        values = [found["metrics"][metric] for found in digits[name]]
        colour = FIXED_COLOUR if name in fixed else OURS
        axis.plot(values, [height] * len(values), "o", color=colour, alpha=0.35, markersize=4)
        axis.plot(statistics.mean(values), height, "|", color=colour, markersize=14, markeredgewidth=2)
        if name in fixed:
            axis.axvline(statistics.mean(values), color=FIXED_COLOUR, linewidth=0.8)
    axis.set_yticks(range(len(names)), names, fontsize=8)
    better = "more" if _digits.METRICS[metric] > 0 else "less"
    axis.set_xlabel(f"{LABELS[metric]} ({better} is better)", fontsize=9)
    if metric == "ink_loss":
        axis.set_xscale("log")
        axis.xaxis.set_major_formatter(ScalarFormatter())
        axis.xaxis.set_minor_formatter(ScalarFormatter())
        axis.tick_params(axis="x", which="both", labelsize=7)
    axis.grid(alpha=0.25)
    axis.spines[["top", "right"]].set_visible(False)
