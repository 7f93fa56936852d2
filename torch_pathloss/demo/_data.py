"""Handwritten digits on canvases: where and how large they stand is random, what they are is real."""

from __future__ import annotations

from typing import NamedTuple, TypedDict

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor

SIZE = 32
IGNORED = -100
"""The class of an empty canvas, which `nn.CrossEntropyLoss` leaves out by default."""


class DetectionTarget(TypedDict):
    """Box as left, top, right, bottom in fractions of the canvas ``(N, 4)``; confidence 1 or 0 ``(N,)``."""

    bbox: Tensor
    confidence: Tensor


class DigitTarget(TypedDict):
    """What a batch of canvases shows; ``aux`` holds the ink at 16x16 and at 8x8, in [0, 1]."""

    classification: Tensor
    detection: DetectionTarget
    aux: list[Tensor]


class Digits(NamedTuple):
    """Images ``(N, 8, 8)`` in [0, 1] and their classes ``(N,)``."""

    images: Tensor
    labels: Tensor


class Canvases(NamedTuple):
    """Images ``(N, 1, 32, 32)`` and what they show."""

    images: Tensor
    target: DigitTarget

    def batch(self, rows: Tensor) -> Canvases:
        detection = self.target["detection"]
        target: DigitTarget = {
            "classification": self.target["classification"][rows],
            "detection": {"bbox": detection["bbox"][rows], "confidence": detection["confidence"][rows]},
            "aux": [ink[rows] for ink in self.target["aux"]],
        }
        return Canvases(self.images[rows], target)

    def to(self, device: torch.device) -> Canvases:
        detection = self.target["detection"]
        target: DigitTarget = {
            "classification": self.target["classification"].to(device),
            "detection": {"bbox": detection["bbox"].to(device), "confidence": detection["confidence"].to(device)},
            "aux": [ink.to(device) for ink in self.target["aux"]],
        }
        return Canvases(self.images.to(device), target)


def load(seed: int, held_out: float = 0.2) -> tuple[Digits, Digits]:
    """Returns scikit-learn's 1797 digits in two parts, so that no digit of the second is seen in training."""
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32) / 16
    labels = torch.tensor(digits.target, dtype=torch.int64)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    count = int(held_out * len(labels))
    held, trained = order[:count], order[count:]
    return Digits(images[trained], labels[trained]), Digits(images[held], labels[held])


def place(digits: Digits, copies: int, seed: int, empty: float = 0.1) -> Canvases:
    """Puts each digit on ``copies`` canvases at random places and scales, leaves some empty, and adds noise."""
    generator = torch.Generator().manual_seed(seed)
    images, labels = digits.images.repeat(copies, 1, 1), digits.labels.repeat(copies)
    count = len(labels)

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(count, *shape, generator=generator)

    scale = uniform(0.4, 0.8)  # of the canvas
    centre = uniform(-1, 1, 2) * (1 - scale)[:, None]
    # affine_grid maps canvas coordinates to those of the digit: its inverse places it
    transform = torch.zeros(count, 2, 3)
    transform[:, 0, 0] = transform[:, 1, 1] = 1 / scale
    transform[:, :, 2] = -centre / scale[:, None]
    grid = F.affine_grid(transform, [count, 1, SIZE, SIZE], align_corners=False)
    ink = F.grid_sample(images[:, None], grid, mode="bilinear", align_corners=False)
    is_empty = torch.rand(count, generator=generator) < empty
    ink[is_empty] = 0
    noise = 0.08 * torch.randn(ink.shape, generator=generator)
    target: DigitTarget = {
        "classification": labels.masked_fill(is_empty, IGNORED),
        "detection": {"bbox": boxes_of(ink[:, 0]), "confidence": (~is_empty).float()},
        "aux": [F.avg_pool2d(ink, factor)[:, 0] for factor in (2, 4)],
    }
    return Canvases((ink + noise).clamp(0, 1), target)


def boxes_of(ink: Tensor, threshold: float = 0.15) -> Tensor:
    """Returns the tight box around the ink of each canvas ``(N, H, W)`` as fractions ``(N, 4)``; zeros without ink."""
    sides = []
    for dim in (1, 2):  # columns first
        inked = (ink > threshold).any(dim)
        length = inked.shape[1]
        first = inked.float().argmax(1)
        last = length - inked.flip(1).float().argmax(1)
        sides.append((first / length, last / length))
    (left, right), (top, bottom) = sides
    boxes = torch.stack([left, top, right, bottom], 1)
    return boxes * (ink > threshold).flatten(1).any(1)[:, None]
