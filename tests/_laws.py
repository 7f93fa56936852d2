"""Cases for laws that hold for every way to the gradients. Each case makes a criterion, an output and a target anew."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torch_pathloss import Input, Output, PathLossModule, Shared, Target, Term


@dataclass(frozen=True)
class Case:
    """A criterion and what it is called with. `make(dtype)` gives ``(criterion, output, target, keywords)``."""

    name: str
    make: Callable[[torch.dtype], tuple[PathLossModule, Any, Any, dict[str, Any]]]
    compiles: bool = True

    def __str__(self) -> str:
        return self.name


def randn(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(*shape, dtype=dtype, requires_grad=True)


def elementwise(criterion: nn.Module) -> Callable[[torch.dtype], Any]:
    def make(dtype: torch.dtype) -> Any:
        module = PathLossModule({"a": criterion, "b.c": criterion}, weights={"b.c": 0.5})
        output = {"a": randn(3, 4, dtype=dtype), "b": {"c": randn(5, dtype=dtype)}}
        target = {"a": torch.rand(3, 4, dtype=dtype), "b": {"c": torch.rand(5, dtype=dtype)}}
        return module, output, target, {}

    return make


def single(criterion: Any, target: Callable[[torch.dtype], Tensor], *shape: int) -> Callable[[torch.dtype], Any]:
    def make(dtype: torch.dtype) -> Any:
        return PathLossModule({"x": criterion}), {"x": randn(*shape, dtype=dtype)}, {"x": target(dtype)}, {}

    return make


def log_softmax_then(criterion: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda output, target: criterion(output.log_softmax(-1), target)


def ctc(dtype: torch.dtype) -> Any:
    def criterion(scores: Tensor, text: Tensor, frames: Tensor, length: Tensor) -> Tensor:
        return F.ctc_loss(scores.log_softmax(-1), text, frames, length)

    module = PathLossModule({"text": Term(criterion, frames=Input("frames"), length=Target("length"))})
    target = {"text": torch.randint(1, 5, (2, 3)), "length": torch.tensor([3, 2])}
    return module, {"text": randn(8, 2, 5, dtype=dtype)}, target, {"input": {"frames": torch.tensor([8, 7])}}


def cosine_embedding(dtype: torch.dtype) -> Any:
    module = PathLossModule({"pair": Term(nn.CosineEmbeddingLoss(), Output("a"), Output("b"), Target("same"))})
    output = {"a": randn(4, 3, dtype=dtype), "b": randn(4, 3, dtype=dtype)}
    return module, output, {"same": torch.tensor([1, -1, 1, 1])}, {}


def triplet(dtype: torch.dtype) -> Any:
    module = PathLossModule({"t": Term(nn.TripletMarginLoss(5.0), Output("a"), Output("b"), Output("c"))})
    return module, {name: randn(4, 3, dtype=dtype) for name in "abc"}, None, {}


def dice(probability: Tensor, target: Tensor) -> Tensor:
    return 1 - 2 * (probability * target).sum() / (probability.sum() + target.sum())


def subtree(dtype: torch.dtype) -> Any:
    def criterion(output: Any, target: Any) -> Tensor:
        return ((output["box"] - target["box"]).abs().sum(1) * output["score"].sigmoid()).mean()

    module = PathLossModule({"d": criterion, "d.box": nn.SmoothL1Loss()}, weights={"d.box": 5.0})
    output = {"d": {"box": randn(4, 4, dtype=dtype), "score": randn(4, dtype=dtype)}, "unused": randn(2, dtype=dtype)}
    return module, output, {"d": {"box": torch.randn(4, 4, dtype=dtype)}}, {}


class Scaled(nn.Module):
    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor([1.5, 0.5], dtype=dtype))
        self.unused = nn.Parameter(torch.tensor(1.0, dtype=dtype))

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        return ((input - target) * self.scale).square().mean()


def parameters(dtype: torch.dtype) -> Any:
    scaled = Scaled(dtype)
    module = PathLossModule({"a": scaled, "b": scaled, "c": nn.MSELoss()}, weights={"a": 0.3})
    output = {name: randn(3, 2, dtype=dtype) for name in "abc"}
    return module, output, {name: torch.randn(3, 2, dtype=dtype) for name in "abc"}, {}


def one_leaf_many_terms(dtype: torch.dtype) -> Any:
    module = PathLossModule({"x:mse": nn.MSELoss(), "x:l1": nn.L1Loss(), "x:huber": nn.HuberLoss()})
    return module, {"x": randn(6, dtype=dtype)}, {"x": torch.randn(6, dtype=dtype)}, {}


def patterns(dtype: torch.dtype) -> Any:
    module = PathLossModule({"aux.*": Term(nn.MSELoss(), match="mean"), "deep.**": nn.L1Loss()}, weights={"aux.*": 2.0})
    output = {
        "aux": [randn(3, dtype=dtype), randn(2, dtype=dtype)],
        "deep": {"x": (randn(2, dtype=dtype),), "y": randn(3, dtype=dtype)},
    }
    target = {
        "aux": [torch.randn(3, dtype=dtype), torch.randn(2, dtype=dtype)],
        "deep": {"y": torch.randn(3, dtype=dtype), "x": (torch.randn(2, dtype=dtype),)},
    }
    return module, output, target, {}


def shared(dtype: torch.dtype) -> Any:
    probability = Shared(torch.sigmoid, Output("m"))
    module = PathLossModule(
        {
            "m:dice": Term(dice, probability, Target("m")),
            "other": nn.MSELoss(),
            "m:mse": Term(nn.MSELoss(), probability, Target("m")),
        }
    )
    output = {"m": randn(4, 3, dtype=dtype), "other": randn(2, dtype=dtype)}
    return module, output, {"m": torch.rand(4, 3, dtype=dtype), "other": torch.zeros(2, dtype=dtype)}, {}


def absent(dtype: torch.dtype) -> Any:
    module = PathLossModule({"a": nn.MSELoss(), "off": nn.MSELoss(), "none.*": nn.MSELoss(), "gone": nn.MSELoss()})
    output = {"a": randn(3, dtype=dtype), "off": randn(2, dtype=dtype), "none": [], "gone": None}
    target = {"a": torch.zeros(3, dtype=dtype), "off": None, "none": [], "gone": torch.zeros(1, dtype=dtype)}
    return module, output, target, {}


def sample_weights(dtype: torch.dtype) -> Any:
    unreduced = nn.MSELoss(reduction="none")
    module = PathLossModule(
        {"a": Term(unreduced, reduction="mean"), "b": Term(unreduced, reduction="weighted_mean"), "c": nn.MSELoss()}
    )
    output = {name: randn(4, 2, dtype=dtype) for name in "abc"}
    target = {name: torch.randn(4, 2, dtype=dtype) for name in "abc"}
    return module, output, target, {"sample_weight": {n: torch.rand(4, dtype=dtype) for n in "ab"}}


def other_leaves(dtype: torch.dtype) -> Any:
    """Views, one tensor twice, leaves without grad, integers, other objects, an uncovered leaf."""
    base = randn(2, 3, dtype=dtype)
    twice = randn(3, dtype=dtype)
    module = PathLossModule({"row": nn.MSELoss(), "x": nn.MSELoss(), "y": nn.L1Loss(), "fixed": nn.MSELoss()})
    output = {
        "row": base[0],
        "other row": base[1],
        "x": twice,
        "y": twice,
        "fixed": torch.ones(3, dtype=dtype),
        "index": torch.tensor([1, 2]),
        "text": "?",
        "nothing": None,
    }
    target = {name: torch.zeros(3, dtype=dtype) for name in ("row", "x", "y", "fixed")}
    return module, output, target, {}


def classes(dtype: torch.dtype) -> Tensor:
    return torch.tensor([0, 2, 1, 2])


def probabilities(dtype: torch.dtype) -> Tensor:
    return torch.rand(4, 3, dtype=dtype).softmax(-1)


CASES = [
    Case("MSE", elementwise(nn.MSELoss())),
    Case("L1", elementwise(nn.L1Loss())),
    Case("smooth L1", elementwise(nn.SmoothL1Loss())),
    Case("Huber", elementwise(nn.HuberLoss(delta=0.5))),
    Case("BCE with logits", elementwise(nn.BCEWithLogitsLoss())),
    Case("cross-entropy of classes", single(nn.CrossEntropyLoss(label_smoothing=0.1), classes, 4, 3)),
    Case("cross-entropy of probabilities", single(nn.CrossEntropyLoss(), probabilities, 4, 3)),
    Case("KL divergence", single(log_softmax_then(nn.KLDivLoss(reduction="batchmean")), probabilities, 4, 3)),
    Case("NLL", single(log_softmax_then(nn.NLLLoss()), classes, 4, 3)),
    Case("CTC", ctc, compiles=False),  # its output's shape depends on the lengths, which are data
    Case("cosine embedding", cosine_embedding),
    Case("triplet", triplet),
    Case("subtree", subtree),
    Case("criterion with parameters", parameters),
    Case("one leaf, many terms", one_leaf_many_terms),
    Case("patterns", patterns),
    Case("shared computation", shared),
    Case("absent terms", absent),
    Case("sample weights", sample_weights),
    Case("views and other leaves", other_leaves),
]
