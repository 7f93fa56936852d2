"""One run: settings, the raw training loop, and what it leaves behind."""

from __future__ import annotations

import dataclasses
import json
import pathlib
import platform
import time
from collections.abc import Iterator
from importlib import metadata
from typing import Any, Protocol

import torch
from torch import nn

import torch_pathloss
from torch_pathloss import PathLossModule
from torch_pathloss.demo._data import Canvases, Digits, place
from torch_pathloss.demo._model import evaluate

BATCH = 64
COPIES = 2
"""Canvases per digit in an epoch; every epoch places them anew."""


@dataclasses.dataclass(frozen=True)
class Settings:
    """What the command line says."""

    epochs: int = 16
    seed: int = 0
    device: str = "cpu"
    compile: bool = False
    engine: str = "raw"
    out: pathlib.Path = pathlib.Path("runs/demo")
    digits: int | None = None
    """Train on the first so many digits only: for a quick look, and for the tests."""


@dataclasses.dataclass
class Epoch:
    """What one epoch reached: means of `last.log` over its steps, and the validation's metrics."""

    number: int
    terms: dict[str, float]
    metrics: dict[str, float]


class Observer(Protocol):
    """Who is told how a run goes."""

    def step(self, epoch: int, step: int, steps: int, logged: dict[str, float]) -> None: ...

    def epoch(self, epoch: Epoch) -> None: ...


class Means:
    """Running means of logged values; a NaN is an absent term and does not count."""

    def __init__(self) -> None:
        self._sums: dict[str, float] = {}
        self._counts: dict[str, int] = {}

    def add(self, logged: dict[str, float]) -> None:
        for name, value in logged.items():
            if value == value:
                self._sums[name] = self._sums.get(name, 0.0) + value
                self._counts[name] = self._counts.get(name, 0) + 1

    def take(self) -> dict[str, float]:
        means = {name: total / self._counts[name] for name, total in self._sums.items()}
        self._sums.clear()
        self._counts.clear()
        return means


def optimizer_for(
    model: nn.Module, criterion: PathLossModule, steps: int
) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]:
    """Returns AdamW with a one-cycle schedule over all steps."""
    optimizer = torch.optim.AdamW([*model.parameters(), *criterion.parameters()], lr=4e-3, weight_decay=1e-2)
    criterion.check_optimizer(optimizer)
    return optimizer, torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=4e-3, total_steps=max(steps, 2))


def batches(digits: Digits, settings: Settings, epoch: int) -> Iterator[Canvases]:
    """Yields the batches of an epoch, the same for the same seed and number."""
    canvases = place(digits, COPIES, seed=settings.seed * 100_003 + epoch)
    generator = torch.Generator().manual_seed(settings.seed * 100_003 + epoch)
    order = torch.randperm(len(canvases.images), generator=generator)
    for rows in torch.split(order, BATCH):
        yield canvases.batch(rows).to(torch.device(settings.device))


def steps_of(digits: Digits) -> int:
    """Returns the number of batches of an epoch."""
    return -(-COPIES * len(digits.labels) // BATCH)


def train(
    model: nn.Module,
    criterion: PathLossModule,
    digits: Digits,
    validation: Canvases,
    settings: Settings,
    observer: Observer,
) -> None:
    """Trains in a plain loop."""
    steps = steps_of(digits)
    optimizer, schedule = optimizer_for(model, criterion, steps * settings.epochs)
    if settings.compile:
        model.compile()
        criterion.compile()
    means = Means()
    for epoch in range(1, settings.epochs + 1):
        for step, (images, target) in enumerate(batches(digits, settings, epoch), 1):
            loss = criterion(model(images), target)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            logged = criterion.last.log()
            means.add(logged)
            observer.step(epoch, step, steps, logged)
        observer.epoch(Epoch(epoch, means.take(), evaluate(model, validation)))


class History:
    """Keeps what the epochs reached, and writes it as JSON and TensorBoard events."""

    def __init__(self, settings: Settings) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.settings = settings
        self.epochs: list[Epoch] = []
        self._start = time.perf_counter()
        settings.out.mkdir(parents=True, exist_ok=True)
        if (settings.out / "metrics.json").exists():  # an earlier run of ours, whose curves would pass for this one's
            for old in (*settings.out.glob("events.out.tfevents.*"), *settings.out.glob("*.png")):
                old.unlink()
        self._writer: Any = SummaryWriter(str(settings.out))

    def step(self, epoch: int, step: int, steps: int, logged: dict[str, float]) -> None:
        number = (epoch - 1) * steps + step
        for name, value in logged.items():
            if value == value:
                self._writer.add_scalar(f"train/{name}", value, number)

    def epoch(self, epoch: Epoch) -> None:
        self.epochs.append(epoch)
        for name, value in epoch.metrics.items():
            self._writer.add_scalar(f"validation/{name}", value, epoch.number)

    def write(self, metrics: dict[str, float], interrupted: bool, figures: dict[str, Any]) -> None:
        """Writes metrics.json, and the figures as events too."""
        for name, figure in figures.items():
            self._writer.add_figure(name, figure)
        self._writer.close()
        found = {
            **metrics,
            "seconds": round(time.perf_counter() - self._start, 1),
            "interrupted": interrupted,
            "settings": {**dataclasses.asdict(self.settings), "out": str(self.settings.out)},
            "versions": {
                "python": platform.python_version(),
                "torch": torch.__version__,
                "optree": metadata.version("optree"),
                "torch_pathloss": torch_pathloss.__version__,
            },
            "epochs": [dataclasses.asdict(epoch) for epoch in self.epochs],
        }
        (self.settings.out / "metrics.json").write_text(json.dumps(found, indent=2) + "\n")
