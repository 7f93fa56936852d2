"""The rules that bench.weightings compares: weights that stay, and every weighting of the package."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping

from torch_pathloss import weighting as package
from torch_pathloss.demo._model import WEIGHTS
from torch_pathloss.weighting import Weighting

Problem = str
"""``"toy"`` or ``"digits"``."""


@dataclasses.dataclass(frozen=True)
class Rule:
    """A weighting for each problem, or weights.

    `make` takes the problem and the seed. The options are the defaults of the weighting, except where a problem needs
    one that the method leaves to the user; `note` says which and why.
    """

    name: str
    make: Callable[[Problem, int], Weighting] | None = None
    weights: Mapping[Problem, Mapping[str, float]] = dataclasses.field(default_factory=dict)
    is_random: bool = False
    note: str = ""

    def weighting(self, problem: Problem, seed: int) -> Weighting | None:
        return None if self.make is None else self.make(problem, seed)


FIXED = [
    Rule("equal weights", note="the base of the comparison"),
    Rule(
        "weights by hand",
        weights={"toy": {"x:first": 10.0}, "digits": WEIGHTS},
        note="toy: undoes the scale of 0.1; digits: those of the demo",
    ),
]

WEIGHTINGS = [
    Rule("Uncertainty", lambda problem, _: package.Uncertainty(_kinds(problem))),
    Rule("IMTLL", lambda *_: package.IMTLL()),
    Rule(
        "DynamicWeightAverage",
        lambda problem, _: package.DynamicWeightAverage(None if problem == "digits" else 100),
        note="digits: by epoch; toy: windows of 100 steps",
    ),
    Rule("RandomWeighting", lambda _, seed: package.RandomWeighting(seed=seed), is_random=True),
    Rule("GeometricMean", lambda *_: package.GeometricMean()),
    Rule("EMANormalized", lambda *_: package.EMANormalized()),
    Rule("CoefficientOfVariation", lambda *_: package.CoefficientOfVariation()),
    Rule("SoftAdapt, original", lambda *_: package.SoftAdapt("original")),
    Rule("SoftAdapt, normalized", lambda *_: package.SoftAdapt("normalized")),
    Rule("SoftAdapt, loss_weighted", lambda *_: package.SoftAdapt("loss_weighted")),
    Rule("ReLoBRaLo", lambda _, seed: package.ReLoBRaLo(seed=seed), is_random=True),
    Rule(
        "SmoothTchebycheff",
        lambda problem, _: package.SmoothTchebycheff(1.0 if problem == "toy" else 0.1),
        note="mu has no default: 1 for the toy, whose values are about 20, and 0.1 for the digits",
    ),
    Rule(
        "FAMO",
        lambda problem, _: package.FAMO(weight_decay=0.0) if problem == "toy" else package.FAMO(),
        note="toy: no weight decay, as in the authors' script",
    ),
    Rule("GradNorm", lambda *_: package.GradNorm()),
    Rule("OutputBalancer", lambda *_: package.OutputBalancer()),
]

RULES = {rule.name: rule for rule in (*FIXED, *WEIGHTINGS)}


def missing() -> set[str]:
    """Returns the names of weightings that the package exports and the table lacks."""
    public = {
        name
        for name in package.__all__
        if isinstance(kind := getattr(package, name), type) and issubclass(kind, Weighting)
    }
    made = {type(rule.make(problem, 0)).__name__ for rule in WEIGHTINGS if rule.make for problem in ("toy", "digits")}
    # two bases, what wraps the rules of other packages, and what the fixed weights are
    return public - made - {"Factors", "Weighting", "Scalarizer", "WeightedSum"}


def _kinds(problem: Problem) -> str | dict[str, str]:
    """Returns which likelihood stands behind each term: Kendall's two forms."""
    if problem == "toy":
        return "regression"
    return {"classification": "classification", "detection.confidence": "classification", "aux.*": "classification"}
