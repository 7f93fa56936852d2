"""`Conflicts`: norms and cosines of the terms' gradients, as data, as a table and as a heat map."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, final

from torch import Tensor

from torch_pathloss import _extras
from torch_pathloss._inspect import columns, shown_name

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from rich.table import Table

_SHOWN = 16  # terms up to which the matrix is printed and the heat map has numbers in it


@final
@dataclass(frozen=True, eq=False, repr=False)
class Conflicts:
    r"""What `PathLossModule.conflicts` returns: a table that prints as text, or in colours where rich is installed.

    With :math:`g_k` the gradient of the unweighted value of term :math:`k`, all tensors of it as one vector, and
    :math:`w_k` its weight, the norm is :math:`\|g_k\|_2` and the cosine of two terms

    .. math::
        c_{kl} = \operatorname{sign}(w_k) \operatorname{sign}(w_l) \, \frac{g_k \cdot g_l}{\|g_k\| \, \|g_l\|}

    where the sign of 0 is taken as 1: cosines do not depend on the size of a weight, but a negative one turns the
    gradient round.

    Attributes:
        names: the terms, in declared order.
        at: what the gradients are taken by, in words.
        weights: the weight of each term; with a weighting, that of the latest call, NaN before the first.
        norms: the norm of each unweighted gradient, NaN for an absent term.
        weighted_norms: the norms times the absolute values of the weights.
        cosines: ``[K, K]``, float64 on the CPU; NaN for a term that is absent or has no gradient.
        threshold: the cosine below which two terms oppose each other.
        opposing: the pairs of terms that do, with their cosines, the lowest first.
        zero: the terms that are present and whose gradient is zero.
        absent: the terms that are absent.
        shared: the output leaves that several terms reach, with these terms. They are counted twice.

    Examples:
        >>> import torch
        >>> from torch import nn
        >>> from torch_pathloss import PathLossModule
        >>> criterion = PathLossModule({"x:up": nn.MSELoss(), "x:down": nn.L1Loss()})
        >>> conflicts = criterion.conflicts({"x": torch.tensor([1.0, 1.0])}, {"x": torch.tensor([3.0, 2.0])})
        >>> print(conflicts)
        gradients at the outputs
           term    weight  norm    weighted  1     2
        1  x:up    1       2.236   2.236     1.00  0.95
        2  x:down  1       0.7071  0.7071    0.95  1.00
        counted twice: the output leaf 'x', by x:up, x:down
        >>> conflicts.opposing
        ()
    """

    names: tuple[str, ...]
    at: str
    weights: dict[str, float]
    norms: dict[str, float]
    cosines: Tensor
    threshold: float
    opposing: tuple[tuple[str, str, float], ...]
    zero: tuple[str, ...]
    absent: tuple[str, ...]
    shared: dict[str, tuple[str, ...]]

    @property
    def weighted_norms(self) -> dict[str, float]:
        return {name: abs(self.weights[name]) * norm for name, norm in self.norms.items()}

    def cosine(self, first: str, second: str) -> float:
        """Returns the cosine of two terms by name."""
        return float(self.cosines[self.names.index(first), self.names.index(second)])

    def plot(self, ax: Axes | None = None) -> Figure:
        """Draws the cosines as a heat map. Needs matplotlib, the extra ``plot``.

        Args:
            ax: where to draw. Default: ``None``, a new figure.

        Returns:
            The figure, which is not registered with pyplot; ``figure.savefig("conflicts.png")`` writes it.

        Raises:
            MissingPackageError: if matplotlib is not installed.
        """
        figure_module = _extras.needed("matplotlib.figure", by="Conflicts.plot", extra="plot")
        count = len(self.names)
        if ax is None:
            side = 2.0 + 0.45 * min(count, 40)
            ax = figure_module.Figure(figsize=(side + 1.0, side), layout="constrained").subplots()
        image = ax.imshow(self.cosines.numpy(), cmap="RdBu", vmin=-1, vmax=1)
        ax.set_facecolor("0.85")  # what NaN leaves open
        labels = [shown_name(name) for name in self.names]
        ax.set_xticks(range(count), labels, rotation=45, ha="right", rotation_mode="anchor")
        norms = [f"{label}  ({self._norm_text(name)})" for label, name in zip(labels, self.names, strict=True)]
        ax.set_yticks(range(count), norms)
        ax.tick_params(labelsize=8, length=0)
        ax.set_title(f"cosines of the gradients at {self.at}", fontsize=9)
        for (row, column), value in self._numbers().items():
            colour = "white" if abs(value) > 0.6 else "black"
            ax.text(column, row, f"{value:.2f}", ha="center", va="center", fontsize=7, color=colour)
        figure: Figure = ax.figure  # type: ignore[assignment]
        figure.colorbar(image, ax=ax, shrink=0.8)
        return figure

    def __str__(self) -> str:
        cells = [["", *self._header()]]
        cells += [[str(number), *row] for number, row in enumerate(self._rows(), 1)]
        return "\n".join([f"gradients at {self.at}", *columns(cells), *self._tail()])

    __repr__ = __str__

    def __rich__(self) -> Table:
        from rich.table import Table
        from rich.text import Text

        table = Table(
            box=None,
            pad_edge=False,
            title=Text(f"gradients at {self.at}"),
            title_justify="left",
            caption=Text("\n".join(self._tail())),
            caption_justify="left",
        )
        table.add_column("")
        for heading in self._header():
            table.add_column(heading)
        for number, row in enumerate(self._rows()):
            styles = ["dim", "green", "", "cyan", "cyan"]
            styles += [self._style(number, column) for column in range(len(row) - 5)]
            cells = zip([str(number + 1), *row], [*styles, "yellow"], strict=True)
            table.add_row(*(Text(text, style=style) for text, style in cells))
        return table

    def _header(self) -> list[str]:
        numbers = map(str, range(1, len(self.names) + 1)) if len(self.names) <= _SHOWN else ()
        return ["term", "weight", "norm", "weighted", *numbers, ""]

    def _rows(self) -> list[list[str]]:
        weighted, numbers, rows = self.weighted_norms, self._numbers(), []
        width = len(self.names) if len(self.names) <= _SHOWN else 0
        for number, name in enumerate(self.names):
            is_absent = name in self.absent
            norms = ["", ""] if is_absent else [f"{self.norms[name]:.4g}", f"{weighted[name]:.4g}"]
            shown = [f"{numbers[number, column]:.2f}" if (number, column) in numbers else "" for column in range(width)]
            mark = "absent" if is_absent else "zero gradient" if name in self.zero else ""
            if not is_absent and not math.isfinite(self.norms[name]):
                mark = "gradient not finite"
            rows.append([shown_name(name), f"{self.weights[name]:g}", *norms, *shown, mark])
        return rows

    def _numbers(self) -> dict[tuple[int, int], float]:
        """Returns the cosines to print, by place."""
        if len(self.names) > _SHOWN:
            return {}
        rows = enumerate(self.cosines.tolist())
        return {(i, j): value for i, row in rows for j, value in enumerate(row) if not math.isnan(value)}

    def _norm_text(self, name: str) -> str:
        return "absent" if name in self.absent else f"norm {self.norms[name]:.2g}"

    def _style(self, row: int, column: int) -> str:
        return "red" if row != column and self.cosines[row, column] < self.threshold else ""

    def _tail(self) -> list[str]:
        tail = [
            f"opposed: {shown_name(first)} and {shown_name(second)}, cosine {cosine:.2f}"
            for first, second, cosine in self.opposing
        ]
        tail += [
            f"counted twice: the output leaf {path!r}, by {', '.join(map(shown_name, names))}"
            for path, names in self.shared.items()
        ]
        return tail
