"""The same training under a Lightning trainer."""

from __future__ import annotations

import logging
import warnings
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset

from torch_pathloss import PathLossModule
from torch_pathloss.demo._data import Canvases, Digits
from torch_pathloss.demo._model import evaluate
from torch_pathloss.demo._train import Epoch, Means, Observer, Settings, batches, optimizer_for, steps_of


class _Batches(IterableDataset[Canvases]):
    """The batches of an epoch, placed anew each time."""

    def __init__(self, digits: Digits, settings: Settings) -> None:
        self.digits = digits
        self.settings = settings
        self.epoch = 0

    def __iter__(self) -> Any:
        self.epoch += 1
        return batches(self.digits, self.settings, self.epoch)

    def __len__(self) -> int:
        return steps_of(self.digits)


class _Module(L.LightningModule):
    """The model and its criterion; the criterion is a child, so that Lightning moves and saves it too."""

    def __init__(
        self, model: nn.Module, criterion: PathLossModule, validation: Canvases, settings: Settings, observer: Observer
    ) -> None:
        super().__init__()
        if settings.compile:
            model.compile()
        self.model = model
        self.criterion = criterion
        self.validation = validation
        self.observer = observer
        self.means = Means()

    def training_step(self, batch: Canvases, index: int) -> Tensor:
        images, target = batch
        loss: Tensor = self.criterion(self.model(images), target)
        return loss

    def on_train_batch_end(self, outputs: Any, batch: Canvases, batch_idx: int) -> None:
        logged = self.criterion.last.log()
        self.means.add(logged)
        self.observer.step(self.current_epoch + 1, batch_idx + 1, int(self.trainer.num_training_batches), logged)

    def on_train_epoch_end(self) -> None:
        self.observer.epoch(Epoch(self.current_epoch + 1, self.means.take(), evaluate(self.model, self.validation)))

    def configure_optimizers(self) -> Any:
        steps = int(self.trainer.estimated_stepping_batches)
        optimizer, schedule = optimizer_for(self.model, self.criterion, steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def train(
    model: nn.Module,
    criterion: PathLossModule,
    digits: Digits,
    validation: Canvases,
    settings: Settings,
    observer: Observer,
) -> None:
    """Trains with a `lightning.Trainer`, and raises `KeyboardInterrupt` if it was interrupted."""
    if settings.compile:
        criterion.compile()
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)  # its tips and what hardware there is
    trainer = L.Trainer(
        max_epochs=settings.epochs,
        accelerator="cpu" if settings.device == "cpu" else "auto",
        devices=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        log_every_n_steps=1,
    )
    # A generator of its own: a loader would draw from the global one, and dropout would differ from the raw loop's.
    loader = DataLoader(_Batches(digits, settings), batch_size=None, generator=torch.Generator())
    module = _Module(model, criterion, validation, settings, observer)
    with warnings.catch_warnings():
        # Its own, under torch 2.13.
        warnings.filterwarnings("ignore", r".*isinstance\(treespec, LeafSpec\).*")
        # Batches are made in the training process; Lightning advises workers for any loader without.
        warnings.filterwarnings("ignore", ".*does not have many workers.*")
        # It advises against a length on an iterable data set, which is wrong with workers only.
        warnings.filterwarnings("ignore", ".*IterableDataset.*__len__.*")
        try:
            trainer.fit(module, loader)
        except SystemExit:  # what Lightning makes of Ctrl-C
            raise KeyboardInterrupt from None
    if trainer.interrupted:
        raise KeyboardInterrupt
