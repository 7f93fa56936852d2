"""repr, explain, check, check_optimizer and coverage."""

import io
import warnings

import pytest
import torch
import torch.nn.functional as F
from rich.console import Console
from torch import nn

from torch_pathloss import (
    CheckError,
    ConstructionError,
    Input,
    Output,
    PathLossError,
    PathLossModule,
    Shared,
    Target,
    Term,
    UncoveredError,
    UncoveredWarning,
)


def criterion():
    return PathLossModule(
        {
            "label": nn.CrossEntropyLoss(),
            "detection": lambda output, target: (output["bbox"] - target["bbox"]).abs().mean(),
            "detection.bbox": nn.SmoothL1Loss(),
            "aux.*": Term(nn.CrossEntropyLoss(), target=Target("label")),
        },
        weights={"detection.bbox": 5.0},
    )


def data():
    output = {
        "label": torch.zeros(2, 3),
        "detection": {"bbox": torch.zeros(2, 4), "score": torch.zeros(2, dtype=torch.bfloat16)},
        "aux": [torch.zeros(2, 3), torch.zeros(2, 3)],
        "features": torch.zeros(2, 8),
    }
    return output, {"label": torch.tensor([0, 2]), "detection": {"bbox": torch.ones(2, 4)}}


def test_repr_has_one_line_a_term():
    assert repr(criterion()) == (
        "PathLossModule(\n"
        "  (label):           CrossEntropyLoss()  weight 1  Output('label'), Target('label')\n"
        "  (detection):       <lambda>            weight 1  Output('detection'), Target('detection')\n"
        "  (detection.bbox):  SmoothL1Loss()      weight 5  Output('detection.bbox'), Target('detection.bbox')\n"
        "  (aux.*):           CrossEntropyLoss()  weight 1  Output('aux.*'), target=Target('label')\n"
        ")"
    )


def test_explain_shows_the_tree_with_what_reaches_it():
    lines = criterion().explain(*data()).splitlines()
    assert lines[:10] == [
        "output         shape   dtype     terms",
        "├── label      (2, 3)  float32   label",
        "├── detection",
        "│   ├── bbox   (2, 4)  float32   detection, detection.bbox  2 terms",
        "│   └── score  (2,)    bfloat16  detection",
        "├── aux",
        "│   ├── 0      (2, 3)  float32   aux.*",
        "│   └── 1      (2, 3)  float32   aux.*",
        "└── features   (2, 8)  float32                              no term",
        "",
    ]
    assert [" ".join(line.split()) for line in lines[10:]] == [
        "terms",
        "label CrossEntropyLoss() weight 1 Output('label'), Target('label') (2, 3) and (2,)",
        "detection <lambda> weight 1 Output('detection'), Target('detection') dict and dict",
        "detection.bbox SmoothL1Loss() weight 5 Output('detection.bbox'), Target('detection.bbox') (2, 4) and (2, 4)",
        "aux.* CrossEntropyLoss() weight 1 Output('aux.*'), target=Target('label') "
        "2 matches, the first: (2, 3) and (2,)",
    ]


def test_explain_tells_what_is_absent_and_what_fails_instead_of_raising():
    output, target = data()
    output["aux"], target["detection"], target["label"] = [], None, None
    del output["label"]
    text = criterion().explain(output, target)
    assert "absent: its pattern matches nothing" in text
    assert "absent: the target has None at 'detection'" in text
    assert "fails: the output has no 'label'. The walk stopped at the root" in text


def test_explain_shows_a_bare_tensor_none_and_other_leaves():
    lines = PathLossModule(nn.MSELoss()).explain(torch.zeros(2), torch.zeros(2)).splitlines()
    assert lines[1] == '(root)  (2,)   float32  ""'
    text = PathLossModule({"a": nn.MSELoss()}).explain({"a": None, "b": "text"}, {"a": None})
    assert "├── a   None          a" in text
    assert "└── b   str" in text


def test_rich_prints_an_explanation_in_colours():
    console = Console(width=120, force_terminal=True, record=True, file=io.StringIO())
    console.print(criterion().explain(*data()))
    shown = console.export_text()
    assert "│   ├── bbox" in shown
    assert "no term" in shown


def test_check_accepts_what_forward_accepts_and_changes_nothing():
    class Counting(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, input, target):
            self.calls += 1
            return F.dropout(input - target).sum()

    module = PathLossModule({"x": Counting()})
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    module.check({"x": torch.ones(2)}, {"x": torch.zeros(2)})
    assert module.get_submodule("/x").calls == 0
    assert torch.equal(torch.rand(2), expected)
    assert module.last.total.isnan()


def test_a_graph_made_before_check_can_still_run_backward():
    module = PathLossModule({"x": nn.CrossEntropyLoss(torch.tensor([1.0, 2.0]))})
    output, target = {"x": torch.zeros(1, 2, requires_grad=True)}, {"x": torch.tensor([1])}
    loss = module(output, target)
    module.check(output, target)
    loss.backward()
    assert output["x"].grad.tolist() == [[0.5, -0.5]]


def test_check_leaves_the_statistics_of_batch_norm():
    class Normed(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.BatchNorm1d(2)

        def forward(self, input, target):
            return (self.norm(input) - target).abs().mean()

    module = PathLossModule({"x": Normed()})
    module.check({"x": torch.randn(4, 2)}, {"x": torch.zeros(4, 2)})
    assert module.get_submodule("/x.norm").running_mean.tolist() == [0.0, 0.0]
    assert module.get_submodule("/x.norm").running_var.tolist() == [1.0, 1.0]


def test_check_lets_a_call_before_it_run_backward():
    module, x = PathLossModule({"a": nn.MSELoss(), "b": nn.MSELoss()}), torch.ones(2, requires_grad=True)
    output, target = {"a": x, "b": x}, {"a": torch.zeros(2), "b": torch.zeros(2)}
    loss = module(output, target)
    module.check(output, target)
    loss.backward()
    assert x.grad.tolist() == [2.0, 2.0]


def test_check_tells_every_problem_in_one_message():
    output, target = data()
    output["detection"].pop("bbox")
    target["label"] = torch.tensor([0, 3])
    module = criterion()
    with pytest.raises(CheckError) as caught:
        module.check(output, target)
    assert str(caught.value) == (
        "This output and target do not fit the criterion:"
        "\n  1. Term 'label': its criterion raised IndexError: Target 3 is out of bounds."
        "\n  2. Term 'detection': its criterion raised KeyError: 'bbox'"
        "\n  3. Term 'detection.bbox': the output has no 'detection.bbox'. The walk stopped at 'detection', "
        "a dict with the keys 'score'."
        "\n  4. Term 'aux.*': its criterion raised IndexError: Target 3 is out of bounds."
    )


def test_check_covers_sample_weights_and_coverage():
    module = PathLossModule({"x": nn.MSELoss()}, uncovered="error")
    with pytest.raises(CheckError, match=r"it has a sample weight but no reduction"):
        module.check({"x": torch.zeros(2)}, {"x": torch.zeros(2)}, sample_weight=torch.ones(2))
    with pytest.raises(CheckError, match=r"there is no term 'y'"):
        module.check({"x": torch.zeros(2)}, {"x": torch.zeros(2)}, sample_weight={"y": torch.ones(2)})
    with pytest.raises(CheckError, match=r"No term reaches the output leaf 'z'"):
        module.check({"x": torch.zeros(2), "z": torch.zeros(2)}, {"x": torch.zeros(2)})


def test_check_finds_a_misspelt_path_of_an_absent_term():
    shared = Shared(torch.sigmoid, Output("typo"))
    module = PathLossModule({"x": Term(nn.MSELoss(), shared, Target("x"))})
    output, target = {"type": torch.zeros(2)}, {"x": None}
    text = (
        "Term 'x': the output has no 'typo'. The walk stopped at the root, a dict with the keys 'type'. "
        "Did you mean 'type'?"
    )
    for call in (module, module.check):
        with pytest.raises(PathLossError) as caught:
            call(output, target)
        assert str(caught.value).endswith(text)


def test_check_optimizer_names_the_parameters_that_are_not_trained():
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.ones(()))
            self.frozen = nn.Parameter(torch.ones(()), requires_grad=False)

        def forward(self, input, target):
            return self.scale * self.frozen * (input - target).sum()

    model, module = nn.Linear(1, 1), PathLossModule({"x": Scaled()})
    with pytest.raises(CheckError) as caught:
        module.check_optimizer(torch.optim.SGD(model.parameters()))
    assert str(caught.value) == (
        "The criterion has parameters that SGD does not train: '/x.scale'. "
        "Pass [*model.parameters(), *criterion.parameters()] to the optimizer."
    )
    module.check_optimizer(torch.optim.SGD([*model.parameters(), *module.parameters()]))
    PathLossModule({"x": nn.MSELoss()}).check_optimizer(torch.optim.SGD(model.parameters()))


def test_uncovered_leaves_raise_warn_or_are_ignored():
    output = {"a": torch.zeros(1), "b": {"c": torch.zeros(1), "n": None, "text": "?"}, "d": torch.zeros(1)}
    target = {"a": torch.zeros(1)}
    text = "No term reaches the output leaves 'b.c', 'd'. Add a term, or build the module with uncovered=\"ignore\"."
    with pytest.raises(UncoveredError) as caught:
        PathLossModule({"a": nn.MSELoss()}, uncovered="error")(output, target)
    assert str(caught.value) == text
    module = PathLossModule({"a": nn.MSELoss()}, uncovered="warn")
    with warnings.catch_warnings(record=True, action="always") as warned:
        module(output, target)
        module(output, target)
        module({"a": torch.zeros(1), "d": torch.zeros(1)}, target)
    assert {w.category for w in warned} == {UncoveredWarning}
    assert [str(w.message) for w in warned] == [
        text,
        "No term reaches the output leaf 'd'. Add a term, or build the module with uncovered=\"ignore\".",
    ]
    assert warned[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        PathLossModule({"a": nn.MSELoss()})(output, target)


def test_a_leaf_is_covered_by_a_subtree_a_pattern_a_source_or_a_shared_computation():
    module = PathLossModule(
        {
            "a": lambda o, t: o["x"].sum(),
            "b.**": lambda o, t: o.sum(),
            "c": Term(torch.add, Output("d.0"), Input("d")),
            "e": Term(torch.sum, Shared(torch.sigmoid, Output("f"))),
        },
        uncovered="error",
    )
    one = torch.ones(())
    tree = {"a": {"x": one, "y": one}, "b": [one, {"z": one}], "d": (one,), "f": one}
    assert module(tree, tree, input={"d": one}).item() == pytest.approx(1 + 2 + 2 + torch.sigmoid(one).item())


def test_an_unknown_option_for_uncovered_raises():
    with pytest.raises(ConstructionError) as caught:
        PathLossModule({"a": nn.MSELoss()}, uncovered="raise")
    assert str(caught.value) == "uncovered must be one of 'ignore', 'warn', 'error', not 'raise'."


def test_the_root_term_is_shown_as_an_empty_text():
    assert repr(PathLossModule(nn.MSELoss())) == (
        "PathLossModule(\n  (\"\"):  MSELoss()  weight 1  Output(''), Target('')\n)"
    )


def test_terms_stand_in_traces_when_asked_for():
    module, (output, target) = criterion(), data()
    for annotate in (False, True):
        module.annotate = annotate
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            module(output, target)
        found = [event.key for event in profile.key_averages() if event.key.startswith("pathloss/")]
        assert sorted(found) == (sorted(f"pathloss/{name}" for name in module.weights) if annotate else [])
