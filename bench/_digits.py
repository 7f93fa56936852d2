"""The demo's digits and model, in few epochs, under each rule."""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from bench._rules import Rule
from torch_pathloss.demo._data import Canvases, Digits, load, place
from torch_pathloss.demo._model import Detector, evaluate, make_criterion

EPOCHS = 3
BATCH = 32
COPIES = 2
LR = 4e-3
METRICS = {"accuracy": 1, "mean_iou": 1, "confidence_accuracy": 1, "ink_loss": -1}
"""What is measured on held-out digits, and whether more of it is better."""


@functools.cache
def data(seed: int) -> tuple[list[list[Canvases]], Canvases]:
    """Returns the batches of all epochs, and the canvases of held-out digits."""
    trained, held_out = load(seed)
    return [batches(trained, 100 * seed + epoch) for epoch in range(EPOCHS)], place(held_out, 1, seed=100 * seed + 99)


def batches(digits: Digits, seed: int) -> list[Canvases]:
    canvases = place(digits, COPIES, seed)
    order = torch.randperm(len(canvases.images), generator=torch.Generator().manual_seed(seed))
    return [canvases.batch(rows) for rows in torch.split(order, BATCH)]


def train(rule: Rule, seed: int) -> dict[str, Any]:
    """Returns the metrics on held-out digits, and the effective weights of the last step."""
    epochs, held_out = data(seed)
    torch.manual_seed(seed)
    model = Detector()
    criterion = make_criterion(rule.weights.get("digits", {}), rule.weighting("digits", seed))
    groups = [
        {"params": list(model.parameters()), "weight_decay": 1e-2},
        {"params": list(criterion.parameters()), "weight_decay": 0.0},  # it would pull what is learned to 0
    ]
    optimizer = torch.optim.AdamW([group for group in groups if group["params"]], lr=LR)
    criterion.check_optimizer(optimizer)
    steps = sum(map(len, epochs))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=LR, total_steps=steps)
    updates_after = hasattr(criterion.weighting, "update")
    for epoch in epochs:
        for images, target in epoch:
            optimizer.zero_grad()
            criterion(model(images), target).backward()
            optimizer.step()
            schedule.step()
            if updates_after:
                with torch.no_grad():
                    criterion.update(model(images), target)
        if hasattr(criterion.weighting, "end_epoch") and criterion.weighting.window is None:
            criterion.weighting.end_epoch()
    metrics = evaluate(model, held_out) | {"ink_loss": ink_loss(model, held_out)}
    weights = {name: weight.item() for name, weight in criterion.last.weights.items()}
    return {"seed": seed, "metrics": metrics, "weights": weights}


@torch.no_grad()
def ink_loss(model: nn.Module, held_out: Canvases) -> float:
    """Returns the mean loss of the maps of where ink is. It cannot be 0, since ink is not only black and white."""
    model.eval()
    maps = model(held_out.images)["aux"]
    losses = [F.binary_cross_entropy_with_logits(*pair) for pair in zip(maps, held_out.target["aux"], strict=True)]
    return torch.stack(losses).mean().item()
