"""`where`: every criterion equals itself on the selected samples, whatever stands in the others."""

import copy
import math
import pickle
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_leaves, tree_map

from torch_pathloss import (
    ArgumentError,
    CheckError,
    ConstructionError,
    CriterionReturnError,
    Input,
    Output,
    PathLossModule,
    Shared,
    Target,
    Term,
    known,
)


@pytest.fixture(autouse=True)
def fresh_dynamo():
    yield
    torch._dynamo.reset()


MASK = torch.tensor([False, True, True, False, True, False])
N = len(MASK)
WEIGHTS = torch.tensor([0.3, 2.0, 0.5, 1.0, 1.5, 4.0])


def randn(*shape: int) -> Tensor:
    return torch.randn(*shape)


def classes(*shape: int) -> Tensor:
    return torch.randint(3, shape)


def probabilities(*shape: int) -> Tensor:
    return torch.rand(*shape) * 0.8 + 0.1


def signs(*shape: int) -> Tensor:
    return torch.randint(2, shape) * 2 - 1


class Scaled(nn.Module):
    """A criterion with a parameter, whose derivative is not finite at equal arguments."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor([1.5, 0.5, 2.0, -1.0]))

    def forward(self, output: Tensor, target: Tensor) -> Tensor:
        return ((output * self.scale - target).square().sum(1) + 1).sqrt()


def hard(output: Tensor, target: Tensor) -> Tensor:
    """Logarithm, square root and division."""
    return output.log() ** 2 / target + (output / target).sqrt()


def rotated(first: Tensor, second: Tensor, *, target: Tensor, angle: float) -> Tensor:
    return (first * angle + second - target).abs().sum(1)


@dataclass(frozen=True)
class Case:
    """A criterion without reduction, and what makes its outputs and its targets, in the order of its arguments."""

    name: str
    criterion: Callable[[], Any]
    outputs: dict[str, tuple[Callable[..., Tensor], tuple[int, ...]]]
    targets: dict[str, tuple[Callable[..., Tensor], tuple[int, ...]]]
    by_keyword: tuple[str, ...] = ()
    constants: tuple[tuple[str, Any], ...] = ()
    order: str | None = None

    def __str__(self) -> str:
        return self.name

    def tensors(self, n: int = N) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        return (
            {name: make(n, *shape) for name, (make, shape) in self.outputs.items()},
            {name: make(n, *shape) for name, (make, shape) in self.targets.items()},
        )

    def term(self, **options: Any) -> Term:
        sources = {name: Output(name) for name in self.outputs} | {name: Target(name) for name in self.targets}
        positional = [sources[name] for name in self.order or sources if name not in self.by_keyword]
        keywords = {name: sources[name] for name in self.by_keyword}
        return Term(self.criterion(), *positional, **keywords, **dict(self.constants), **options)

    def by_hand(self, criterion: Any, rows: Callable[[Tensor], Tensor], outputs: Any, targets: Any) -> Tensor:
        """Returns the unreduced result on the rows that a function takes."""
        tensors = {name: rows(tensor) for name, tensor in (outputs | targets).items()}
        positional = [tensors[name] for name in self.order or tensors if name not in self.by_keyword]
        return criterion(*positional, **{name: tensors[name] for name in self.by_keyword}, **dict(self.constants))


def case(name: str, criterion: Callable[[], Any], output: Any, target: Any, **options: Any) -> Case:
    return Case(name, criterion, {"x": output}, {"y": target}, **options)


def unreduced(kind: Any, **options: Any) -> Callable[[], Any]:
    return partial(kind, reduction="none", **options)


def of_log_softmax(criterion: Any) -> Callable[[], Any]:
    return lambda: lambda output, target: criterion(output.log_softmax(1), target, reduction="none")


CASES = [
    case("MSE", unreduced(nn.MSELoss), (randn, (4,)), (randn, (4,))),
    case("L1 of vectors", unreduced(nn.L1Loss), (randn, ()), (randn, ())),
    case("smooth L1", unreduced(nn.SmoothL1Loss), (randn, (2, 3)), (randn, (2, 3))),
    case("Huber", unreduced(nn.HuberLoss, delta=0.5), (randn, (4,)), (randn, (4,))),
    case("BCE", unreduced(nn.BCELoss), (probabilities, (4,)), (probabilities, (4,))),
    case("BCE with logits", unreduced(nn.BCEWithLogitsLoss), (randn, (4,)), (probabilities, (4,))),
    case("CE of classes", unreduced(nn.CrossEntropyLoss, label_smoothing=0.1), (randn, (3,)), (classes, ())),
    case("CE of probabilities", unreduced(nn.CrossEntropyLoss), (randn, (3,)), (probabilities, (3,))),
    case("CE of pixels, by sample", unreduced(nn.CrossEntropyLoss), (randn, (3, 2, 5)), (classes, (2, 5))),
    case("KL divergence", unreduced(nn.KLDivLoss), (randn, (4,)), (probabilities, (4,))),
    case("KL divergence after log_softmax", of_log_softmax(F.kl_div), (randn, (4,)), (probabilities, (4,))),
    case("NLL", of_log_softmax(F.nll_loss), (randn, (3,)), (classes, ())),
    case("Poisson NLL", unreduced(nn.PoissonNLLLoss, log_input=False, full=True), (probabilities, ()), (classes, ())),
    case("multi-label soft margin", unreduced(nn.MultiLabelSoftMarginLoss), (randn, (3,)), (probabilities, (3,))),
    Case(
        "cosine embedding",
        unreduced(nn.CosineEmbeddingLoss),
        {"x": (randn, (4,)), "x2": (randn, (4,))},
        {"y": (signs, ())},
    ),
    Case("triplet", unreduced(nn.TripletMarginLoss, margin=5.0), dict.fromkeys("abc", (randn, (4,))), {}),
    Case(
        "Gaussian NLL",
        unreduced(nn.GaussianNLLLoss),
        {"x": (randn, ()), "var": (probabilities, ())},
        {"y": (randn, ())},
        order=("x", "y", "var"),
    ),
    Case(
        "Gaussian NLL by keyword",
        unreduced(nn.GaussianNLLLoss),
        {"input": (randn, ()), "var": (probabilities, ())},
        {"target": (randn, ())},
        by_keyword=("input", "target", "var"),
    ),
    case("logarithm, root and quotient", lambda: hard, (probabilities, (2,)), (probabilities, (2,))),
    case("with parameters", Scaled, (randn, (4,)), (randn, (4,))),
    Case(
        "keyword sources and constants",
        lambda: rotated,
        {"a": (randn, (4,)), "b": (randn, (4,))},
        {"target": (randn, (4,))},
        by_keyword=("target",),
        constants=(("angle", 0.7),),
    ),
]
REDUCTIONS = ["mean", "weighted_mean", "sum"]


def reduced(rows: Tensor, reduction: str, weights: Tensor | None) -> Tensor:
    """The formulas of `Term`, written out for the selected rows."""
    share = torch.ones(len(rows)) if weights is None else weights
    share = share.reshape(-1, *(1 for _ in rows.shape[1:])).expand(rows.shape)
    total = (share * rows).sum()
    return {"sum": total, "mean": total / rows.numel(), "weighted_mean": total / share.sum()}[reduction]


def poisoned(tensor: Tensor, mask: Tensor, poison: float) -> Tensor:
    """The tensor with something else in the rows that are not selected: no class at all where it holds integers."""
    spread = mask.reshape(mask.shape + (1,) * (tensor.ndim - mask.ndim))
    return torch.where(spread, tensor, poison if tensor.is_floating_point() else -1_000_000)


def poisoned_call(some: Case, mask: Tensor, poison: float) -> tuple[Any, Any]:
    outputs, targets = some.tensors(len(mask))
    outputs = {name: poisoned(tensor, mask, poison).requires_grad_() for name, tensor in outputs.items()}
    return outputs, {name: poisoned(tensor, mask, poison) for name, tensor in targets.items()}


def gradients(loss: Tensor, module: nn.Module, outputs: dict[str, Tensor]) -> list[Tensor]:
    return list(torch.autograd.grad(loss, [*outputs.values(), *module.parameters()]))


@pytest.mark.parametrize("poison", [torch.nan, torch.inf, -torch.inf, 0.0], ids=str)
@pytest.mark.parametrize("some", CASES, ids=str)
def test_value_and_gradients_are_those_of_the_selected_rows(some, poison):
    for reduction, weighted in [(reduction, weighted) for reduction in REDUCTIONS for weighted in (False, True)]:
        term = some.term(where=Input("known"), reduction=reduction)
        module = PathLossModule({"t": term})
        outputs, targets = poisoned_call(some, MASK, poison)
        # a sample weight that is not selected may be anything too
        weights = {"t": torch.where(MASK, WEIGHTS, poison)} if weighted else None
        loss = module(outputs, targets, input={"known": MASK}, sample_weight=weights)
        rows = some.by_hand(term.criterion, lambda tensor: tensor[MASK], outputs, targets)
        by_hand = reduced(rows, reduction, WEIGHTS[MASK] if weighted else None)
        torch.testing.assert_close(loss, by_hand)
        found = gradients(loss, module, outputs)
        torch.testing.assert_close(found, gradients(by_hand, module, outputs))
        for gradient in found[: len(outputs)]:
            assert (gradient[~MASK] == 0).all()
        assert module.last.present["t"]


@pytest.mark.parametrize("poison", [torch.nan, torch.inf, -1.0], ids=str)
@pytest.mark.parametrize("some", CASES, ids=str)
def test_an_empty_selection_is_0_with_zero_gradient_and_absent(some, poison):
    nothing = torch.zeros(N, dtype=torch.bool)
    for reduction in REDUCTIONS:
        module = PathLossModule({"t": some.term(where=Input("known"), reduction=reduction)})
        outputs, targets = poisoned_call(some, nothing, poison)
        loss = module(outputs, targets, input={"known": nothing}, sample_weight=torch.full((N,), poison))
        assert loss.item() == 0
        for gradient in gradients(loss, module, outputs):
            assert (gradient == 0).all()
        assert not module.last.present["t"]
        assert math.isnan(module.last.log()["terms/t"])


@pytest.mark.filterwarnings("ignore:Anomaly Detection has been enabled:UserWarning")
@pytest.mark.parametrize("flags", [[False, True, False], [False] * 3], ids=["some", "none"])
@pytest.mark.parametrize("some", CASES, ids=str)
def test_anomaly_detection_finds_no_nan_on_the_way_back(some, flags):
    mask = torch.tensor(flags)
    module = PathLossModule({"t": some.term(where=Input("known"), reduction="mean")})
    outputs, targets = poisoned_call(some, mask, torch.nan)
    with torch.autograd.detect_anomaly(check_nan=True):
        module(outputs, targets, input={"known": mask}).backward()


@pytest.mark.parametrize("some", CASES, ids=str)
@pytest.mark.parametrize("reduces", [True, False], ids=["reduces by itself", "reduction"])
def test_a_mask_without_dimensions_switches_the_whole_term(some, reduces):
    term = some.term(where=Input("known"), reduction="mean")
    criterion = term.criterion
    if reduces:
        by_position = lambda *args, **keywords: criterion(*args, **keywords).mean()  # noqa: E731
        by_keyword = lambda **keywords: criterion(**keywords).mean()  # noqa: E731
        whole = by_position if term.sources else by_keyword
        term = Term(whole, *term.sources, **term.keyword_sources, where=Input("known"))
    module = PathLossModule({"t": term})
    outputs, targets = poisoned_call(some, torch.ones(N, dtype=torch.bool), 0.0)
    loss = module(outputs, targets, input={"known": torch.tensor(True)})
    by_hand = some.by_hand(criterion, lambda tensor: tensor, outputs, targets).mean()
    torch.testing.assert_close(loss, by_hand)
    torch.testing.assert_close(gradients(loss, module, outputs), gradients(by_hand, module, outputs))
    assert module.last.present["t"]
    outputs, targets = poisoned_call(some, torch.zeros(N, dtype=torch.bool), torch.nan)
    loss = module(outputs, targets, input={"known": torch.tensor(False)})
    assert loss.item() == 0
    assert all((gradient == 0).all() for gradient in gradients(loss, module, outputs))
    assert not module.last.present["t"]


def leaf(*shape: int) -> Tensor:
    return torch.randn(*shape, requires_grad=True)


PIXELS = torch.tensor([[[True, False, True], [False, False, True]], [[False, True, True], [False, False, False]]])


@pytest.mark.parametrize(
    "criterion",
    [
        nn.CrossEntropyLoss(reduction="none"),
        partial(F.cross_entropy, reduction="none"),
        lambda x, y: F.cross_entropy(x, y, reduction="none"),
    ],
    ids=["module", "function", "unknown function"],
)
@pytest.mark.parametrize("channels", [4, 2, 3], ids=["4 classes", "as many classes as samples", "as rows"])
def test_cross_entropy_of_pixels_takes_a_mask_of_pixels(criterion, channels):
    x = leaf(2, channels, 2, 3)
    y = torch.where(PIXELS, torch.randint(channels, (2, 2, 3)), -1)
    module = PathLossModule({"x": Term(criterion, where=Input("known"), reduction="mean")})
    with torch.no_grad():
        x.movedim(1, -1)[~PIXELS] = torch.nan
    loss = module({"x": x}, {"x": y}, input={"known": PIXELS})
    by_hand = F.cross_entropy(x.movedim(1, -1)[PIXELS], y[PIXELS])
    torch.testing.assert_close(loss, by_hand)
    torch.testing.assert_close(torch.autograd.grad(loss, x), torch.autograd.grad(by_hand, x))


def test_cross_entropy_of_pixels_takes_probabilities_whose_every_dimension_is_equal():
    x, y = leaf(3, 3, 3), torch.rand(3, 3, 3).softmax(1)
    known = torch.tensor([[True, False, False], [False, False, True], [True, True, False]])
    module = PathLossModule({"x": Term(nn.CrossEntropyLoss(reduction="none"), where=Input("known"), reduction="sum")})
    loss = module({"x": x}, {"x": y}, input={"known": known})
    by_hand = F.cross_entropy(x.movedim(1, -1)[known], y.movedim(1, -1)[known], reduction="sum")
    torch.testing.assert_close(loss, by_hand)


@pytest.mark.parametrize("shape", [(2, 2), (2, 2, 3)], ids=["by row", "by element"])
def test_a_mask_of_elements_selects_elements(shape):
    known = PIXELS if shape == (2, 2, 3) else PIXELS[:, :, 0]
    x = leaf(2, 2, 3)
    y = torch.where(known.reshape(*shape, *(1,) * (3 - len(shape))), torch.randn(2, 2, 3), torch.nan)
    module = PathLossModule({"x": Term(nn.SmoothL1Loss(reduction="none"), where=Input("known"), reduction="mean")})
    loss = module({"x": x}, {"x": y}, input={"known": known})
    torch.testing.assert_close(loss, F.smooth_l1_loss(x[known], y[known]))


def test_a_cube_whose_second_dimension_could_be_classes_is_refused():
    def unknown(output: Tensor, target: Tensor) -> Tensor:
        return (output - target).abs()

    module = PathLossModule({"x": Term(unknown, where=Input("known"), reduction="mean")})
    with pytest.raises(ArgumentError) as error:
        module({"x": torch.ones(3, 3, 3)}, {"x": torch.ones(3, 3, 3)}, input={"known": torch.ones(3, 3) > 0})
    assert str(error.value) == (
        "Term 'x': its where has shape (3, 3) and an argument (3, 3, 3), which may be read as (N, d1, ...) or as "
        "(N, C, d1, ...). Give where as many dimensions as the argument has, or one dimension."
    )


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_an_empty_batch_is_an_empty_selection(reduction):
    module = PathLossModule({"x": Term(nn.MSELoss(reduction="none"), where=Input("known"), reduction=reduction)})
    x = leaf(0, 4)
    loss = module({"x": x}, {"x": torch.ones(0, 4)}, input={"known": torch.ones(0, dtype=torch.bool)})
    loss.backward()
    assert loss.item() == 0
    assert x.grad.shape == (0, 4)
    assert not module.last.present["x"]


@pytest.mark.parametrize("known", [True, False])
def test_one_sample_is_selected_or_not(known):
    module = PathLossModule({"x": Term(nn.MSELoss(reduction="none"), where=Input("known"), reduction="mean")})
    x = leaf(1, 4)
    y = torch.ones(1, 4) if known else torch.full((1, 4), torch.nan)
    loss = module({"x": x}, {"x": y}, input={"known": torch.tensor([known])})
    loss.backward()
    torch.testing.assert_close(loss.detach(), (x.detach() - 1).square().mean() if known else torch.tensor(0.0))
    torch.testing.assert_close(x.grad, (x.detach() - 1) / 2 if known else torch.zeros(1, 4))


def unreduced_mse(**options: Any) -> Term:
    return Term(nn.MSELoss(reduction="none"), reduction="mean", **options)


def small() -> tuple[Tensor, Tensor]:
    return torch.tensor([1.0, 2.0, 5.0], requires_grad=True), torch.tensor([0.0, torch.nan, 2.0])


EXPECTED = torch.tensor((1.0 + 9.0) / 2), torch.tensor([1.0, 0.0, 3.0])  # of samples 0 and 2 of `small`


class Gate(nn.Module):
    """A condition with a parameter and a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.threshold = nn.Parameter(torch.tensor(10.0))
        self.register_buffer("offset", torch.tensor(0.0))

    def forward(self, output: Any, target: Any) -> Tensor:
        return target["y"].nan_to_num(99.0) + self.offset < self.threshold


def at_target(output: Any, target: Any) -> Tensor:
    return ~target["y"].isnan()


@pytest.mark.parametrize(
    "where",
    [
        Input("known"),
        Target("known"),
        Output("known"),
        Shared(lambda y: ~y.isnan(), Target("y")),
        Shared(torch.logical_not, Shared(torch.isnan, Target("y"))),
        at_target,
        Gate(),
    ],
    ids=["input", "target", "output", "shared", "shared of shared", "callable", "module"],
)
def test_where_is_a_source_or_a_callable(where):
    module = PathLossModule({"x": unreduced_mse(target=Target("y"), where=where)})
    x, y = small()
    known = {"known": torch.tensor([True, False, True])}
    loss = module({"x": x, **known}, {"y": y, **known}, input=known)
    loss.backward()
    torch.testing.assert_close((loss.detach(), x.grad), EXPECTED)


def test_a_condition_that_is_a_module_is_a_child_of_the_container():
    module = PathLossModule({"x": unreduced_mse(where=Gate())})
    assert set(dict(module.named_parameters())) == {"/x~where.threshold"}
    assert "/x~where.offset" in module.state_dict()
    assert module.double().get_submodule("/x~where").offset.dtype is torch.float64


def test_a_shared_mask_and_a_shared_argument_are_computed_once():
    calls = []

    def split(y: Tensor) -> Tensor:
        calls.append(y)
        return ~y.isnan()

    known = Shared(split, Target("y"))
    module = PathLossModule({name: unreduced_mse(target=Target("y"), where=known) for name in ("x", "x:again")})
    x, y = small()
    torch.testing.assert_close(module({"x": x}, {"y": y}), 2 * EXPECTED[0])
    assert len(calls) == 1


def test_each_match_of_a_pattern_has_its_own_mask_or_all_have_one():
    a, b = torch.tensor([[1.0, 2.0], [3.0, 4.0]], requires_grad=True).unbind()
    target = {"y": [torch.tensor([0.0, torch.nan]), torch.tensor([torch.nan, torch.nan])]}
    own = Shared(lambda y: ~y.isnan(), Target("y.*"))
    module = PathLossModule({"x.*": unreduced_mse(target=Target("y.*"), where=own, match="mean")})
    assert module({"x": [a, b]}, target).item() == 1.0  # of the first match alone: nothing is selected of the second
    assert module.last.present["x.*"]
    assert module({"x": [b, b]}, {"y": target["y"][1:] * 2}).item() == 0
    assert not module.last.present["x.*"]
    one = PathLossModule({"x.*": unreduced_mse(target=Target("y"), where=Target("known"))})
    known = torch.tensor([True, False])
    assert one({"x": [a, b]}, {"y": torch.tensor([0.0, torch.nan]), "known": known}).item() == 1.0 + 9.0


def test_a_condition_is_asked_once_for_all_matches():
    calls = []

    def known(output: Any, target: Any) -> Tensor:
        calls.append(output)
        return ~target["y"].isnan()

    module = PathLossModule({"x.*": unreduced_mse(target=Target("y"), where=known)})
    x, y = small()
    assert module({"x": [x, x]}, {"y": y}).item() == 2 * EXPECTED[0]
    assert len(calls) == 1


def test_an_absent_mask_makes_its_term_absent():
    module = PathLossModule({"x": unreduced_mse(where=Target("known"))})
    x, y = small()
    loss = module({"x": x}, {"x": y, "known": None})
    loss.backward()
    assert (loss.item(), x.grad.tolist()) == (0.0, [0.0, 0.0, 0.0])
    assert not module.last.present["x"]


def test_an_absent_argument_makes_its_term_absent_before_the_condition_is_asked():
    module = PathLossModule({"x": unreduced_mse(target=Target("y"), where=at_target)})
    assert module({"x": torch.ones(3)}, {"y": None}).item() == 0


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ({"y": None, "known": True}, "Term 'x': the target has no 'knwon'."),
        ({"yy": torch.ones(3), "knwon": None}, "Term 'x': the target has no 'y'."),
    ],
    ids=["mask", "argument"],
)
def test_a_misspelt_path_raises_where_the_term_is_absent_too(target, message):
    module = PathLossModule({"x": unreduced_mse(target=Target("y"), where=Target("knwon"))})
    with pytest.raises(KeyError) as error:
        module({"x": torch.ones(3)}, target)
    assert str(error.value).startswith(message)


REFUSED = 'Build the criterion with reduction="none" and wrap it as Term(criterion, where=..., reduction="mean").'


@pytest.mark.parametrize(
    ("term", "message"),
    [
        (
            Term(nn.MSELoss(), where=Input("known")),
            f"Term 'x': its where selects samples, with shape (3,), but its criterion reduces by itself. {REFUSED}",
        ),
        (
            Term(nn.MSELoss(), where=Input("known"), reduction="mean"),
            f"Term 'x': its where selects samples, with shape (3,), but its criterion reduces by itself. {REFUSED}",
        ),
        (
            Term(nn.MSELoss(reduction="none"), where=Input("known")),
            f"Term 'x': its where selects samples, with shape (3,), but it has no reduction. {REFUSED}",
        ),
        (
            Term(lambda x, y: (x - y)[:2], where=Input("known"), reduction="mean"),
            "Term 'x': its where has shape (3,), but its criterion returned shape (2,). "
            "The first dimensions must agree.",
        ),
        (
            unreduced_mse(where=Input("pairs")),
            "Term 'x': its where has shape (2,), but an argument has shape (3,). The first dimensions of every "
            "argument from the output and the target must be those of where, or those of (N, C, d1, ...) where it is "
            "(N, d1, ...). Give what is not per sample as an Input or a constant.",
        ),
        (
            unreduced_mse(where=Input("weights")),
            "Term 'x': its where gave a tensor of torch.float32. It must give a bool tensor.",
        ),
        (unreduced_mse(where=Input("flag")), "Term 'x': its where gave a bool. It must give a bool tensor."),
        (unreduced_mse(where=Input("none")), "Term 'x': its where gave None. It must give a bool tensor."),
        (
            unreduced_mse(where=lambda output, target: None),
            "Term 'x': its where gave None. It must give a bool tensor.",
        ),
        (
            unreduced_mse(where=Input("elsewhere")),
            "Term 'x': its where is on meta, but the weights are on cpu. Move it to the outputs' device.",
        ),
    ],
    ids=lambda value: "" if isinstance(value, str) else getattr(value.where, "__name__", str(value.where)),
)
def test_what_does_not_fit_is_refused_by_a_call_and_by_check(term, message):
    module = PathLossModule({"x": term})
    input = {
        "known": torch.tensor([True, False, True]),
        "pairs": torch.tensor([True, False]),
        "weights": torch.ones(3),
        "flag": True,
        "none": None,
        "elsewhere": torch.ones(3, dtype=torch.bool, device="meta"),
    }
    x, y = small()
    with pytest.raises((ArgumentError, CriterionReturnError)) as error:
        module({"x": x}, {"x": y}, input=input)
    assert str(error.value) == message
    with pytest.raises(CheckError) as error:
        module.check({"x": x}, {"x": y}, input=input)
    assert str(error.value).endswith(message)


@pytest.mark.parametrize("where", [True, "known", torch.ones(3, dtype=torch.bool), nn.MSELoss], ids=str)
def test_where_must_be_a_source_or_a_callable(where):
    with pytest.raises(ConstructionError) as error:
        Term(nn.MSELoss(reduction="none"), where=where, reduction="mean")
    assert str(error.value) == (
        "Term cannot be built: where must be a source, such as Input('has_box'), or a callable "
        f"(output, target) -> bool tensor, not {where!r} of type {type(where).__name__}."
    )


def test_where_must_not_be_a_pattern_for_a_term_that_is_none():
    with pytest.raises(ConstructionError) as error:
        PathLossModule({"x": unreduced_mse(where=Target("known.*"))})
    assert str(error.value) == (
        "PathLossModule cannot be built: Term 'x': where is a pattern, but no source of the criterion is. "
        "Write its path out."
    )


def test_arguments_in_a_subtree_are_made_safe_and_the_input_is_as_it_is():
    def criterion(output: Any, target: Any, scale: Tensor) -> Tensor:
        return ((output["a"] - target["a"]) / output["b"]).square() * scale.sum()

    module = PathLossModule({"d": Term(criterion, where=Input("known"), reduction="sum", scale=Input("scale"))})
    output = {"d": {"a": torch.tensor([2.0, torch.nan], requires_grad=True), "b": torch.tensor([2.0, 0.0])}}
    target = {"d": {"a": torch.tensor([0.0, torch.nan]), "name": "text"}}
    loss = module(output, target, input={"known": torch.tensor([True, False]), "scale": torch.ones(3)})
    loss.backward()
    assert loss.item() == 3.0
    assert output["d"]["a"].grad.tolist() == [3.0, 0.0]  # 2 * (2 - 0) / 4 * 3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_values_are_at_least_float32(dtype):
    module = PathLossModule({"x": unreduced_mse(where=Input("known"))})
    x = torch.tensor([1.0, torch.inf, 5.0], dtype=dtype, requires_grad=True)
    loss = module({"x": x}, {"x": torch.zeros(3, dtype=dtype)}, input={"known": torch.tensor([True, False, True])})
    loss.backward()
    assert loss.dtype is torch.promote_types(dtype, torch.float32)
    assert (loss.item(), x.grad.tolist(), x.grad.dtype) == (13.0, [1.0, 0.0, 5.0], dtype)


def test_autocast_of_the_model_does_no_harm():
    model = nn.Linear(2, 3)
    module = PathLossModule({"x": Term(nn.CrossEntropyLoss(reduction="none"), where=Input("known"), reduction="mean")})
    known = torch.tensor([True, False, True])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        x = model(torch.ones(3, 2))
        loss = module({"x": x}, {"x": torch.tensor([0, -1, 2])}, input={"known": known})
    assert loss.dtype is torch.float32
    torch.testing.assert_close(loss, F.cross_entropy(x[known].float(), torch.tensor([0, 2])), rtol=1e-2, atol=1e-2)
    loss.backward()
    assert model.weight.grad.isfinite().all()


@pytest.mark.parametrize("known", [[True, False, True, True], [False] * 4], ids=["some", "none"])
def test_gradcheck(known):
    scaled = Scaled().double()
    module = PathLossModule(
        {
            "x": Term(scaled, where=Input("known"), reduction="mean"),
            "x:log": Term(hard, where=Input("known"), reduction="weighted_mean"),
        }
    )
    mask = torch.tensor(known)
    target = torch.rand(4, 4, dtype=torch.float64) + 0.5

    def loss(x: Tensor) -> Tensor:
        return module({"x": x}, {"x": target}, input={"known": mask}, sample_weight={"x:log": target[:, 0]})

    x = (torch.rand(4, 4, dtype=torch.float64) + 0.5).requires_grad_()
    assert torch.autograd.gradcheck(loss, x)
    assert torch.autograd.gradgradcheck(loss, x)


def test_a_criterion_that_compares_element_by_element_refuses_two_shapes():
    module = PathLossModule({"x": unreduced_mse(where=Input("known"))})
    with pytest.raises(ArgumentError) as error:
        module({"x": torch.ones(3, 1)}, {"x": torch.ones(3)}, input={"known": torch.ones(3) > 0})
    assert str(error.value) == (
        "Term 'x': its criterion compares element by element, but its first argument has shape (3, 1) and its "
        "second (3,). Torch would broadcast them. Give both the same shape."
    )


def test_outputs_whose_samples_are_not_first_are_refused():
    ctc = Term(
        nn.CTCLoss(reduction="none"),
        where=Target("known"),
        reduction="mean",
        input_lengths=Input("frames"),
        target_lengths=Target("length"),
    )
    target = {"x": torch.ones(3, 4), "length": torch.full((3,), 4), "known": torch.ones(3) > 0}
    with pytest.raises(ArgumentError, match=r"its where has shape \(3,\), but an argument has shape \(9, 3, 5\)"):
        PathLossModule({"x": ctc})({"x": torch.zeros(9, 3, 5)}, target, input={"frames": torch.full((3,), 9)})


def test_ctc_is_conditional_where_its_samples_are_first():
    def ctc(scores: Tensor, text: Tensor, frames: Tensor, length: Tensor) -> Tensor:
        return F.ctc_loss(scores.transpose(0, 1).log_softmax(-1), text, frames, length, reduction="none")

    module = PathLossModule(
        {"x": Term(ctc, where=Target("known"), reduction="mean", frames=Input("frames"), length=Target("length"))}
    )
    known, x, y = torch.tensor([False, True, True]), leaf(3, 9, 5), torch.randint(1, 5, (3, 4))
    with torch.no_grad():
        x[0] = torch.nan
    y[0], frames, length = -1, torch.full((3,), 9), torch.tensor([-7, 4, 3])
    loss = module({"x": x}, {"x": y, "length": length, "known": known}, input={"frames": frames})
    by_hand = ctc(x[known], y[known], frames[known], length[known]).mean()
    torch.testing.assert_close(loss, by_hand)
    torch.testing.assert_close(torch.autograd.grad(loss, x), torch.autograd.grad(by_hand, x))


def test_a_conditional_criterion_is_copied_pickled_and_exported():
    module = PathLossModule({"x": unreduced_mse(where=known(Target("x")))})
    output, target = {"x": torch.tensor([1.0, torch.nan])}, {"x": torch.tensor([3.0, torch.nan])}
    for twin in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert twin(output, target).item() == 4.0
    assert torch.export.export(module, (output, target)).module()(output, target).item() == 4.0


def every_kind() -> PathLossModule:
    """Conditional terms of every kind."""
    labelled = known(Target("age"))
    unreduced_ce = nn.CrossEntropyLoss(reduction="none")
    return PathLossModule(
        {
            "age": Term(nn.MSELoss(reduction="none"), where=labelled, reduction="mean"),
            "age:own": Term(Scaled(), where=labelled, reduction="sum"),
            "label": Term(unreduced_ce, where=Input("labelled"), reduction="weighted_mean"),
            "mask": Term(unreduced_ce, where=Target("valid"), reduction="mean"),
            "box": Term(nn.SmoothL1Loss(), where=lambda output, target: target["box"].isfinite().all()),
            "aux.*": Term(hard, target=Target("score"), where=Target("scored"), reduction="mean", match="mean"),
        }
    )


def batch(seed: int, share: float = 0.5) -> tuple[Any, Any, dict[str, Any]]:
    """Returns output, target and keywords with that share of samples selected, and poison in all others."""
    generator = torch.Generator().manual_seed(seed)

    def rand(*shape: int) -> Tensor:
        return torch.rand(shape, generator=generator)

    age, labelled, valid, box, scored = (rand(*shape) < share for shape in ((5,), (5,), (2, 3, 3), (), (5,)))
    output = {
        "age": torch.where(age[:, None], rand(5, 4), torch.nan),
        "label": torch.where(labelled[:, None], rand(5, 3), torch.inf),
        "mask": torch.where(valid[:, None], rand(2, 4, 3, 3), torch.nan),
        "box": torch.where(box, rand(5, 4), torch.nan),
        "aux": [torch.where(scored, rand(5), 0.0), torch.where(scored, rand(5), -1.0)],
    }
    target = {
        "age": torch.where(age[:, None], rand(5, 4), torch.nan),
        "label": torch.where(labelled, 1, -1),
        "mask": torch.where(valid, 3, -100),
        "valid": valid,
        "box": torch.where(box, rand(5, 4), torch.nan),
        "score": torch.where(scored, rand(5) + 0.1, 0.0),
        "scored": scored,
    }
    weight = {"label": torch.where(labelled, rand(5), torch.nan)}
    output = tree_map(lambda leaf: leaf.requires_grad_(), output)
    return output, target, {"input": {"labelled": labelled}, "sample_weight": weight}


BATCHES = [batch(seed, share) for seed, share in enumerate((0.5, 0.2, 0.8, 0.0, 1.0))]


def by_call(module: PathLossModule, sample: Any) -> tuple[Tensor, list[Tensor], dict[str, float]]:
    output, target, keywords = sample
    loss = module(output, target, **keywords)
    found = torch.autograd.grad(loss, [*tree_leaves(output), *module.parameters()])
    assert loss.isfinite()
    assert all(gradient.isfinite().all() for gradient in found)
    return loss.detach(), list(found), module.last.log()


def assert_same(ours: Any, theirs: Any) -> None:
    torch.testing.assert_close(ours, theirs, equal_nan=True, rtol=1e-5, atol=1e-6)


def test_terms_of_every_kind_equal_the_losses_by_hand():
    module, (output, target, keywords) = every_kind(), BATCHES[0]
    known, scored = ~target["age"].isnan().any(1), target["scored"]
    labelled, weight = keywords["input"]["labelled"], keywords["sample_weight"]["label"]
    valid = target["valid"]
    label = F.cross_entropy(output["label"][labelled], target["label"][labelled], reduction="none")
    expected = {
        "age": F.mse_loss(output["age"][known], target["age"][known]),
        "age:own": Scaled()(output["age"][known], target["age"][known]).sum(),
        "label": (label * weight[labelled]).sum() / weight[labelled].sum(),
        "mask": F.cross_entropy(output["mask"].movedim(1, -1)[valid], target["mask"][valid]),
        "box": F.smooth_l1_loss(output["box"], target["box"]),
        "aux.*": sum(hard(x[scored], target["score"][scored]).mean() for x in output["aux"]) / 2,
    }
    assert 0 < scored.sum() < 5
    assert_same(module.terms(output, target, **keywords), expected)


@pytest.mark.parametrize("warm", [False, True], ids=["cold", "after an eager call and check"])
def test_one_graph_serves_every_mask(warm):
    module, counter = every_kind(), CompileCounter()
    if warm:
        by_call(module, BATCHES[0])
        module.check(BATCHES[0][0], BATCHES[0][1], **BATCHES[0][2])
    compiled = torch.compile(module, backend=counter, fullgraph=True)
    for output, target, keywords in BATCHES:
        loss = compiled(output, target, **keywords)
        logged = module.last.log()
        found = list(torch.autograd.grad(loss, [*tree_leaves(output), *module.parameters()]))
        assert_same((loss.detach(), found, logged), by_call(module, (output, target, keywords)))
    assert counter.frame_count == 1


def test_eight_batch_sizes_need_at_most_two_graphs():
    counter = CompileCounter()
    module = PathLossModule({"x": unreduced_mse(where=Shared(lambda y: ~y.isnan(), Target("x")))})
    compiled = torch.compile(module, backend=counter, fullgraph=True)
    for size in range(3, 11):
        y = torch.where(torch.arange(size) % 2 == 0, torch.ones(size), torch.nan)
        assert compiled({"x": torch.zeros(size)}, {"x": y}).item() == 1
    assert counter.frame_count <= 2


def ways(module: PathLossModule, sample: Any) -> Any:
    """Yields total, gradients and record of every other way to the gradients."""
    output, target, keywords = sample
    leaves = tree_leaves(output)

    def taken(total: Tensor) -> Any:
        tensors = [*leaves, *module.parameters()]
        found = [tensor.grad for tensor in tensors]
        for tensor in tensors:
            tensor.grad = None
        return total.detach(), found, module.last.log()

    yield taken(module.backward(output, target, **keywords))
    module._grad_in_forward = True
    loss = module(output, target, **keywords)
    loss.backward()
    module._grad_in_forward = False
    yield taken(loss)
    total, gradients = module.value_and_grad(output, target, **keywords)
    _, found, logged = by_call(module, sample)
    yield total, [*tree_leaves(gradients), *found[len(leaves) :]], logged


@pytest.mark.parametrize("sample", BATCHES[:4], ids=["some", "few", "many", "none"])
def test_every_way_to_the_gradients_gives_the_same(sample):
    module = every_kind()
    expected = by_call(module, sample)
    for found in ways(module, sample):
        assert_same(found, expected)


@pytest.mark.slow
def test_every_compiled_way_to_the_gradients_gives_the_same():
    module, eager = every_kind(), every_kind()
    module._grad_in_forward = True  # compile() asks for it: one of the ways differentiates in the call
    module.compile(backend="aot_eager")
    module._grad_in_forward = False
    for sample in BATCHES:
        for found in (by_call(module, sample), *ways(module, sample)):
            assert_same(found, by_call(eager, sample))


@pytest.mark.slow
def test_inductor_gives_the_same():
    module, eager = every_kind(), every_kind()
    module.compile()
    for sample in BATCHES:
        assert_same(by_call(module, sample), by_call(eager, sample))


def test_value_and_grad_inside_of_ones_own_graph_gives_the_same():
    module = PathLossModule({"x": unreduced_mse(where=Input("known")), "x:log": hard_where_known()})
    step = torch.compile(lambda *args: module.value_and_grad(args[0], args[1], input=args[2]), fullgraph=True,
                         backend="aot_eager")  # fmt: skip
    for mask in torch.tensor([[True, False, True], [False, False, False]]):
        x, y = torch.where(mask, 1.5, torch.nan), torch.where(mask, 2.0, torch.nan)
        total, gradient = step({"x": x}, {"x": y}, {"known": mask})
        theirs, expected = module.value_and_grad({"x": x}, {"x": y}, input={"known": mask})
        assert total.isfinite()
        assert_same((total, gradient["x"]), (theirs, expected["x"]))
        assert (gradient["x"][~mask] == 0).all()


def hard_where_known() -> Term:
    return Term(hard, where=Input("known"), reduction="mean")


def test_nothing_is_read_from_the_device():
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        module = every_kind()
        output, target, keywords = tree_map(mode.from_tensor, BATCHES[0])
        loss = module(output, target, **keywords)
        loss.backward()
        assert output["age"].grad.shape == (5, 4)


def test_consume_keeps_what_a_later_mask_reads():
    large = 2**19  # floats: more than the memory for which terms are grouped
    module = PathLossModule(
        {
            "gate": nn.MSELoss(),
            "other": nn.MSELoss(),
            "x": unreduced_mse(where=lambda output, target: output["gate"][:3] > 0),
            "y": unreduced_mse(where=Shared(lambda gate: gate[:3] > 0, Output("gate")), normalizer=None),
        }
    )
    model = nn.Parameter(torch.ones(3))
    gate = torch.cat([model * torch.tensor([1.0, -1.0, 1.0]), torch.zeros(large)])

    def output() -> dict[str, Tensor]:
        return {"gate": gate * 1, "other": torch.zeros(large, requires_grad=True) * 1, "x": model * 2, "y": model * 3}

    target = {"gate": torch.zeros(large + 3), "other": torch.ones(large), "x": torch.zeros(3), "y": torch.zeros(3)}
    (expected,) = torch.autograd.grad(module(output(), target), model, retain_graph=True)
    module.backward(output(), target, consume=True)
    torch.testing.assert_close(model.grad, expected)
    torch.testing.assert_close(module.last.values["x"], torch.tensor(4.0))


masks = st.lists(st.booleans(), min_size=0, max_size=7)


@settings(max_examples=200)
@given(masks, st.sampled_from([*CASES]), st.sampled_from(REDUCTIONS), st.sampled_from([math.nan, math.inf, 0.0]))
def test_any_mask_gives_the_criterion_on_the_selected_rows(flags, some, reduction, poison):
    mask = torch.tensor(flags, dtype=torch.bool)
    term = some.term(where=Input("known"), reduction=reduction)
    module = PathLossModule({"t": term})
    outputs, targets = poisoned_call(some, mask, poison)
    weights = torch.rand(len(mask)) + 0.5
    loss = module(outputs, targets, input={"known": mask}, sample_weight=torch.where(mask, weights, poison))
    found = gradients(loss, module, outputs)
    if not any(flags):
        assert loss.item() == 0
        assert all((gradient == 0).all() for gradient in found)
        return
    rows = some.by_hand(term.criterion, lambda tensor: tensor[mask], outputs, targets)
    by_hand = reduced(rows, reduction, weights[mask])
    torch.testing.assert_close(loss, by_hand)
    torch.testing.assert_close(found, gradients(by_hand, module, outputs))


def softmax_then_mse(where: Any, *, shared: bool) -> PathLossModule:
    mse = nn.MSELoss(reduction="none")
    if shared:
        probability = Shared(torch.softmax, Output("x"), 1)
        return PathLossModule({"x": Term(mse, probability, Target("x"), where=where, reduction="mean")})
    term = Term(lambda x, y: mse(x.softmax(1), y), where=where, reduction="mean")
    return PathLossModule({"x": term})


def infinite_where_unknown() -> Any:
    x = torch.tensor([[1.0, 2.0], [torch.inf, 1.0]], requires_grad=True)
    return {"x": x}, {"x": torch.zeros(2, 2), "known": torch.tensor([True, False])}


def test_check_finds_the_shared_computation_that_makes_a_gradient_nan():
    output, target = infinite_where_unknown()
    module = softmax_then_mse(Target("known"), shared=True)
    (gradient,) = torch.autograd.grad(module(output, target), output["x"])
    assert gradient[1].isnan().all()  # by hand too: softmax(x)[known]
    with pytest.raises(CheckError) as error:
        module.check(output, target)
    assert str(error.value) == (
        "This output and target do not fit the criterion: Term 'x': its value is finite, but its gradient at the "
        "output is not. What is Shared is computed from all samples, also those that where leaves out, and its "
        "derivative has to be finite there. Do that computation in the criterion, which sees other values in their "
        "place."
    )


def test_the_same_computation_in_the_criterion_is_safe():
    output, target = infinite_where_unknown()
    module = softmax_then_mse(Target("known"), shared=False)
    module.check(output, target)
    (gradient,) = torch.autograd.grad(module(output, target), output["x"])
    assert gradient[1].tolist() == [0.0, 0.0]
    probability = output["x"].softmax(1)[:1]
    (expected,) = torch.autograd.grad(probability.square().mean(), output["x"])
    torch.testing.assert_close(gradient[0], expected[0])


def test_check_lets_shared_computations_with_finite_derivatives_pass():
    output, target = infinite_where_unknown()
    finite = {"x": output["x"].detach().clamp(max=3).requires_grad_()}
    softmax_then_mse(Target("known"), shared=True).check(finite, target)


def test_explain_shows_the_mask_and_whether_it_makes_the_term_absent():
    module = PathLossModule({"x": unreduced_mse(where=Target("known")), "y": unreduced_mse(where=at_target)})
    output = {"x": torch.zeros(3), "y": torch.zeros(2)}
    target = {"x": torch.zeros(3), "y": torch.zeros(2), "known": torch.ones(3, dtype=torch.bool)}
    lines = module.explain(output, target).splitlines()[-2:]
    assert lines[0].endswith("Output('x'), Target('x'), where=Target('known')  (3,) and (3,) and (3,)")
    assert lines[1].endswith("Output('y'), Target('y'), where=at_target        (2,) and (2,)")
    line = module.explain(output, {**target, "known": None}).splitlines()[-2]
    assert line.endswith("absent: the target has None at 'known'")


def test_explain_does_not_call_a_term_absent_for_a_none_in_the_input():
    module = PathLossModule({"x": Term(lambda x, y, z: (x - y).mean(), z=Input("z"))})
    output, target = {"x": torch.zeros(3)}, {"x": torch.zeros(3)}
    assert module.explain(output, target, input={"z": None}).endswith("(3,) and (3,) and NoneType")


@st.composite
def masks_of_elements(draw: Any) -> tuple[Tensor, tuple[int, ...]]:
    """Returns a mask of one to three dimensions, and the shape of arguments that may have more."""
    sizes = draw(st.lists(st.integers(1, 3), min_size=1, max_size=3))
    count = math.prod(sizes)
    mask = torch.tensor(draw(st.lists(st.booleans(), min_size=count, max_size=count))).reshape(sizes)
    return mask, (*sizes, *draw(st.lists(st.integers(1, 2), max_size=4 - len(sizes))))


ELEMENTWISE = {
    "MSE": nn.MSELoss(reduction="none"),
    "BCE": nn.BCELoss(reduction="none"),
    "logarithm, root and quotient": hard,
}


@settings(max_examples=300)
@given(masks_of_elements(), st.sampled_from([*ELEMENTWISE]), st.sampled_from([math.nan, math.inf, 0.0, -1.0]))
def test_any_mask_of_elements_gives_the_criterion_on_the_selected_elements(drawn, name, poison):
    mask, shape = drawn
    assume(name != "logarithm, root and quotient" or not may_have_classes(mask, shape))
    module = PathLossModule({"x": Term(ELEMENTWISE[name], where=Input("known"), reduction="mean")})
    x = poisoned(probabilities(*shape), mask, poison).requires_grad_()
    y = poisoned(probabilities(*shape), mask, poison)
    loss = module({"x": x}, {"x": y}, input={"known": mask})
    (found,) = torch.autograd.grad(loss, x)
    if not mask.any():
        assert loss.item() == 0
        assert (found == 0).all()
        return
    by_hand = ELEMENTWISE[name](x[mask], y[mask]).mean()
    torch.testing.assert_close(loss, by_hand)
    torch.testing.assert_close(found, torch.autograd.grad(by_hand, x)[0])


def may_have_classes(mask: Tensor, shape: tuple[int, ...]) -> bool:
    """Whether the second dimension of a shape may be that of classes, which a criterion that is not known refuses."""
    return mask.ndim > 1 and shape[:1] + shape[2:] == tuple(mask.shape)


class LogOfFar(nn.Module):
    """A criterion with a parameter that is NaN, with its derivative, at the constants that stand for no sample."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(1.0))

    def forward(self, output: Tensor, target: Tensor) -> Tensor:
        return self.scale * (output - target - 5).log()


@pytest.mark.parametrize("flags", [[False, True], [False, False]], ids=["some", "none"])
@pytest.mark.parametrize("whole", [False, True], ids=["samples", "whole"])
def test_a_criterion_that_stands_no_constant_makes_nothing_nan(flags, whole):
    mask = torch.tensor(flags)
    criterion = LogOfFar()
    where = Shared(torch.any, Input("known")) if whole else Input("known")
    module = PathLossModule({"x": Term(criterion, where=where, reduction="sum")})
    x, y = torch.tensor([20.0 if whole else torch.nan, 10.0], requires_grad=True), torch.zeros(2)
    loss = module({"x": x}, {"x": y}, input={"known": mask})
    loss.backward()
    rows = x.detach() if whole and any(flags) else x.detach()[mask]
    torch.testing.assert_close(loss.detach(), (rows - 5).log().sum())
    torch.testing.assert_close(criterion.scale.grad, (rows - 5).log().sum())
    assert x.grad.isfinite().all()


def test_a_second_argument_from_the_input_is_made_safe():
    term = Term(nn.CrossEntropyLoss(reduction="none"), Output("x"), Input("y"), where=Input("known"), reduction="mean")
    x, y, mask = leaf(3, 4), torch.tensor([1, -7, 99]), torch.tensor([True, False, False])
    loss = PathLossModule({"x": term})({"x": x}, input={"y": y, "known": mask})
    torch.testing.assert_close(loss, F.cross_entropy(x[:1], y[:1]))


def test_a_mask_shared_with_an_earlier_term_is_computed_once_by_backward_too():
    calls = []

    def positive(x: Tensor) -> Tensor:
        calls.append(x)
        return x > 0

    mask = Shared(positive, Target("large"))
    module = PathLossModule(
        {
            "large": Term(nn.MSELoss(reduction="none"), where=mask, reduction="mean"),
            "between": nn.MSELoss(),
            "count": Term(nn.L1Loss(reduction="sum"), normalizer=mask),
        }
    )
    large = 2**19  # floats: more than the memory for which terms are grouped
    output = {
        name: torch.zeros(n, requires_grad=True) for name, n in (("large", large), ("between", large), ("count", 1))
    }
    module.backward(output, {"large": torch.ones(large), "between": torch.ones(large), "count": torch.ones(1)})
    assert len(calls) == 1
