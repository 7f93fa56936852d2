"""Norms and cosines of the terms' gradients, against the same losses differentiated by hand."""

import io
import math
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from _laws import CASES
from rich.console import Console
from torch import nn

from torch_pathloss import ArgumentError, Conflicts, PathLossModule, PathNotFoundError, Target, Term
from torch_pathloss.schedules import alternate
from torch_pathloss.weighting import WeightedSum


class Model(nn.Module):
    """A shared layer and two heads; the output holds the shared feature too."""

    def __init__(self):
        super().__init__()
        self.backbone = nn.Linear(3, 4)
        self.head = nn.Linear(4, 2)
        self.other = nn.Linear(4, 2)

    def forward(self, x):
        feature = self.backbone(x).tanh()
        return {"feature": feature, "a": self.head(feature), "b": self.other(feature)}


def criterion():
    return PathLossModule(
        {"a": nn.MSELoss(), "b:l1": nn.L1Loss(), "b:mse": nn.MSELoss()}, weights={"b:l1": 3.0, "b:mse": -2.0}
    )


def losses(output, target):
    return [
        F.mse_loss(output["a"], target["a"]),
        F.l1_loss(output["b"], target["b"]),
        F.mse_loss(output["b"], target["b"]),
    ]


def data():
    return torch.randn(5, 3), {"a": torch.randn(5, 2), "b": torch.randn(5, 2)}


SIGNS = torch.tensor([1.0, 1.0, -1.0])


def by_hand(values, tensors):
    rows = []
    for value in values:
        found = torch.autograd.grad(value, tensors, retain_graph=True, allow_unused=True)
        found = [torch.zeros_like(t) if g is None else g for g, t in zip(found, tensors, strict=True)]
        rows.append(torch.cat([gradient.flatten() for gradient in found]).double())
    norms = torch.stack([row.norm() for row in rows])
    cosines = F.cosine_similarity(torch.stack(rows)[:, None], torch.stack(rows)[None], dim=-1)
    return norms, cosines * SIGNS[:, None] * SIGNS


def assert_equals(conflicts, norms, cosines):
    torch.testing.assert_close(torch.tensor(list(conflicts.norms.values())).double(), norms)
    torch.testing.assert_close(conflicts.cosines, cosines)


def test_norms_and_cosines_at_the_outputs_are_those_by_hand_and_a_negative_weight_turns_its_gradient():
    model, (x, target) = Model(), data()
    conflicts = criterion().conflicts(model(x), target)
    output = {name: leaf.detach().requires_grad_() for name, leaf in model(x).items()}
    norms, cosines = by_hand(losses(output, target), list(output.values()))
    assert_equals(conflicts, norms, cosines)
    assert conflicts.names == ("a", "b:l1", "b:mse")
    assert conflicts.weights == {"a": 1.0, "b:l1": 3.0, "b:mse": -2.0}
    assert list(conflicts.weighted_norms.values()) == pytest.approx((norms * torch.tensor([1.0, 3.0, 2.0])).tolist())
    assert conflicts.cosine("b:l1", "b:mse") == pytest.approx(cosines[1, 2].item())
    assert conflicts.cosine("a", "b:l1") == 0.0
    assert [pair[:2] for pair in conflicts.opposing] == [("b:l1", "b:mse")]  # two losses of one sign, one turned round
    assert conflicts.shared == {"b": ("b:l1", "b:mse")}


@pytest.mark.parametrize(
    "wrt",
    [
        lambda model, output: model.backbone.parameters(),
        lambda model, output: [model.backbone.weight, model.backbone.bias, model.backbone.bias],
        lambda model, output: model.parameters(),
        lambda model, output: output["feature"],
        lambda model, output: "feature",
        lambda model, output: [output["feature"], model.head.weight],
    ],
    ids=["parameters", "one twice", "all parameters", "feature", "path", "both"],
)
def test_norms_and_cosines_behind_the_output_are_those_by_hand(wrt):
    model, (x, target) = Model(), data()
    output = model(x)
    conflicts = criterion().conflicts(output, target, wrt=wrt(model, output))
    tensors = wrt(model, output)
    tensors = output["feature"] if tensors == "feature" else tensors
    tensors = [tensors] if isinstance(tensors, torch.Tensor) else list(dict.fromkeys(tensors))
    assert_equals(conflicts, *by_hand(losses(output, target), tensors))
    assert conflicts.shared == {"b": ("b:l1", "b:mse")}  # the feature is read by no term, though each depends on it


def test_conflicts_changes_nothing_and_leaves_the_graph():
    class Counting(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, input, target):
            self.calls += 1
            return F.dropout(input - target).square().mean()

    model, (x, target) = Model(), data()
    class_weights = torch.rand(2)
    module = PathLossModule(
        {"a": Counting(), "b": Term(nn.CrossEntropyLoss(class_weights), target=Target("c"))},
    )
    target["c"] = torch.tensor([0, 1, 1, 0, 1])
    output = model(x)
    torch.manual_seed(3)
    loss = module(output, target)
    before = module.last.log()
    for wrt in (None, model.parameters()):
        torch.manual_seed(3)
        expected = torch.rand(2)
        torch.manual_seed(3)
        module.conflicts(output, target, wrt=wrt)
        assert torch.equal(torch.rand(2), expected)
    assert module.get_submodule("/a").calls == 1
    assert module.last.log() == before
    assert all(parameter.grad is None for parameter in model.parameters())
    module.conflicts(output, {**target, "a": torch.zeros(5, 2)}, wrt=model.parameters())
    with torch.no_grad():
        assert module.conflicts(output, target, wrt=model.parameters()).norms["b"] > 0
    loss.backward()  # the graph is there, and what it saved was not written to
    assert model.backbone.weight.grad is not None


def test_absent_terms_zero_gradients_and_gradients_that_are_not_finite_are_told_apart():
    def nothing(input, target):
        return (input - target).relu().sum()

    def root(input, target):
        return (input - target).sqrt().sum()

    module = PathLossModule(
        {"a": nn.MSELoss(), "gone": nn.MSELoss(), "none.*": nn.MSELoss(), "flat": nothing, "nan": root}
    )
    output = {"a": torch.ones(2), "gone": torch.ones(2), "none": [], "flat": torch.zeros(2), "nan": torch.zeros(2)}
    target = {"a": torch.zeros(2), "gone": None, "none": [], "flat": torch.ones(2), "nan": torch.ones(2)}
    conflicts = module.conflicts(output, target)
    assert conflicts.absent == ("gone", "none.*")
    assert conflicts.zero == ("flat",)
    # The mean of x^2 over two ones has the gradient (1, 1).
    assert conflicts.norms == pytest.approx(
        {"a": math.sqrt(2), "gone": math.nan, "none.*": math.nan, "flat": 0.0, "nan": math.nan}, nan_ok=True
    )
    expected = torch.full((5, 5), torch.nan, dtype=torch.float64)
    expected[0, 0] = 1.0
    torch.testing.assert_close(conflicts.cosines, expected, equal_nan=True)
    assert conflicts.opposing == ()
    assert str(conflicts) == (
        "gradients at the outputs\n"
        "   term    weight  norm   weighted  1     2  3  4  5\n"
        "1  a       1       1.414  1.414     1.00\n"
        "2  gone    1                                          absent\n"
        "3  none.*  1                                          absent\n"
        "4  flat    1       0      0                           zero gradient\n"
        "5  nan     1       nan    nan                         gradient not finite"
    )


def test_an_empty_selection_and_an_inactive_phase_are_absent():
    module = PathLossModule(
        {"a": Term(nn.MSELoss(reduction="none"), where=Target("has_a"), reduction="mean"), "b": nn.MSELoss()},
        weights={"b": alternate(1, 1, phase=1)},
    )
    tree = {"a": torch.ones(2), "b": torch.ones(2)}
    target = {"a": torch.zeros(2), "b": torch.zeros(2), "has_a": torch.tensor([False, False])}
    assert module.conflicts(tree, target).absent == ("a", "b")
    module.step()
    assert module.conflicts(tree, target).absent == ("a",)
    target["has_a"] = torch.tensor([False, True])
    conflicts = module.conflicts(tree, target)
    assert conflicts.absent == ()
    # The mean of x^2 over one element has the gradient 2x, over two x.
    assert conflicts.norms == pytest.approx({"a": 2.0, "b": math.sqrt(2)})


def test_where_every_term_is_absent_that_is_what_it_says():
    model, (x, _) = Model(), data()
    output, target = model(x), {"a": None, "b": None}
    for wrt in (None, model.parameters()):
        assert criterion().conflicts(output, target, wrt=wrt).absent == ("a", "b:l1", "b:mse")
    none_at_all = criterion().conflicts({"a": None, "b": None}, target, wrt=model.parameters())
    assert none_at_all.absent == ("a", "b:l1", "b:mse")
    assert none_at_all.cosines.isnan().all()


def test_one_process_of_several_may_look_by_itself(monkeypatch):
    def never(tensor):
        raise AssertionError("waits for the other processes")

    monkeypatch.setattr("torch_pathloss._ranks.sum_over_ranks", never)
    monkeypatch.setattr("torch_pathloss._ranks.world_size", lambda: 2)
    module = PathLossModule({"a": Term(nn.L1Loss(reduction="sum"), normalizer=Target("count"))})
    target = {"a": torch.zeros(4), "count": torch.tensor(2.0)}
    x = torch.ones(4, requires_grad=True)
    # A sum of four over two: gradients of 1/2 each.
    assert module.conflicts({"a": x}, target).norms == {"a": 1.0}
    assert module.conflicts({"a": x * 1}, target, wrt=x).norms == {"a": 1.0}
    with pytest.raises(AssertionError, match="waits"):
        module({"a": x}, target)


def test_the_weights_of_a_weighting_are_those_of_the_latest_call():
    module = PathLossModule(
        {"a": nn.MSELoss(), "b": nn.MSELoss()}, weights={"b": 3.0}, weighting=WeightedSum(weighted_mean=True)
    )
    tree, target = {n: torch.ones(2) for n in "ab"}, {n: torch.zeros(2) for n in "ab"}
    assert all(math.isnan(weight) for weight in module.conflicts(tree, target).weights.values())
    module(tree, target)
    assert module.conflicts(tree, target).weights == {"a": 0.25, "b": 0.75}


def test_very_small_and_very_large_gradients_keep_their_norms_and_cosines():
    def scaled(factor):
        return lambda input, target: factor * (input * target).sum()

    module = PathLossModule({"x:small": scaled(1e-30), "x:large": Term(scaled(-1e30), target=Target("y"))})
    target = {"x": torch.tensor([3.0, 4.0]), "y": torch.tensor([4.0, 3.0])}
    conflicts = module.conflicts({"x": torch.ones(2)}, target)  # gradients (3, 4) and (-4, -3), scaled
    assert conflicts.norms == pytest.approx({"x:small": 5e-30, "x:large": 5e30})
    assert conflicts.cosine("x:small", "x:large") == pytest.approx(-24 / 25)
    assert conflicts.zero == ()


def test_one_tensor_at_two_places_is_one_tensor():
    twice = torch.tensor([1.0, 2.0])
    module = PathLossModule({"x": nn.MSELoss(), "y": nn.MSELoss(), "": lambda o, t: (o["x"] + o["y"]).sum()})
    target = {"x": torch.tensor([0.0, 1.0]), "y": torch.tensor([2.0, 3.0])}
    conflicts = module.conflicts({"x": twice, "y": twice}, target)  # gradients (1, 1), (-1, -1) and (2, 2)
    expected = torch.tensor([[1.0, -1.0, 1.0], [-1.0, 1.0, -1.0], [1.0, -1.0, 1.0]], dtype=torch.float64)
    torch.testing.assert_close(conflicts.cosines, expected)
    assert conflicts.norms == pytest.approx({"x": 2**0.5, "y": 2**0.5, "": 8**0.5})
    assert conflicts.shared == {"x": ("x", "y", ""), "y": ("x", "y", "")}


def test_a_subtree_criterion_counts_only_the_leaves_that_it_depends_on():
    module = PathLossModule({"d": lambda o, t: o["box"].sum(), "d.box": nn.MSELoss(), "d.score": nn.MSELoss()})
    tree = {"d": {"box": torch.ones(2), "score": torch.ones(2)}}
    conflicts = module.conflicts(tree, {"d": {"box": torch.zeros(2), "score": torch.zeros(2)}})
    assert conflicts.shared == {"d.box": ("d", "d.box")}


def test_the_threshold_says_which_terms_oppose_each_other_and_the_lowest_cosine_comes_first():
    def along(x, y):
        return lambda o, t: (o * torch.tensor([x, y])).sum()

    module = PathLossModule({"x:a": along(1.0, 0.0), "x:b": along(0.6, 0.8), "x:c": along(-0.8, 0.6)})
    tree = {"x": torch.zeros(2)}
    found = {t: module.conflicts(tree, tree, threshold=t).opposing for t in (-0.9, 0.0, 0.7)}
    assert found[-0.9] == ()
    assert [pair[:2] for pair in found[0.0]] == [("x:a", "x:c")]
    assert found[0.7] == (  # 1 * -0.8, 0.6 * -0.8 + 0.8 * 0.6 and 1 * 0.6
        ("x:a", "x:c", pytest.approx(-0.8)),
        ("x:b", "x:c", pytest.approx(0.0, abs=1e-7)),
        ("x:a", "x:b", pytest.approx(0.6)),
    )
    with pytest.raises(ArgumentError) as caught:
        module.conflicts(tree, tree, threshold=2.0)
    assert str(caught.value) == "threshold must be a cosine, from -1 to 1, not 2.0."


@pytest.mark.parametrize("case", CASES, ids=str)
def test_conflicts_serves_every_criterion(case):
    module, output, target, keywords = case.make(torch.float64)
    conflicts = module.conflicts(output, target, **keywords)
    gradients = module.output_gradients(output, target, **keywords)
    for name, tree in gradients.items():
        leaves = [leaf for leaf in torch.utils._pytree.tree_leaves(tree) if leaf is not None]
        if name not in conflicts.absent and case.name != "views and other leaves":
            expected = math.sqrt(sum(leaf.square().sum().item() for leaf in leaves))
            assert conflicts.norms[name] == pytest.approx(expected)


def test_sparse_low_precision_and_complex_gradients_are_compared():
    embedding = nn.Embedding(4, 3, sparse=True)
    output = {"x": embedding(torch.tensor([1, 1, 2])).sum(0), "z": torch.ones(2, dtype=torch.complex64)}
    output["h"] = output["x"].bfloat16()
    losses = {"x": nn.MSELoss(), "h": nn.MSELoss(), "z": lambda o, t: o.abs().sum()}
    target = {"x": torch.zeros(3), "h": torch.zeros(3, dtype=torch.bfloat16), "z": torch.zeros(())}
    module = PathLossModule(losses)
    conflicts = module.conflicts(output, target, wrt=embedding.parameters())
    assert conflicts.cosine("x", "h") == pytest.approx(1.0, abs=1e-4)
    assert conflicts.zero == ("z",)
    # The gradient of |z| at 1 is 1, for both elements.
    assert module.conflicts(output, target).norms["z"] == pytest.approx(math.sqrt(2))


def test_wrt_that_no_term_depends_on_or_that_holds_something_else_raises():
    model, (x, target) = Model(), data()
    output, module = model(x), criterion()
    cases = {
        "No term depends on a tensor of wrt. Pass a tensor that the output was computed from, not a copy, with "
        "gradients enabled; of a model that is compiled as a whole, only parameters and inputs.": model(x)["feature"],
        "wrt must be a tensor, an iterable of tensors or a path of the output, but holds a Linear. For the parameters "
        "of a module pass module.parameters().": model.backbone,
        "wrt must be a tensor, an iterable of tensors or a path of the output, but holds a tuple of length 2. For the "
        "parameters of a module pass module.parameters().": model.named_parameters(),
        "No tensor of wrt requires grad, so there is no gradient to take by it.": x,
    }
    for message, wrt in cases.items():
        with pytest.raises(ArgumentError) as caught:
            module.conflicts(output, target, wrt=wrt)
        assert str(caught.value) == message
    with pytest.raises(PathNotFoundError, match=r"the output has no 'featur'\."):
        module.conflicts(output, target, wrt="featur")
    with torch.no_grad(), pytest.raises(ArgumentError, match="No term depends"):
        module.conflicts(model(x), target, wrt=model.parameters())


def test_frozen_parameters_are_left_out():
    model, (x, target) = Model(), data()
    model.backbone.bias.requires_grad_(False)
    output = model(x)
    conflicts = criterion().conflicts(output, target, wrt=model.backbone.parameters())
    assert_equals(conflicts, *by_hand(losses(output, target), [model.backbone.weight]))
    assert conflicts.at == "a tensor"


def test_errors_name_the_term_as_in_a_call():
    with pytest.raises(PathNotFoundError, match=r"^Term 'b:l1': the output has no 'b'\."):
        criterion().conflicts({"a": torch.ones(1)}, {"a": torch.ones(1)})


def opposed():
    module = PathLossModule({"x:a": nn.MSELoss(), "x:b": Term(nn.MSELoss(), target=Target("y"))}, weights={"x:b": 0.5})
    return module.conflicts({"x": torch.ones(2)}, {"x": torch.zeros(2), "y": torch.full((2,), 3.0)})


TABLE = (
    "gradients at the outputs\n"
    "   term  weight  norm   weighted  1      2\n"
    "1  x:a   1       1.414  1.414     1.00   -1.00\n"
    "2  x:b   0.5     2.828  1.414     -1.00  1.00\n"
    "opposed: x:a and x:b, cosine -1.00\n"
    "counted twice: the output leaf 'x', by x:a, x:b"
)


def test_it_prints_as_a_table_and_rich_prints_the_same_in_colours():
    conflicts = opposed()  # the mean of (1 - 0)^2 has the gradient (1, 1), that of (1 - 3)^2 (-2, -2)
    assert str(conflicts) == repr(conflicts) == TABLE
    stream = io.StringIO()
    Console(file=stream, width=100).print(conflicts)
    printed = [line.split() for line in stream.getvalue().splitlines()]
    assert printed == [line.split() for line in TABLE.splitlines()]
    stream = io.StringIO()
    Console(file=stream, width=100, force_terminal=True, color_system="standard").print(conflicts)
    assert "\x1b[31m-1.00" in stream.getvalue()  # red


def test_it_is_frozen():
    with pytest.raises(AttributeError):
        opposed().names = ()


def test_the_matrix_of_many_terms_is_not_printed():
    module = PathLossModule({f"x:{number}": nn.MSELoss() for number in range(17)})
    conflicts = module.conflicts({"x": torch.ones(1)}, {"x": torch.zeros(1)})
    assert str(conflicts).splitlines()[1] == "    term  weight  norm  weighted"
    assert str(conflicts).splitlines()[2] == "1   x:0   1       2     2"
    assert not conflicts.plot().axes[0].texts


def test_the_heat_map_shows_the_cosines_with_names_and_norms():
    conflicts = opposed()
    figure = conflicts.plot()
    axis = figure.axes[0]
    assert axis.images[0].get_array().tolist() == [[1.0, -1.0], [-1.0, 1.0]]
    assert axis.images[0].get_clim() == (-1, 1)
    assert [label.get_text() for label in axis.get_xticklabels()] == ["x:a", "x:b"]
    assert [label.get_text() for label in axis.get_yticklabels()] == ["x:a  (norm 1.4)", "x:b  (norm 2.8)"]
    assert [text.get_text() for text in axis.texts] == ["1.00", "-1.00", "-1.00", "1.00"]
    figure.savefig(io.BytesIO())
    from matplotlib.figure import Figure

    given = Figure().subplots(1, 2)
    assert conflicts.plot(ax=given[1]) is given[1].figure
    assert given[1].images
    assert not given[0].images


def test_without_matplotlib_the_table_is_there_and_plot_says_how_to_install_it():
    code = (
        "import sys, torch; sys.modules['matplotlib'] = None\n"
        "from torch import nn\n"
        "from torch_pathloss import MissingPackageError, PathLossModule\n"
        "conflicts = PathLossModule({'x': nn.MSELoss()}).conflicts({'x': torch.ones(1)}, {'x': torch.zeros(1)})\n"
        "print(len(str(conflicts)) > 0)\n"
        "try:\n"
        "    conflicts.plot()\n"
        "except MissingPackageError as error:\n"
        "    print(isinstance(error, ImportError), error)\n"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout == (
        "True\nTrue Conflicts.plot needs matplotlib, which is not installed. Run: pip install 'torch-pathloss[plot]'\n"
    )


def test_conflicts_is_what_is_exported():
    assert type(opposed()) is Conflicts


@pytest.mark.slow
def test_conflicts_through_a_compiled_model_are_those_of_the_model():
    model, (x, target) = Model(), data()
    module = criterion()
    module.compile(backend="aot_eager")
    expected = module.conflicts(model(x), target, wrt=model.backbone.parameters())
    with torch._functorch.config.patch(donated_buffer=False):
        compiled = torch.compile(model, backend="aot_eager")
        module(compiled(x), target).backward()
        found = module.conflicts(compiled(x), target, wrt=model.backbone.parameters())
    torch.testing.assert_close(found.cosines, expected.cosines)
    assert found.norms == pytest.approx(expected.norms)
