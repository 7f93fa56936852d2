"""Every weighting, for laws that hold for all of them, and a small training loop around one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from torch_pathloss.weighting import (
    FAMO,
    IMTLL,
    CoefficientOfVariation,
    DynamicWeightAverage,
    EMANormalized,
    GeometricMean,
    GradNorm,
    OutputBalancer,
    RandomWeighting,
    ReLoBRaLo,
    SmoothTchebycheff,
    SoftAdapt,
    Uncertainty,
    WeightedSum,
    Weighting,
)

NAMES = ("a", "b.c", "d.*")


@dataclass(frozen=True)
class Case:
    """A weighting, and what of it the laws cannot know.

    `records` names the buffers that hold something of the latest call, which an absent term changes too.
    `after` is what a training loop does with the weighting after the optimizer's step.
    `normalizes` says whether the effective weights are divided by a sum over the terms that the process sees.
    """

    name: str
    make: Callable[[], Weighting]
    records: Sequence[str] = ()
    after: Callable[[Weighting, int, Tensor, Tensor], None] = lambda *_: None
    normalizes: bool = False

    def __str__(self) -> str:
        return self.name

    def bound(self, names: Sequence[str] = NAMES) -> Weighting:
        return self.make().bind(names)


CASES = [
    Case("WeightedSum", WeightedSum),
    Case("WeightedSum, mean", lambda: WeightedSum(weighted_mean=True), normalizes=True),
    Case("Uncertainty", Uncertainty),
    Case(
        "Uncertainty, classification, log1p",
        lambda: Uncertainty({"b.c": "classification"}, regularizer="log1p", log_variance={"a": -0.5}),
    ),
    Case("IMTLL", IMTLL),
    Case("GradNorm", GradNorm),
    Case("OutputBalancer", lambda: OutputBalancer(decay=0.9), normalizes=True),
    Case("EMANormalized", EMANormalized),
    Case("EMANormalized, initial", lambda: EMANormalized(scale="initial", initial_updates=4)),
    Case("EMANormalized, scale mean", lambda: EMANormalized(scale="mean")),
    Case("CoefficientOfVariation", CoefficientOfVariation),
    Case("CoefficientOfVariation, decay", lambda: CoefficientOfVariation(decay=0.9)),
    Case("SoftAdapt, original", lambda: SoftAdapt("original", window=3, every=1)),
    Case("SoftAdapt, normalized", lambda: SoftAdapt("normalized", window=3, every=2)),
    Case("SoftAdapt, loss_weighted", lambda: SoftAdapt("loss_weighted", window=2)),
    Case("ReLoBRaLo", lambda: ReLoBRaLo(rho=0.5, alpha=0.9, temperature=1.0)),
    Case(
        "DynamicWeightAverage",
        DynamicWeightAverage,
        after=lambda weighting, step, *_: weighting.end_epoch() if step % 3 == 2 else None,
    ),
    Case(
        "DynamicWeightAverage, window",
        lambda: DynamicWeightAverage(2, temperature=0.5, weighted_mean=True),
        normalizes=True,
    ),
    Case("FAMO", FAMO, ["before", "shares"], lambda weighting, step, *after: weighting.update(*after)),
    Case(
        "FAMO, SGD",
        lambda: FAMO({"a": 0.01}, optimizer="sgd"),
        ["before", "shares"],
        lambda weighting, step, *after: weighting.update(*after),
    ),
    Case("GeometricMean", GeometricMean),
    Case("GeometricMean, offset", lambda: GeometricMean(offset=0.5)),
    Case("RandomWeighting", RandomWeighting),
    Case("RandomWeighting, Dirichlet", lambda: RandomWeighting("dirichlet", seed=5)),
    Case("SmoothTchebycheff", lambda: SmoothTchebycheff(10.0, ideal={"b.c": 20.0})),
    Case("SmoothTchebycheff, running", lambda: SmoothTchebycheff(3.0, ideal="running")),
]


def values_of(step: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Returns positive values of three sizes, other ones at each step."""
    generator = torch.Generator().manual_seed(step)
    return (torch.rand(3, generator=generator, dtype=torch.float64) + 0.5).to(dtype) * torch.tensor([1.0, 30.0, 0.1])


def seen_at(step: int) -> Tensor:
    """Returns a mask that changes: all, without the first, without the last two, all, ..."""
    return torch.tensor([[True, True, True], [False, True, True], [True, False, False]][step % 3])


class Training:
    """A model of three numbers, whose squares scale the values, its optimizer, and a weighting."""

    def __init__(self, case: Case, call: Callable[[Weighting], Callable] = lambda weighting: weighting) -> None:
        self.case = case
        self.weighting = case.bound()
        self.call = call(self.weighting)
        self.model = torch.nn.Parameter(torch.ones(3))
        self.weights = torch.tensor([1.0, 0.5, 2.0])
        self.optimizer = torch.optim.Adam([self.model, *self.weighting.parameters()], lr=0.01)

    def run(self, steps: Sequence[int]) -> list[Tensor]:
        """Returns the effective weights of each step."""
        return [self.step(step) for step in steps]

    def step(self, step: int) -> Tensor:
        seen = seen_at(step)
        self.optimizer.zero_grad()
        total, effective = self.call(self.values(step, seen), seen, self.weights, norms_of(self.weighting, step))
        total.backward()
        self.optimizer.step()
        with torch.no_grad():
            self.case.after(self.weighting, step, self.values(step, seen), seen)
        return effective

    def values(self, step: int, seen: Tensor) -> Tensor:
        return torch.where(seen, self.model.square() * values_of(step), 0)

    def state(self) -> dict[str, object]:
        state = {"weighting": self.weighting.state_dict(), "model": self.model.data}
        return {**state, "optimizer": self.optimizer.state_dict()}

    def load(self, state: dict[str, object]) -> None:
        self.weighting.load_state_dict(state["weighting"])
        self.model.data = state["model"]
        self.optimizer.load_state_dict(state["optimizer"])


def norms_of(weighting: Weighting, step: int) -> Tensor | None:
    """Returns what stands for the norms of the gradients, where the weighting needs them."""
    return 2 * values_of(step + 1000) if weighting.uses_gradients else None


def state_of(weighting: Weighting) -> dict[str, Tensor]:
    """Returns a copy of the state, without the names."""
    return {key: value.clone() for key, value in weighting.state_dict().items() if not key.endswith("_extra_state")}


def assert_same_state(first: Weighting, second: Weighting) -> None:
    torch.testing.assert_close(state_of(first), state_of(second), rtol=0, atol=0, equal_nan=True)
