"""The demo from beginning to end."""

from __future__ import annotations

from typing import Any

import torch
from rich.console import Console

from torch_pathloss.demo import _draw
from torch_pathloss.demo._data import Digits, load, place
from torch_pathloss.demo._display import Display
from torch_pathloss.demo._model import Detector, evaluate, make_criterion
from torch_pathloss.demo._train import Epoch, History, Observer, Settings, batches


class _All:
    """Tells several observers."""

    def __init__(self, *observers: Observer) -> None:
        self._observers = observers

    def step(self, epoch: int, step: int, steps: int, logged: dict[str, float]) -> None:
        for observer in self._observers:
            observer.step(epoch, step, steps, logged)

    def epoch(self, epoch: Epoch) -> None:
        for observer in self._observers:
            observer.epoch(epoch)


def _engine(name: str) -> Any:
    if name == "raw":
        from torch_pathloss.demo import _train

        return _train.train
    from torch_pathloss.demo import _lightning

    return _lightning.train


def run(settings: Settings) -> int:
    """Trains, shows, draws and writes. Returns the exit status: 130 after Ctrl-C, as a shell expects."""
    engine = _engine(settings.engine)
    console = Console()
    torch.manual_seed(settings.seed)
    device = torch.device(settings.device)
    trained, held_out = load(settings.seed)
    trained = Digits(*(part[: settings.digits] for part in trained))
    validation = place(held_out, copies=2, seed=settings.seed + 1).to(device)
    model, criterion = Detector().to(device), make_criterion().to(device)

    images, target = next(batches(trained, settings, epoch=1))
    output = model(images)
    criterion.check(output, target)
    explanation = criterion.explain(output, target)
    console.print(f"{criterion}\n", highlight=False, soft_wrap=True, markup=False)
    console.print(explanation if console.is_terminal else str(explanation), highlight=False, soft_wrap=True)
    console.print()

    history = History(settings)
    interrupted = False
    with Display(console, settings.epochs) as display:
        try:
            engine(model, criterion, trained, validation, settings, _All(history, display))
        except KeyboardInterrupt:
            interrupted = True
    if interrupted:
        console.print(f"Interrupted after {len(history.epochs)} of {settings.epochs} epochs. What was reached:")
    model.to(device)  # Lightning leaves it on the CPU
    metrics = evaluate(model, validation)
    figures = {"predictions": _draw.predictions(model, validation)}
    if history.epochs:
        figures["curves"] = _draw.curves(history.epochs)
    for name, figure in figures.items():
        figure.savefig(settings.out / f"{name}.png", dpi=110)
    history.write(metrics, interrupted, figures)
    console.print(
        f"held-out accuracy {metrics['accuracy']:.1%}, mean IoU {metrics['mean_iou']:.3f}, "
        f"confidence right {metrics['confidence_accuracy']:.1%}",
        highlight=False,
    )
    files = ", ".join(sorted(path.name for path in settings.out.iterdir()))
    console.print(f"written to {settings.out}/: {files}", highlight=False, soft_wrap=True)
    return 130 if interrupted else 0
