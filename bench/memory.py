"""Peak memory of an eager step: the sum by hand against `criterion.backward`.

Counted from the allocator's events, so that it is the same at every run. Outputs are made within the step.

    python -m bench.memory
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench._timing import save, table, verdict
from torch_pathloss import PathLossModule

Losses = dict[str, Callable[[Tensor, Tensor], Tensor]]


def dice(output: Tensor, target: Tensor) -> Tensor:
    probability = output.sigmoid()
    return 1 - 2 * (probability * target).sum() / (probability.sum() + target.sum())


def focal(output: Tensor, target: Tensor) -> Tensor:
    probability = output.sigmoid()
    right = torch.where(target > 0.5, probability, 1 - probability)
    return (-((1 - right) ** 2) * right.clamp(min=1e-6).log()).mean()


def total_variation(output: Tensor, target: Tensor) -> Tensor:
    across, down = output[..., 1:] - output[..., :-1], output[..., 1:, :] - output[..., :-1, :]
    return across.abs().mean() + down.abs().mean()


def peak(step: Callable[[], Any]) -> int:
    """Returns the largest sum of bytes that a step holds at one time, from its own allocations."""
    step()  # what is allocated once, is
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        step()
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = most = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    return most


def variants(model: nn.Module, x: Tensor, losses: Losses, target: Any) -> dict[str, Callable[[], Any]]:
    """Returns steps that give the same gradients; names of losses are ``path:label``."""
    criterion = PathLossModule(losses)

    def by_hand() -> None:
        output = model(x)
        total: Any = 0.0
        for name, loss in losses.items():
            path = name.split(":")[0]
            total = total + loss(output[path], target[path])
        total.backward()

    def call() -> None:
        output = model(x)  # held to the end, as a training loop does
        criterion(output, target).backward()

    def backward(consume: bool = False) -> None:
        output = model(x)
        criterion.backward(output, target, consume=consume)

    return {
        "by hand": by_hand,
        "call": call,
        "backward": backward,
        "backward, consume": lambda: backward(consume=True),
    }


class Maps(nn.Module):
    """Three heads of maps, each one convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.heads = nn.ModuleList([nn.Conv2d(4, 19, 1) for _ in range(3)])

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {f"head{i}": head(x) for i, head in enumerate(self.heads)}


class Classes(nn.Module):
    """Six heads of class logits."""

    def __init__(self) -> None:
        super().__init__()
        self.heads = nn.ModuleList([nn.Linear(32, 1024) for _ in range(6)])

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {f"head{i}": head(x) for i, head in enumerate(self.heads)}


def cases() -> dict[str, tuple[dict[str, Callable[[], Any]], str, float]]:
    """Returns steps, which of them has a limit, and the limit as a ratio to by hand."""
    kinds: Losses = {"dice": dice, "focal": focal, "variation": total_variation, "smooth": F.smooth_l1_loss}
    maps = {f"head{i}:{kind}": loss for i in range(3) for kind, loss in kinds.items()}
    map_target = {f"head{i}": torch.rand(2, 19, 128, 128).round() for i in range(3)}
    class_target = {f"head{i}": torch.randint(1024, (2048,)) for i in range(6)}
    classes: Losses = {f"head{i}": F.cross_entropy for i in range(6)}
    return {
        "12 terms over 3 heads": (variants(Maps(), torch.randn(2, 4, 128, 128), maps, map_target), "backward", 0.55),
        "6 cross-entropy heads": (
            variants(Classes(), torch.randn(2048, 32), classes, class_target),
            "backward, consume",
            0.70,
        ),
    }


def main() -> None:
    torch.manual_seed(0)
    results: dict[str, Any] = {}
    rows = []
    for name, (steps, limited, limit) in cases().items():
        peaks = {variant: peak(step) for variant, step in steps.items()}
        results[name] = {"peaks": peaks, "limits": {limited: limit}}
        for variant, found in peaks.items():
            ratio = verdict(found / peaks["by hand"], results[name]["limits"].get(variant))
            rows.append([f"{name}: {variant}", f"{found / 2**20:.1f} MiB", ratio])
    print(table(["peak memory, eager", "peak", "ratio"], rows))
    print(f"written to {save('memory', results)}")


if __name__ == "__main__":
    main()
