"""The toy problem of CAGrad, Nash-MTL and FAMO: two losses of a point in the plane, one a tenth of the other's scale.

In the upper half both have narrow valleys, and the sum leads into one of them; in the lower half the two pull apart
along the Pareto front. The formulas and the five starting points are those of the papers (Liu et al., NeurIPS 2021,
appendix; Navon et al., ICML 2022, appendix B; Liu et al., NeurIPS 2023, section 5.1).
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn

from bench._rules import Rule
from torch_pathloss import Output, PathLossModule, Term

STARTS = ((-8.5, 7.5), (0.0, 0.0), (9.0, 9.0), (-7.5, -0.5), (9.0, -1.0))
SCALE = 0.1
"""What the first loss is multiplied by, as in Nash-MTL and FAMO."""
SHIFT = 21.0
"""Added to both losses, which start below 0: FAMO's script does so for FAMO, and most weightings want values above 0.
It changes no gradient."""
STEPS = 2000
LR = 2e-2
"""The papers take 1e-3 and 35 000 to 50 000 steps; Adam goes as far in these."""
RULE_LR = 0.025
"""For parameters of a weighting, as in Nash-MTL."""
KEPT = 25
"""Every so many steps the point is kept for the plot."""
NEAR = 0.1


def loss_at(x: Tensor, number: int) -> Tensor:
    """Returns one of the losses, without scale and shift, of points ``[..., 2]``."""
    first, second = x.unbind(-1)
    bend = torch.tanh(-second)
    distance = 0.5 * (-first - 7) - bend if number == 0 else 0.5 * (-first + 7) + bend
    valley = distance.abs().clamp(min=5e-6).log() + 6
    bowl = ((first + (-7 if number == 0 else 7)) ** 2 + 0.1 * (second + 8) ** 2) / 10 - 20
    side = torch.tanh(0.5 * second)
    return side.clamp(min=0) * valley + (-side).clamp(min=0) * bowl


class ToyLoss(nn.Module):
    """One of the two losses of a point, with scale and shift."""

    def __init__(self, number: int, scale: float) -> None:
        super().__init__()
        self.number = number
        self.scale = scale

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * (loss_at(x, self.number) + SHIFT)


def criterion_for(rule: Rule, seed: int) -> PathLossModule:
    return PathLossModule(
        {"x:first": Term(ToyLoss(0, SCALE), Output("x")), "x:second": Term(ToyLoss(1, 1.0), Output("x"))},
        weights=rule.weights.get("toy"),
        weighting=rule.weighting("toy", seed),
    )


def train(rule: Rule, seed: int, start: tuple[float, float]) -> dict[str, Any]:
    """Returns the path of the point, both losses at its end, and how far from the front they are."""
    x = nn.Parameter(torch.tensor(start))
    criterion = criterion_for(rule, seed)
    groups = [{"params": [x], "lr": LR}, {"params": list(criterion.parameters()), "lr": RULE_LR}]
    optimizer = torch.optim.Adam([group for group in groups if group["params"]])
    updates_after = hasattr(criterion.weighting, "update")
    path = []
    for step in range(STEPS):
        if step % KEPT == 0:
            path.append(x.tolist())
        optimizer.zero_grad()
        criterion({"x": x}).backward()
        optimizer.step()
        if updates_after:
            criterion.update({"x": x})
    path.append(x.tolist())
    end = torch.stack([loss_at(x.detach(), number) for number in (0, 1)])
    text = " ".join(f"{first:.2f},{second:.2f}" for first, second in path)  # JSON has a line for each number of a list
    return {"seed": seed, "start": start, "path": text, "losses": end.tolist(), "gap": gap(end)}


def points(path: str) -> list[tuple[float, float]]:
    """Returns the points of a path that `train` gave."""
    pairs = (pair.split(",") for pair in path.split())
    return [(float(first), float(second)) for first, second in pairs]


def gap(losses: Tensor) -> float:
    """Returns by how much both losses would have to fall to be on the front; about 0 there."""
    return (losses.to(front()) - front()).amax(1).amin().item()


@functools.cache
def front() -> Tensor:
    """Returns the Pareto front, from a grid: pairs of losses ``[N, 2]`` that no other pair beats in both."""
    axes = torch.linspace(-10, 10, 2001, dtype=torch.float64), torch.linspace(-10, 1, 441, dtype=torch.float64)
    points = torch.cartesian_prod(*axes)
    losses = torch.stack([loss_at(points, number) for number in (0, 1)], 1)
    losses = losses[losses[:, 0].argsort()]
    best = losses[:, 1].cummin(0).values
    is_best = torch.cat([torch.tensor([True]), losses[1:, 1] < best[:-1]])
    return losses[is_best]
