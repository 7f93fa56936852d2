"""Counts CUDA launches of the container and of the same losses by hand. Prints JSON; run in a process of its own."""

from __future__ import annotations

import json
from typing import Any

import cuda_codegen  # isort: skip  (before torch)
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torch_pathloss import Input, Output, PathLossModule, Shared, Target, Term, _compile, known, weighting

OWN = _compile.options()
TEN_MSE = {
    "same small": [(64, 32)] * 10,
    "different small": [(64, 8 * (i + 1)) for i in range(10)],
    "same large": [(1024, 1024)] * 10,
    "different large": [(1024, 128 * (i + 1)) for i in range(10)],
}


def count(function: Any, make: Any, *, backward: bool, own: bool = False) -> dict[str, Any]:
    """Returns launches of each graph, and whether each is one CUDA graph."""
    with torch._dynamo.config.patch(trace_autograd_ops=True):
        graphs = cuda_codegen.capture(function, make, backward=backward, options=OWN if own else {})
    return {
        "launches": [len(graph.launches) for graph in graphs],
        "one CUDA graph": [graph.is_one_cuda_graph for graph in graphs],
    }


def randn(device: str, *shape: int) -> Tensor:
    return torch.randn(*shape, device=device, requires_grad=True)


def ten_mse(shapes: list[tuple[int, ...]]) -> Any:
    def make(device: str) -> Any:
        criterion = PathLossModule([nn.MSELoss() for _ in shapes], weights=[0.1 * (i + 1) for i in range(len(shapes))])
        output = [randn(device, *shape) for shape in shapes]
        return criterion.to(device), output, [torch.randn(*shape, device=device) for shape in shapes]

    return make


def ten_mse_by_hand(_: Any, output: Any, target: Any) -> Tensor:
    total: Any = 0.0
    for i, (o, t) in enumerate(zip(output, target, strict=True)):
        total = total + 0.1 * (i + 1) * F.mse_loss(o, t)
    return total


def dice(probability: Tensor, target: Tensor) -> Tensor:
    return 1 - 2 * (probability * target).sum() / (probability.sum() + target.sum())


def ten_mixed(device: str) -> Any:
    """MSE, L1, smooth L1, two cross-entropies, BCE, cross-entropy of a segmentation, KL, Huber, cosine."""

    def cosine(output: Tensor, target: Tensor) -> Tensor:
        return (1 - F.cosine_similarity(output, target)).mean()

    def kl(output: Tensor, target: Tensor) -> Tensor:
        return F.kl_div(output.log_softmax(-1), target, reduction="batchmean")

    criterion = PathLossModule(
        {
            "mse": nn.MSELoss(),
            "l1": nn.L1Loss(),
            "smooth": nn.SmoothL1Loss(),
            "ce": nn.CrossEntropyLoss(),
            "ce2": nn.CrossEntropyLoss(),
            "bce": nn.BCEWithLogitsLoss(),
            "seg": nn.CrossEntropyLoss(),
            "kl": kl,
            "huber": nn.HuberLoss(),
            "cosine": cosine,
        }
    )
    shapes = {
        "mse": (64, 16),
        "l1": (64, 8),
        "smooth": (64, 4),
        "ce": (64, 10),
        "ce2": (64, 100),
        "bce": (64, 20),
        "seg": (8, 19, 32, 32),
        "kl": (64, 32),
        "huber": (64, 12),
        "cosine": (64, 64),
    }
    output = {name: randn(device, *shape) for name, shape in shapes.items()}
    target = {name: torch.rand(*shape, device=device) for name, shape in shapes.items()}
    for name, classes in (("ce", 10), ("ce2", 100)):
        target[name] = torch.randint(classes, (64,), device=device)
    target["seg"] = torch.randint(19, (8, 32, 32), device=device)
    return criterion.to(device), output, target


def every_kind(device: str) -> Any:
    """Subtree, labels, shared computation, pattern, reduction with sample weights, constant, absent term."""
    probability = Shared(torch.sigmoid, Output("mask"))
    criterion = PathLossModule(
        {
            "box": nn.SmoothL1Loss(),
            "head": lambda output, target: (output["a"] - target["a"]).abs().mean() + output["b"].mean(),
            "mask:dice": Term(dice, probability, Target("mask")),
            "mask:mse": Term(nn.MSELoss(), probability, Target("mask")),
            "aux.*": Term(nn.MSELoss(), match="mean"),
            "score": Term(nn.MSELoss(reduction="none"), reduction="weighted_mean"),
            "scaled": Term(lambda x, factor: (x * factor).sum(), Output("score"), torch.ones(1)),
            "off": nn.MSELoss(),
        }
    )
    output = {
        "box": randn(device, 64, 4),
        "head": {"a": randn(device, 64, 4), "b": randn(device, 64)},
        "mask": randn(device, 8, 16, 16),
        "aux": [randn(device, 64, 4), randn(device, 64, 8)],
        "score": randn(device, 64),
        "off": randn(device, 3),
    }
    target = {
        "box": torch.randn(64, 4, device=device),
        "head": {"a": torch.randn(64, 4, device=device)},
        "mask": torch.rand(8, 16, 16, device=device),
        "aux": [torch.randn(64, 4, device=device), torch.randn(64, 8, device=device)],
        "score": torch.randn(64, device=device),
        "off": None,
    }
    return criterion.to(device), output, target, torch.rand(64, device=device)


class Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(4))

    def forward(self, output: Tensor, target: Tensor) -> Tensor:
        return ((output - target) * self.scale).square().mean(1)


def conditions(device: str) -> Any:
    """Masks of samples, of pixels, of elements, of the whole term; a criterion with parameters; normalizers."""
    unreduced, classes = nn.SmoothL1Loss(reduction="none"), nn.CrossEntropyLoss(reduction="none")
    pixels = known(Target("pixels"), missing=-100, per="element")
    with torch.device(device):  # a fake parameter cannot be moved
        criterion = PathLossModule(
            {
                "box": Term(unreduced, where=known(Target("box")), reduction="mean"),
                "box:scaled": Term(Scaled(), where=known(Target("box")), reduction="mean"),
                "box:sum": Term(unreduced, where=Input("has_box"), reduction="sum", normalizer=Input("has_box")),
                "label": Term(classes, where=known(Target("label"), missing=-1), reduction="weighted_mean"),
                "pixels": Term(classes, where=pixels, reduction="sum", normalizer=pixels),
                "tags": Term(
                    nn.BCEWithLogitsLoss(reduction="none"), where=known(Target("tags"), per="element"), reduction="mean"
                ),
                "whole": Term(nn.MSELoss(), where=lambda output, target: target["whole"].isfinite().all()),
            }
        )
    output = {
        "box": randn(device, 64, 4),
        "label": randn(device, 64, 10),
        "pixels": randn(device, 8, 4, 16, 16),
        "tags": randn(device, 64, 12),
        "whole": randn(device, 64, 4),
    }
    target = {
        "box": torch.randn(64, 4, device=device),
        "label": torch.randint(10, (64,), device=device),
        "pixels": torch.randint(4, (8, 16, 16), device=device),
        "tags": torch.rand(64, 12, device=device),
        "whole": torch.randn(64, 4, device=device),
    }
    has_box, weight = torch.rand(64, device=device) < 0.5, torch.rand(64, device=device)
    return criterion, output, target, has_box, weight


def call_conditions(criterion: Any, output: Any, target: Any, has_box: Tensor, weight: Tensor) -> Tensor:
    return criterion(output, target, input={"has_box": has_box}, sample_weight={"label": weight})


def grad_conditions(criterion: Any, output: Any, target: Any, has_box: Tensor, weight: Tensor) -> Any:
    return criterion.value_and_grad(output, target, input={"has_box": has_box}, sample_weight={"label": weight})


def ten_conditions(device: str) -> Any:
    """Ten terms, each with a mask of its own."""
    criterion = PathLossModule(
        {str(i): Term(nn.MSELoss(reduction="none"), where=known(Target(str(i))), reduction="mean") for i in range(10)}
    )
    output = {str(i): randn(device, 64, 32) for i in range(10)}
    return criterion.to(device), output, {str(i): torch.randn(64, 32, device=device) for i in range(10)}


def every_weighting() -> dict[str, type[weighting.Weighting]]:
    exported = {name: getattr(weighting, name) for name in weighting.__all__}
    bases = (weighting.Weighting, weighting.Factors, weighting.Scalarizer)
    return {
        name: kind
        for name, kind in exported.items()
        if isinstance(kind, type) and issubclass(kind, weighting.Weighting) and kind not in bases
    }


def weighted(kind: type[weighting.Weighting]) -> Any:
    def make(device: str) -> Any:
        rule = kind(1.0) if kind is weighting.SmoothTchebycheff else kind()  # type: ignore[call-arg]
        criterion = PathLossModule([nn.MSELoss() for _ in range(10)], weights=[0.5] * 10, weighting=rule)
        for module in criterion.modules():  # a fake parameter cannot be moved, nor a buffer whose value is known
            for name, parameter in module._parameters.items():
                module._parameters[name] = nn.Parameter(torch.empty_like(parameter, device=device))
            for name, buffer in module._buffers.items():
                moved = None if buffer is None else torch.empty(buffer.shape, dtype=buffer.dtype, device=device)
                module._buffers[name] = moved
        output = [randn(device, 64, 32) for _ in range(10)]
        return criterion, output, [torch.randn(64, 32, device=device) for _ in range(10)]

    return make


def call(criterion: Any, output: Any, target: Any) -> Tensor:
    return criterion(output, target)


def call_with_changed_weight(criterion: Any, output: Any, target: Any) -> Tensor:
    criterion.weights.value[0].fill_(0.5)
    return criterion(output, target)


def value_and_grad(criterion: Any, output: Any, target: Any) -> Any:
    return criterion.value_and_grad(output, target)


def call_every_kind(criterion: Any, output: Any, target: Any, weight: Tensor) -> Tensor:
    return criterion(output, target, sample_weight={"score": weight})


def grad_every_kind(criterion: Any, output: Any, target: Any, weight: Tensor) -> Any:
    return criterion.value_and_grad(output, target, sample_weight={"score": weight})


def main() -> None:
    found: dict[str, Any] = {}
    for name, shapes in TEN_MSE.items():
        make = ten_mse(shapes)
        for own in (False, True):
            options = "own" if own else "default"
            found[f"by hand, {name}, {options}"] = count(ten_mse_by_hand, make, backward=True, own=own)
            found[f"call, {name}, {options}"] = count(call, make, backward=True, own=own)
            found[f"value_and_grad, {name}, {options}"] = count(value_and_grad, make, backward=False, own=own)
    found["changed weight"] = count(call_with_changed_weight, ten_mse(TEN_MSE["same small"]), backward=True)
    for own in (False, True):
        options = "own" if own else "default"
        found[f"value_and_grad, mixed, {options}"] = count(value_and_grad, ten_mixed, backward=False, own=own)
        found[f"call, mixed, {options}"] = count(call, ten_mixed, backward=True, own=own)
    found["call, every kind"] = count(call_every_kind, every_kind, backward=True)
    found["value_and_grad, every kind"] = count(grad_every_kind, every_kind, backward=False)
    found["call, conditions"] = count(call_conditions, conditions, backward=True)
    found["value_and_grad, conditions"] = count(grad_conditions, conditions, backward=False)
    for own in (False, True):
        found[f"call, ten conditions, {'own' if own else 'default'}"] = count(
            call, ten_conditions, backward=True, own=own
        )
    for name, kind in every_weighting().items():
        found[f"call, {name}"] = count(call, weighted(kind), backward=True)
        if kind.uses_gradients:
            found[f"value_and_grad, {name}"] = count(value_and_grad, weighted(kind), backward=False)
        if name in ("EMANormalized", "Uncertainty", "GradNorm"):  # a factor, a parameter, gradients
            found[f"call, {name}, own"] = count(call, weighted(kind), backward=True, own=True)
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
