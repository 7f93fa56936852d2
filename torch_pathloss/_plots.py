"""Pictures of a criterion."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from torch_pathloss import _extras
from torch_pathloss._errors import ArgumentError
from torch_pathloss._inspect import shown_name
from torch_pathloss._module import PathLossModule
from torch_pathloss.schedules import Schedule, value_at

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def plot_schedules(criterion: PathLossModule, steps: int, ax: Axes | None = None) -> Figure:
    """Draws the weight of each term against the step. Needs matplotlib, the extra ``plot``.

    Weights that follow a schedule are solid lines, with a gap where the term is inactive and so not computed; all
    others are dashed. A vertical line marks the step at which the criterion is, unless it is the first. The weights are
    those that were set, before what a weighting makes of them. The criterion is not changed.

    Args:
        criterion: the container.
        steps: how many steps are drawn, from step 0 on.
        ax: where to draw. Default: ``None``, a new figure.

    Returns:
        The figure, which is not registered with pyplot; ``figure.savefig("schedules.png")`` writes it.

    Raises:
        MissingPackageError: if matplotlib is not installed.
        ArgumentError: if ``steps`` is no positive whole number, or a schedule gives no finite number.

    Examples:
        >>> from torch import nn
        >>> from torch_pathloss import PathLossModule, plot_schedules
        >>> from torch_pathloss.schedules import cyclical
        >>> criterion = PathLossModule({"x": nn.MSELoss(), "kl": nn.L1Loss()}, weights={"kl": cyclical(100)})
        >>> figure = plot_schedules(criterion, steps=120)
        >>> [line.get_label() for line in figure.axes[0].lines]
        ['x', 'kl']
    """
    figures = _extras.needed("matplotlib.figure", by="plot_schedules", extra="plot")
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
        raise ArgumentError(
            f"steps must be a whole number of at least 1, not {steps!r} of type {type(steps).__name__}."
        )
    schedules = criterion.weights.schedules
    lines = {
        name: _stairs(name, schedules[name], steps) if name in schedules else ([0, steps], [weight, weight])
        for name, weight in zip(criterion.weights, criterion.weights.value.tolist(), strict=True)
    }
    if ax is None:
        ax = figures.Figure(figsize=(6.4, 3.2), layout="constrained").subplots()
    for name, (places, weights) in lines.items():
        ax.plot(places, weights, linestyle="-" if name in schedules else "--", linewidth=1.6, label=shown_name(name))
    if 0 < (now := int(criterion.weights.step)) <= steps:
        ax.axvline(now, color="0.6", linewidth=0.8)
    ax.set_xlim(0, steps)
    ax.set(xlabel="step", ylabel="weight")
    ax.grid(alpha=0.25)
    ax.legend(fontsize=8)
    figure: Figure = ax.figure  # type: ignore[assignment]
    return figure


def _stairs(name: str, schedule: Schedule, steps: int) -> tuple[list[int], list[float]]:
    """Returns a line on which each weight holds for its step, NaN where the term is inactive."""
    places: list[int] = []
    weights: list[float] = []
    for step in range(steps):
        try:
            weight = value_at(schedule, step) if schedule.is_active(step) else math.nan
        except ArgumentError as error:
            raise ArgumentError(f"The weight of {name!r}: {error}") from None
        places += [step, step + 1]
        weights += [weight, weight]
    return places, weights
