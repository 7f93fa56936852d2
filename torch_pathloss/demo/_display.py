"""What a run shows while it goes on."""

from __future__ import annotations

from types import TracebackType
from typing import TYPE_CHECKING

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

if TYPE_CHECKING:
    from torch_pathloss.demo._train import Epoch


class Display:
    """A live table of the terms in a terminal; one line an epoch elsewhere."""

    def __init__(self, console: Console, epochs: int) -> None:
        self._console = console
        self._epochs = epochs
        self._latest: Epoch | None = None
        self._progress = Progress(
            TextColumn("epoch {task.fields[epoch]}/" + str(epochs)), BarColumn(), TimeRemainingColumn(), console=console
        )
        self._task = self._progress.add_task("", total=None, epoch=1)
        self._live = Live(console=console, refresh_per_second=4) if console.is_terminal else None

    def __enter__(self) -> Display:
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self._live is not None:
            self._live.stop()

    def step(self, epoch: int, step: int, steps: int, logged: dict[str, float]) -> None:
        if self._live is not None:
            done = (epoch - 1) * steps + step
            self._progress.update(self._task, completed=done, total=self._epochs * steps, epoch=epoch)
            self._live.update(Group(self._table(logged), self._progress))

    def epoch(self, epoch: Epoch) -> None:
        self._latest = epoch
        if self._live is None:
            terms = "  ".join(f"{name.removeprefix('terms/')} {value:.3f}" for name, value in _shown(epoch.terms))
            metrics = "  ".join(f"{in_words(name)} {value:.3f}" for name, value in epoch.metrics.items())
            self._console.print(
                f"epoch {epoch.number:2d}/{self._epochs}  {terms}  |  {metrics}", soft_wrap=True, highlight=False
            )

    def _table(self, logged: dict[str, float]) -> Table:
        table = Table(title="terms of the criterion", title_justify="left")
        for heading in ("term", "this step", "weight", "last epoch"):
            table.add_column(heading, justify="left" if heading == "term" else "right")
        means = self._latest.terms if self._latest else {}
        for name, value in _shown(logged):
            term = name.removeprefix("terms/")
            weight = logged.get(f"weights/{term}")
            mean = means.get(name)
            table.add_row(
                term, f"{value:.4f}", "" if weight is None else f"{weight:g}", "" if mean is None else f"{mean:.4f}"
            )
        if self._latest is not None:
            table.add_section()
            for name, metric in self._latest.metrics.items():
                table.add_row(f"validation {in_words(name)}", "", "", f"{metric:.4f}")
        return table


def _shown(logged: dict[str, float]) -> list[tuple[str, float]]:
    return [(name, value) for name, value in logged.items() if not name.startswith("weights/")]


def in_words(metric: str) -> str:
    """Returns the name of a metric as it is shown."""
    return metric.replace("_", " ").replace("iou", "IoU")
