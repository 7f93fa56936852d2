"""The model, its criterion, and how well it does."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from torch_pathloss import PathLossModule, Shared, Target, Term
from torch_pathloss.demo._data import IGNORED, Canvases, DetectionTarget
from torch_pathloss.weighting import Weighting

WEIGHTS = {"detection.bbox": 5.0, "aux.*": 0.5}


def _block(inputs: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU(), nn.MaxPool2d(2)
    )


class Detector(nn.Module):
    """A small CNN with a nested output: class logits, a box with its confidence, and maps of where ink is."""

    def __init__(self) -> None:
        super().__init__()
        self.stages = nn.ModuleList([_block(1, 24), _block(24, 48), _block(48, 96)])
        self.maps = nn.ModuleList([nn.Conv2d(24, 1, 1), nn.Conv2d(48, 1, 1)])
        self.neck = nn.Sequential(nn.Flatten(), nn.Dropout(0.2), nn.Linear(96 * 16, 128), nn.ReLU())
        self.classification = nn.Linear(128, 10)
        self.bbox = nn.Linear(128, 4)
        self.confidence = nn.Linear(128, 1)

    def forward(self, images: Tensor) -> dict[str, Any]:
        features = []
        for stage in self.stages:
            images = stage(images)
            features.append(images)
        neck = self.neck(images)
        centre, size = self.bbox(neck).sigmoid().chunk(2, 1)
        return {
            "classification": self.classification(neck),
            "detection": {
                "bbox": torch.cat([centre - size / 2, centre + size / 2], 1),
                "confidence": self.confidence(neck)[:, 0],
            },
            "aux": [head(feature)[:, 0] for head, feature in zip(self.maps, features, strict=False)],
        }


def iou(boxes: Tensor, others: Tensor) -> Tensor:
    """Returns intersection over union of each pair of boxes ``(N, 4)``, as ``(N,)``."""
    overlap = (torch.minimum(boxes[:, 2:], others[:, 2:]) - torch.maximum(boxes[:, :2], others[:, :2])).clamp(min=0)
    intersection = overlap.prod(1)
    union = _area(boxes) + _area(others) - intersection
    return intersection / union.clamp(min=1e-6)


def _area(boxes: Tensor) -> Tensor:
    return (boxes[:, 2:] - boxes[:, :2]).clamp(min=0).prod(1)


class OverlapLoss(nn.Module):
    """1 - IoU of each canvas, ``(N,)``: a criterion on the whole subtree ``detection``."""

    def forward(self, output: DetectionTarget, target: DetectionTarget) -> Tensor:
        return 1 - iou(output["bbox"], target["bbox"])


def shows_a_digit(confidence: Tensor) -> Tensor:
    """Returns which canvases are not empty."""
    return confidence > 0.5


def make_criterion(weights: Mapping[str, float] = WEIGHTS, weighting: Weighting | None = None) -> PathLossModule:
    """Returns the criterion of the README, for real. Boxes of empty canvases do not count."""
    shown = Shared(shows_a_digit, Target("detection.confidence"))
    return PathLossModule(
        {
            "classification": nn.CrossEntropyLoss(ignore_index=IGNORED, label_smoothing=0.05),
            "detection": Term(OverlapLoss(), where=shown, reduction="mean"),
            "detection.bbox": Term(nn.SmoothL1Loss(reduction="none", beta=0.1), where=shown, reduction="mean"),
            "detection.confidence": nn.BCEWithLogitsLoss(),
            "aux.*": Term(nn.BCEWithLogitsLoss(), match="mean"),
        },
        weights=weights,
        weighting=weighting,
        uncovered="error",
    )


@torch.no_grad()
def evaluate(model: nn.Module, canvases: Canvases) -> dict[str, float]:
    """Returns accuracy and mean IoU over the canvases that show a digit, and how often the confidence is right."""
    was_training = model.training
    model.eval()
    output = model(canvases.images)
    model.train(was_training)
    detection = canvases.target["detection"]
    shown = shows_a_digit(detection["confidence"])
    right = output["classification"].argmax(1) == canvases.target["classification"]
    overlap = iou(output["detection"]["bbox"], detection["bbox"])
    sure = (output["detection"]["confidence"] > 0) == shown
    return {
        "accuracy": right[shown].float().mean().item(),
        "mean_iou": overlap[shown].mean().item(),
        "confidence_accuracy": sure.float().mean().item(),
    }
