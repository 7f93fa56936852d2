"""Jacobian descent, against TorchJD's own backward passes on the losses by hand."""

import copy
import subprocess
import sys
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from _laws import CASES
from torch import nn
from torch.utils._pytree import tree_leaves, tree_map
from torchjd.aggregation import (
    IMTLG,
    MGDA,
    PCD,
    AlignedMTL,
    ConFIG,
    Constant,
    ExcessMTL,
    GradVac,
    Mean,
    MeanWeighting,
    PCGrad,
    Random,
    Sum,
    TrimmedMean,
)
from torchjd.autojac import backward as jd_backward
from torchjd.autojac import jac_to_grad, mtl_backward

from torch_pathloss import ArgumentError, PathLossModule, Target, Term, UncoveredError
from torch_pathloss.integrations import torchjd
from torch_pathloss.weighting import WeightedSum

AGGREGATORS = {
    "AlignedMTL": AlignedMTL,
    "ConFIG": ConFIG,
    "Constant": lambda: Constant(torch.tensor([0.5, -1.0, 2.0]).double()),
    "ExcessMTL": ExcessMTL,
    "GradVac": GradVac,
    "IMTLG": IMTLG,
    "MGDA": MGDA,
    "Mean": Mean,
    "PCD": PCD,
    "PCGrad": PCGrad,
    "Random": Random,
    "Sum": Sum,
    "TrimmedMean": lambda: TrimmedMean(1),
}
any_aggregator = pytest.mark.parametrize("name", AGGREGATORS)
one_or_all_rows = pytest.mark.parametrize("rows", [1, 2, None])


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.backbone = nn.Linear(3, 4)
        self.a = nn.Linear(4, 2)
        self.b = nn.Linear(4, 2)
        self.unused = nn.Linear(4, 1)

    def heads(self, feature):
        return {"a": self.a(feature), "b": {"x": self.b(feature), "y": feature.sum(1)}, "unused": self.unused(feature)}

    def forward(self, x):
        return self.heads(self.backbone(x).tanh())


class Scaled(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(1.5))

    def forward(self, input, target):
        return (self.scale * input - target).square().mean()


def subtree(output, target):
    return (output["x"].sum(1) - output["y"]).square().mean()


def criterion():
    return PathLossModule({"a": Scaled(), "b": subtree, "b.x": nn.L1Loss()}, weights={"a": 0.5, "b.x": 3.0})


def losses(module, output, target):
    """The weighted values by hand."""
    return [
        0.5 * (module.get_submodule("/a").scale * output["a"] - target["a"]).square().mean(),
        (output["b"]["x"].sum(1) - output["b"]["y"]).square().mean(),
        3.0 * F.l1_loss(output["b"]["x"], target["b"]["x"]),
    ]


@pytest.fixture
def setup():
    torch.manual_seed(1)
    target = {"a": torch.randn(5, 2).double(), "b": {"x": torch.randn(5, 2).double()}}
    return Model().double(), criterion().double(), torch.randn(5, 3).double(), target


def gradients(*modules):
    found = {f"{k}.{n}": p.grad for k, module in enumerate(modules) for n, p in module.named_parameters()}
    for module in modules:
        module.zero_grad()
    return found


def assert_same(ours, theirs):
    assert {name for name, g in ours.items() if g is None} == {name for name, g in theirs.items() if g is None}
    for name, gradient in ours.items():
        if gradient is not None:
            torch.testing.assert_close(gradient, theirs[name], atol=1e-6, rtol=1e-6, msg=lambda m, n=name: f"{n}: {m}")


def by_torchjd(setup, aggregator):
    """Returns the gradients that TorchJD's ``backward`` leaves; those of the criterion's parameter are plain."""
    model, module, x, target = setup
    values = losses(module, model(x), target)
    parameters = [*model.backbone.parameters(), *model.a.parameters(), *model.b.parameters()]
    sum(values).backward(inputs=list(module.parameters()), retain_graph=True)
    jd_backward(values, inputs=parameters)
    jac_to_grad(parameters, aggregator)
    return gradients(model, module)


def by_mtl_backward(setup, aggregator):
    model, module, x, target = setup
    feature = model.backbone(x).tanh()
    mtl_backward(losses(module, model.heads(feature), target), feature, retain_graph=True)  # two terms share a head
    jac_to_grad(model.backbone.parameters(), aggregator)
    return gradients(model, module)


@any_aggregator
@one_or_all_rows
def test_all_parameters_get_what_torchjd_backward_gives(setup, name, rows):
    theirs = []
    aggregator = AGGREGATORS[name]()
    for step in range(2):  # some aggregators have state
        torch.manual_seed(step)
        theirs.append(by_torchjd(setup, aggregator))
    model, module, x, target = setup
    aggregator = AGGREGATORS[name]()
    for step in range(2):
        torch.manual_seed(step)
        torchjd.backward(module, model(x), target, aggregator=aggregator, parallel_chunk_size=rows)
        assert_same(gradients(model, module), theirs[step])


@any_aggregator
@one_or_all_rows
def test_with_features_it_gives_what_mtl_backward_gives(setup, name, rows):
    torch.manual_seed(0)
    theirs = by_mtl_backward(setup, AGGREGATORS[name]())
    model, module, x, target = setup
    torch.manual_seed(0)
    feature = model.backbone(x).tanh()
    output = model.heads(feature)
    torchjd.backward(module, output, target, aggregator=AGGREGATORS[name](), features=feature, parallel_chunk_size=rows)
    assert_same(gradients(model, module), theirs)


def test_the_total_is_returned_and_last_is_written_as_in_a_call(setup):
    model, module, x, target = setup
    expected = module(model(x), target).detach()
    logged = module.last.log()
    module.last.record.fill_(torch.nan)
    total = torchjd.backward(module, model(x), target, aggregator=Mean())
    assert not total.requires_grad
    torch.testing.assert_close(total, expected)
    torch.testing.assert_close(module.last.log(), logged)


def test_gradients_accumulate_and_the_sum_is_the_usual_gradient(setup):
    model, module, x, target = setup
    module(model(x), target).backward()
    expected = gradients(model, module)
    for _ in range(2):
        torchjd.backward(module, model(x), target, aggregator=Sum())
    assert_same(gradients(model, module), {name: None if g is None else 2 * g for name, g in expected.items()})


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_sum_is_the_usual_gradient_for_every_criterion(case):
    def gradients_of(step):
        torch.manual_seed(0)
        module, output, target, keywords = case.make(torch.float64)
        leaves = [leaf for leaf in tree_leaves(output) if isinstance(leaf, torch.Tensor) and leaf.requires_grad]
        for leaf in leaves:
            leaf.retain_grad()  # some are views
        done = {}

        def behind(leaf):
            known = isinstance(leaf, torch.Tensor) and leaf.requires_grad
            return done.setdefault(id(leaf), leaf * 1) if known else leaf  # one tensor at two places stays one

        total = step(module, tree_map(behind, output), target, **keywords)
        return total.detach(), [tensor.grad for tensor in (*leaves, *module.parameters())]

    def usual(module, output, target, **keywords):
        total = module(output, target, **keywords)
        total.backward()
        return total

    ours = gradients_of(partial(torchjd.backward, aggregator=Sum()))
    torch.testing.assert_close(ours, gradients_of(usual))


def test_outputs_of_low_precision_under_autocast(setup):
    model, module, x, target = setup
    model.float()
    module.float()
    x, target = x.float(), {"a": target["a"].float(), "b": {"x": target["b"]["x"].float()}}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = model(x)
        module(output, target).backward()
    expected = gradients(model, module)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = model(x)
    assert output["a"].dtype == torch.bfloat16
    total = torchjd.backward(module, output, target, aggregator=Sum())
    assert total.dtype == torch.float32
    for name, gradient in gradients(model, module).items():
        if gradient is not None:
            torch.testing.assert_close(gradient, expected[name], atol=0.02, rtol=0.02)


def test_terms_on_one_leaf_and_one_tensor_at_two_places(setup):
    x = torch.randn(4, requires_grad=True)
    module = PathLossModule({"x:l1": nn.L1Loss(), "x:mse": nn.MSELoss(), "y": nn.L1Loss()})
    target = {"x": torch.randn(4), "y": torch.randn(4)}
    y = x * 2
    values = [F.l1_loss(y, target["x"]), F.mse_loss(y, target["x"]), F.l1_loss(y, target["y"])]
    jd_backward(values, inputs=[x])
    jac_to_grad([x], MGDA())
    expected, x.grad = x.grad, None
    y = x * 2
    torchjd.backward(module, {"x": y, "y": y}, target, aggregator=MGDA())
    torch.testing.assert_close(x.grad, expected, atol=1e-6, rtol=1e-6)


def test_several_features_of_one_operation(setup):
    torch.manual_seed(2)
    weight, head = torch.randn(3, 4, requires_grad=True), torch.randn(2, requires_grad=True)

    def model(x):
        left, right = (x @ weight).tanh().chunk(2, dim=1)
        return (left, right), {"l": left @ head, "r": right @ head, "both": (left * right).sum(1)}

    module = PathLossModule({name: nn.MSELoss() for name in ("l", "r", "both")})
    x, target = torch.randn(5, 3), {name: torch.randn(5) for name in ("l", "r", "both")}
    features, output = model(x)
    mtl_backward([F.mse_loss(output[name], target[name]) for name in target], features)
    jac_to_grad([weight], MGDA())
    expected = weight.grad, head.grad
    weight.grad = head.grad = None
    features, output = model(x)
    torchjd.backward(module, output, target, aggregator=MGDA(), features=features)
    torch.testing.assert_close((weight.grad, head.grad), expected, atol=1e-6, rtol=1e-6)


def absent_case():
    module = PathLossModule({"a": nn.MSELoss(), "gone": nn.MSELoss(), "b": nn.MSELoss()})
    x = torch.tensor([[3.0, 1.0, 2.0]], requires_grad=True)
    output = {"a": x[:, 0], "gone": x[:, 1], "b": x[:, 2] - x[:, 0]}
    return module, x, output, {"a": torch.zeros(1), "gone": None, "b": torch.zeros(1)}


def test_an_absent_term_has_a_row_of_zeros_or_none():
    # d/dx (x0^2) = (6, 0, 0), and d/dx (x2 - x0)^2 = 2 (x2 - x0) (-1, 0, 1) = (2, 0, -2).
    module, x, output, target = absent_case()
    torchjd.backward(module, output, target, aggregator=Constant(torch.tensor([1.0, 10.0, 100.0])))
    assert x.grad.tolist() == [[206.0, 0.0, -200.0]]
    module, x, output, target = absent_case()
    torchjd.backward(module, output, target, aggregator=Constant(torch.tensor([1.0, 100.0])), absent="drop")
    assert x.grad.tolist() == [[206.0, 0.0, -200.0]]
    module, x, output, target = absent_case()
    torchjd.backward(module, output, target, aggregator=MGDA())
    torch.testing.assert_close(x.grad, torch.zeros(1, 3), atol=1e-2, rtol=0)  # a row of zeros is the shortest mean
    module, x, output, target = absent_case()
    torchjd.backward(module, output, target, aggregator=MGDA(), absent="drop")
    # The shortest point on the line from (2, -2) to (6, 0) in x0 and x2 is t = -(2 * 4 - 2 * 2) / 20 < 0, so its end.
    torch.testing.assert_close(x.grad, torch.tensor([[2.0, 0.0, -2.0]]), atol=1e-2, rtol=0)


def test_where_every_term_is_absent_gradients_are_zero():
    module, x, output, target = absent_case()
    total = torchjd.backward(module, output, dict.fromkeys(target), aggregator=MGDA(), absent="drop")
    assert total.item() == 0.0
    assert x.grad.tolist() == [[0.0, 0.0, 0.0]]


def test_an_empty_selection_has_a_row_of_zeros():
    module = PathLossModule(
        {"a": Term(nn.MSELoss(reduction="none"), where=Target("has"), reduction="mean"), "b": nn.MSELoss()}
    )
    x = torch.tensor([3.0], requires_grad=True)
    target = {"a": torch.full((1,), torch.nan), "b": torch.zeros(1), "has": torch.tensor([False])}
    torchjd.backward(module, {"a": x * 1, "b": x * 1}, target, aggregator=Mean(), absent="drop")
    assert x.grad.tolist() == [3.0]  # (0 + 6) / 2


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_model_and_criterion_may_be_compiled(setup, backend):
    model, module, x, target = setup
    expected = by_torchjd(setup, MGDA()), by_mtl_backward(setup, MGDA())
    model.unused.requires_grad_(False)  # a compiled model gives zeros to what it does not use, as in any backward
    module.compile(backend=backend)
    whole = torch.compile(model, backend=backend, fullgraph=True)
    torchjd.backward(module, whole(x), target, aggregator=MGDA())
    assert_same(gradients(model, module), expected[0])
    backbone = torch.compile(lambda x: model.backbone(x).tanh(), backend=backend, fullgraph=True)
    heads = torch.compile(model.heads, backend=backend, fullgraph=True)
    feature = backbone(x)
    torchjd.backward(module, heads(feature), target, aggregator=MGDA(), features=feature)
    assert_same(gradients(model, module), expected[1])


def test_features_of_a_model_that_is_compiled_as_a_whole_raise(setup):
    model, module, x, target = setup

    def both(x):
        feature = model.backbone(x).tanh()
        return feature, model.heads(feature)

    feature, output = torch.compile(both, backend="aot_eager")(x)
    with pytest.raises(ArgumentError) as caught:
        torchjd.backward(module, output, target, aggregator=MGDA(), features=feature)
    assert str(caught.value) == (
        "The output does not depend on features[0]. Pass the tensor that the heads were called with, not a copy; where "
        "the model is compiled, compile what is before the features and the heads apart."
    )


def test_what_does_not_fit_raises_and_leaves_no_gradient(setup):
    model, module, x, target = setup
    feature = model.backbone(x).tanh()
    output = model.heads(feature)
    weighted = PathLossModule({"a": nn.MSELoss()}, weighting=WeightedSum())
    cases = [
        (
            module,
            {"aggregator": MeanWeighting()},
            "aggregator must be a torchjd.aggregation.Aggregator, such as UPGrad(), not MeanWeighting.",
        ),
        (
            weighted,
            {"aggregator": Mean()},
            "The criterion has the weighting WeightedSum, and an aggregator is another one. "
            "Build the criterion without weighting=.",
        ),
        (
            module,
            {"aggregator": Mean(), "absent": "skip"},
            "absent must be one of 'zero', 'drop', not 'skip'.",
        ),
        (
            module,
            {"aggregator": GradVac(), "absent": "drop"},
            "GradVac keeps state for each row, which would belong to other terms once the row of an absent one is "
            'dropped. Pass absent="zero".',
        ),
        (
            module,
            {"aggregator": Mean(), "features": [feature, x]},
            "features[1] must be a tensor that the model computed, still in its graph.",
        ),
        (
            module,
            {"aggregator": Mean(), "features": feature * 1},
            "The output does not depend on features[0]. Pass the tensor that the heads were called with, not a copy; "
            "where the model is compiled, compile what is before the features and the heads apart.",
        ),
        (
            module,
            {"aggregator": Mean(), "features": output["a"]},
            "2 parameters are behind the features and beside them, the first of shape (4,). Pass every feature that "
            "the heads share, or leave features out; where the model is compiled, compile what is before the features "
            "and the heads apart.",
        ),
    ]
    for container, options, message in cases:
        with pytest.raises(ArgumentError) as caught:
            torchjd.backward(container, output, target, **options)
        assert str(caught.value) == message
    with torch.no_grad():
        output = model(x)
    with pytest.raises(ArgumentError) as caught:
        torchjd.backward(module, output, target, aggregator=Mean())
    assert str(caught.value) == (
        "No term depends on a tensor of the output that requires grad, so there is nothing to aggregate. "
        "Compute the output with gradients enabled."
    )
    assert all(gradient is None for gradient in gradients(model, module).values())


def test_uncovered_leaves_are_reported_as_in_a_call(setup):
    model, _, x, target = setup
    module = PathLossModule({"a": nn.MSELoss(), "b.x": nn.MSELoss()}, uncovered="error")
    with pytest.raises(UncoveredError, match=r"No term reaches the output leaves 'b.y', 'unused'"):
        torchjd.backward(module, model(x), target, aggregator=Mean())


def test_training_with_it_is_training_with_torchjd(setup):
    ours, theirs = setup, copy.deepcopy(setup)
    optimizers = [torch.optim.Adam([*m.parameters(), *c.parameters()]) for m, c, _, _ in (ours, theirs)]
    for _ in range(5):
        model, module, x, target = ours
        torchjd.backward(module, model(x), target, aggregator=MGDA())
        optimizers[0].step()
        optimizers[0].zero_grad()
        model, module, *_ = theirs
        for name, gradient in by_torchjd(theirs, MGDA()).items():
            (model, module)[int(name[0])].get_parameter(name[2:]).grad = gradient
        optimizers[1].step()
        optimizers[1].zero_grad()
    for one, other in zip(ours[0].parameters(), theirs[0].parameters(), strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)


def test_without_torchjd_it_imports_and_says_how_to_install_it():
    code = (
        "import sys, torch; sys.modules['torchjd'] = None\n"
        "from torch_pathloss import MissingPackageError, PathLossModule\n"
        "from torch_pathloss.integrations import torchjd\n"
        "try:\n"
        "    torchjd.backward(PathLossModule(torch.nn.MSELoss()), torch.ones(1), torch.ones(1), aggregator=None)\n"
        "except MissingPackageError as error:\n"
        "    print(error)\n"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout == (
        "torch_pathloss.integrations.torchjd needs torchjd, which is not installed. "
        "Run: pip install 'torch-pathloss[torchjd]'\n"
    )
