"""What other containers get silently wrong: each is right here, or raises with a whole sentence."""

import functools
import re

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from torch_pathloss import (
    ArgumentError,
    ConstructionError,
    CriterionReturnError,
    Output,
    PathLossModule,
    PathNotFoundError,
    Shared,
    Target,
    Term,
    UnknownTermError,
)


def message(error, function, *args, **kwargs):
    with pytest.raises(error) as caught:
        function(*args, **kwargs)
    return str(caught.value)


def randn(*shape):
    return torch.randn(*shape, requires_grad=True)


def test_a_misspelt_weight_raises_when_it_is_given_and_when_it_is_set():
    losses = {"detection.bbox": nn.L1Loss(), "label": nn.CrossEntropyLoss()}
    rest = "no term 'detection.box'. The terms are 'detection.bbox', 'label'. Did you mean 'detection.bbox'?"
    assert message(ConstructionError, PathLossModule, losses, weights={"detection.box": 2.0}) == (
        f"PathLossModule cannot be built: A weight is given for 'detection.box'. There is {rest}"
    )
    criterion = PathLossModule(losses)
    assert message(UnknownTermError, criterion.weights.__setitem__, "detection.box", 2.0) == f"There is {rest}"
    assert message(UnknownTermError, criterion.weights.__getitem__, "detection.box") == f"There is {rest}"


def test_a_misspelt_path_raises_at_the_first_call():
    criterion = PathLossModule({"detection.boxes": nn.L1Loss()})
    tree = {"detection": {"bbox": torch.zeros(2, 4), "confidence": torch.zeros(2)}}
    assert message(PathNotFoundError, criterion, tree, tree) == (
        "Term 'detection.boxes': the output has no 'detection.boxes'. The walk stopped at 'detection', "
        "a dict with the keys 'bbox', 'confidence'. Did you mean 'detection.bbox'?"
    )


def test_a_path_that_only_the_target_lacks_names_the_target():
    criterion = PathLossModule({"a.b": nn.L1Loss()})
    assert message(PathNotFoundError, criterion, {"a": {"b": torch.zeros(1)}}, {"b": torch.zeros(1)}) == (
        "Term 'a.b': the target has no 'a.b'. The walk stopped at the root, a dict with the keys 'b'. Did you mean 'b'?"
    )


def test_a_misspelt_entry_behind_a_wildcard_raises():
    criterion = PathLossModule({"aux.*.logit": nn.L1Loss()})
    tree = {"aux": [{"logits": torch.zeros(1)}]}
    assert message(PathNotFoundError, criterion, tree, tree) == (
        "Term 'aux.*.logit': the output has no 'aux.0.logit'. The walk stopped at 'aux.0', "
        "a dict with the keys 'logits'. Did you mean 'aux.0.logits'?"
    )


@pytest.mark.parametrize("spelling", ['["a"].b', "['a']['b']", ("a", "b")], ids=["brackets", "single quotes", "tuple"])
def test_the_same_path_in_two_spellings_raises(spelling):
    assert message(ConstructionError, PathLossModule, {"a.b": nn.L1Loss(), spelling: nn.L1Loss()}) == (
        "PathLossModule cannot be built: Term 'a.b' is given twice. "
        "Give several criteria on one node labels, as in 'mask:dice' and 'mask:bce'."
    )


def test_the_same_path_dotted_and_nested_raises():
    with pytest.raises(ConstructionError, match=r"Term 'a\.b' is given twice\."):
        PathLossModule({"a.b": nn.L1Loss(), "a": {"b": nn.L1Loss()}})


def test_a_number_and_the_same_index_are_one_path():
    assert message(ConstructionError, PathLossModule, {"a.0": nn.L1Loss(), ("a", 0): nn.L1Loss()}) == (
        "PathLossModule cannot be built: Term 'a[0]' is given twice, also as 'a.0'. "
        "Give several criteria on one node labels, as in 'mask:dice' and 'mask:bce'."
    )


def test_a_prefix_of_a_key_is_not_the_key():
    criterion = PathLossModule({"a": nn.L1Loss()})
    with pytest.raises(PathNotFoundError, match=r"the output has no 'a'\."):
        criterion({"ab": torch.zeros(1)}, {"a": torch.zeros(1)})


def test_keys_in_another_order_are_paired_by_name():
    criterion = PathLossModule({"a": nn.L1Loss(), "b": nn.MSELoss()})
    a, b, y, z = randn(3), randn(3), torch.randn(3), torch.randn(3)
    for output in ({"a": a, "b": b}, {"b": b, "a": a}):
        for target in ({"a": y, "b": z}, {"b": z, "a": y}):
            torch.testing.assert_close(criterion(output, target), F.l1_loss(a, y) + F.mse_loss(b, z))


def test_one_target_is_not_dealt_out_to_as_many_outputs_as_it_has_rows():
    criterion = PathLossModule([nn.MSELoss(), nn.MSELoss()])
    assert message(PathNotFoundError, criterion, [torch.zeros(2), torch.zeros(2)], torch.zeros(2, 2)) == (
        "Term '0': the target has no '0'. The walk stopped at the root, a Tensor of shape (2, 2). "
        "A path never goes into a tensor."
    )


@pytest.mark.parametrize(
    ("result", "sentence"),
    [
        (
            torch.zeros(3),
            "its criterion returned a tensor of shape (3,), not a scalar. "
            'Reduce it in the criterion, or wrap it as Term(criterion, reduction="mean").',
        ),
        (
            torch.zeros(1),
            "its criterion returned a tensor of shape (1,), not a scalar. "
            'Reduce it in the criterion, or wrap it as Term(criterion, reduction="mean").',
        ),
        ((torch.zeros(()),), "its criterion returned a tuple of length 1. It must return a tensor."),
        ({"loss": 1}, "its criterion returned a dict with the keys 'loss'. It must return a tensor."),
        (None, "its criterion returned None. It must return a tensor."),
        (0.5, "its criterion returned a float. It must return a tensor."),
        (torch.tensor(3), "its criterion returned a tensor of torch.int64, not of a floating-point type."),
    ],
    ids=["vector", "one element", "tuple", "dict", "None", "float", "integer"],
)
def test_a_criterion_that_returns_no_scalar_raises_and_names_the_term(result, sentence):
    criterion = PathLossModule({"ok": nn.L1Loss(), "bad": lambda output, target: result})
    tree = {"ok": torch.zeros(1), "bad": torch.zeros(1)}
    assert message(CriterionReturnError, criterion, tree, tree) == f"Term 'bad': {sentence}"


def test_a_weight_of_zero_does_not_hide_nan_but_an_absent_term_adds_nothing():
    criterion = PathLossModule({"good": nn.MSELoss(), "bad": nn.MSELoss()}, weights={"bad": 0.0})
    x, nan = randn(2), torch.full((2,), torch.nan, requires_grad=True)
    output = {"good": x, "bad": nan}
    assert criterion(output, {"good": torch.zeros(2), "bad": torch.zeros(2)}).isnan()
    loss = criterion(output, {"good": torch.zeros(2), "bad": None})
    torch.testing.assert_close(loss, (x**2).mean())
    loss.backward()
    assert nan.grad.tolist() == [0, 0]


def test_integer_class_targets_are_not_cast():
    seen = []

    def criterion(output, target):
        seen.append((output.dtype, target.dtype))
        return F.cross_entropy(output, target)

    PathLossModule({"x": criterion})({"x": randn(2, 3)}, {"x": torch.tensor([0, 2])})
    PathLossModule({"x": criterion})({"x": randn(2, 3).double()}, {"x": torch.tensor([0, 2])})
    assert seen == [(torch.float32, torch.int64), (torch.float64, torch.int64)]


@pytest.mark.parametrize(
    "criterion",
    [
        nn.MSELoss(),
        nn.L1Loss(),
        nn.SmoothL1Loss(),
        nn.HuberLoss(),
        nn.BCEWithLogitsLoss(),
        nn.GaussianNLLLoss(),
        nn.HingeEmbeddingLoss(),
        nn.KLDivLoss(),
        nn.PoissonNLLLoss(),
        nn.SoftMarginLoss(),
        F.mse_loss,
        F.l1_loss,
        functools.partial(F.hinge_embedding_loss, margin=2.0),
        functools.partial(nn.MSELoss()),
        torch.compile(nn.MSELoss(), backend="eager"),
        Term(nn.MSELoss(reduction="none"), reduction="mean"),
    ],
    ids=lambda criterion: re.sub(" at 0x[0-9a-f]+", "", repr(criterion)),
)
def test_a_column_against_a_row_raises_under_an_elementwise_criterion(criterion):
    variance = {"var": torch.ones(4)} if isinstance(criterion, nn.GaussianNLLLoss) else {}
    module = PathLossModule({"x": Term(criterion, **variance) if variance else criterion})
    assert message(ArgumentError, module, {"x": torch.rand(4)}, {"x": torch.rand(4, 1)}) == (
        "Term 'x': its criterion compares element by element, but its first argument has shape (4,) and its second "
        "(4, 1). Torch would broadcast them. Give both the same shape."
    )


def test_a_forgotten_target_is_not_an_absent_term():
    criterion = PathLossModule({"x": nn.MSELoss()})
    assert message(PathNotFoundError, criterion, {"x": torch.zeros(1)}) == (
        "Term 'x': it reads 'x' of the target, but the target of the call is None. Pass it to the call."
    )
    assert message(PathNotFoundError, criterion, None, {"x": torch.zeros(1)}) == (
        "Term 'x': it reads 'x' of the output, but the output of the call is None. Pass it to the call."
    )


@pytest.mark.parametrize("result", [torch.tensor([True, False]), torch.tensor([1, 2])], ids=["bool", "int"])
def test_a_result_without_gradient_is_not_reduced(result):
    criterion = PathLossModule({"x": Term(lambda output, target: result, reduction="mean")})
    tree = {"x": torch.zeros(2)}
    assert message(CriterionReturnError, criterion, tree, tree) == (
        f"Term 'x': its criterion returned a tensor of {result.dtype}, not of a floating-point type."
    )


def test_a_module_that_cannot_be_called_raises():
    losses = {"x": nn.ParameterDict(), "y": functools.partial(nn.Module())}
    assert message(ConstructionError, PathLossModule, losses) == (
        "PathLossModule cannot be built:"
        "\n  1. Term 'x': a ParameterDict has no forward, so that it cannot be called."
        "\n  2. Term 'y': a Module has no forward, so that it cannot be called."
    )


def test_a_class_instead_of_a_criterion_raises():
    assert message(ConstructionError, PathLossModule, {"x": nn.MSELoss}) == (
        "PathLossModule cannot be built: Term 'x': MSELoss is a class. Did you mean MSELoss()?"
    )


def test_a_weight_given_twice_raises():
    losses = {"x": Term(nn.MSELoss(), weight=2.0)}
    assert message(ConstructionError, PathLossModule, losses, weights={"x": 3.0}) == (
        "PathLossModule cannot be built: The weight of 'x' is given both in its Term and in weights=. Give it once."
    )


@pytest.mark.parametrize("weight", [float("nan"), float("inf"), "1", True, torch.ones(2)], ids=repr)
def test_a_weight_that_is_no_finite_number_raises(weight):
    with pytest.raises(ConstructionError, match="a weight must be"):
        PathLossModule({"x": nn.MSELoss()}, weights={"x": weight})
    criterion = PathLossModule({"x": nn.MSELoss()})
    with pytest.raises(ArgumentError, match=r"^The weight of 'x' cannot be set: a weight must be"):
        criterion.weights["x"] = weight


@pytest.mark.parametrize(
    ("weight", "sentence"),
    [
        (1e39, "a weight is stored in float32, where 1e+39 is infinite."),
        (torch.tensor(float("nan")), "a weight must be finite, not nan."),
        (torch.tensor(1e39, dtype=torch.float64), "a weight is stored in float32, where 1e+39 is infinite."),
    ],
    ids=["float", "NaN in a tensor", "float64 tensor"],
)
def test_a_weight_that_is_not_finite_in_float32_raises(weight, sentence):
    text = f"PathLossModule cannot be built: The weight of 'x': {sentence}"
    assert message(ConstructionError, PathLossModule, {"x": nn.MSELoss()}, weights={"x": weight}) == text


def test_a_weight_that_requires_grad_raises_since_it_would_not_be_trained():
    with pytest.raises(ConstructionError, match="would not be trained"):
        PathLossModule({"x": nn.MSELoss()}, weights={"x": nn.Parameter(torch.tensor(1.0))})


def test_every_problem_of_the_construction_is_told_at_once():
    losses = {"a..b": nn.MSELoss(), "c": 3, "d": nn.MSELoss, "e": nn.MSELoss(), ("e",): nn.L1Loss()}
    assert message(ConstructionError, PathLossModule, losses, weights={"f": 1.0, "e": "x"}) == (
        "PathLossModule cannot be built:"
        "\n  1. Cannot parse the path 'a..b': an entry is empty at position 2. Write an empty key as [\"\"]."
        "\n  2. Term 'c': 3 of type int is not callable."
        "\n  3. Term 'd': MSELoss is a class. Did you mean MSELoss()?"
        "\n  4. Term 'e' is given twice. Give several criteria on one node labels, as in 'mask:dice' and 'mask:bce'."
        "\n  5. A weight is given for 'f'. There is no term 'f'. The terms are 'c', 'd', 'e'."
        "\n  6. The weight of 'e': a weight must be a float, a 0-dim tensor or a schedule, not 'x' of type str."
    )


@pytest.mark.parametrize("losses", [{}, [], {"a": None}, {"a": {}}], ids=repr)
def test_no_term_at_all_raises(losses):
    assert message(ConstructionError, PathLossModule, losses) == (
        "PathLossModule cannot be built: There are no terms: every criterion is None or the mapping is empty."
    )


def test_the_error_of_a_criterion_says_in_which_term_it_arose():
    criterion = PathLossModule({"ok": nn.L1Loss(), "label": nn.CrossEntropyLoss()})
    tree = {"ok": torch.zeros(1), "label": torch.zeros(2, 3)}
    with pytest.raises(IndexError) as caught:
        criterion(tree, {"ok": torch.zeros(1), "label": torch.tensor([0, 7])})
    assert caught.value.__notes__ == [
        "in term 'label' of the PathLossModule: Output('label'), Target('label')",
    ]


def test_a_criterion_on_another_device_than_the_outputs_raises():
    criterion = PathLossModule({"x": nn.MSELoss()})
    tree = {"x": torch.zeros(2, device="meta")}
    assert message(ArgumentError, criterion, tree, tree) == (
        "Term 'x': its value is on meta, but the weights are on cpu. "
        "Move the criterion to the outputs' device with criterion.to('meta')."
    )


def test_a_misspelt_target_is_noticed_while_the_output_is_absent():
    criterion = PathLossModule({"a": Term(nn.MSELoss(), target=Target("typo"))})
    assert message(PathNotFoundError, criterion, {"a": None}, {"type": torch.zeros(1)}) == (
        "Term 'a': the target has no 'typo'. The walk stopped at the root, a dict with the keys 'type'. "
        "Did you mean 'type'?"
    )


def test_a_misspelt_target_of_a_shared_computation_is_noticed_while_the_output_is_absent():
    one_hot = Shared(F.one_hot, Shared(torch.abs, Target("labl")), num_classes=3)
    criterion = PathLossModule({"a": Term(nn.MSELoss(), Output("a"), one_hot)})
    assert message(PathNotFoundError, criterion, {"a": None}, {"label": torch.tensor([0])}) == (
        "Term 'a': the target has no 'labl'. The walk stopped at the root, a dict with the keys 'label'. "
        "Did you mean 'label'?"
    )


def test_a_source_inside_a_constant_is_refused():
    assert message(ConstructionError, PathLossModule, {"a": Term(lambda a, b: a, Output("a"), [Output("b")])}) == (
        "PathLossModule cannot be built: [Output('b')] is a constant, and the source in it would not be read. "
        "Give sources one by one, or make the container with Shared(function, *sources)."
    )


@pytest.mark.parametrize(
    "constant",
    [[nn.Linear(2, 2)], {"scale": nn.Parameter(torch.ones(2))}, ((nn.Parameter(torch.ones(2)),),)],
    ids=["module in a list", "parameter in a dict", "parameter in a tuple in a tuple"],
)
def test_a_parameter_inside_a_constant_is_refused_since_it_would_not_be_trained(constant):
    term = Term(lambda x, constant: x.sum(), Output("a"), constant)
    assert message(ConstructionError, PathLossModule, {"a": term}) == (
        f"PathLossModule cannot be built: {type(constant).__name__} is a constant, and the parameters in it would be "
        "neither trained nor moved. Give them one by one, or as an nn.ModuleList, nn.ModuleDict or nn.ParameterList."
    )


def test_weights_that_are_no_mapping_are_refused():
    assert message(ConstructionError, PathLossModule, {"a": nn.MSELoss()}, weights=2.0) == (
        "PathLossModule cannot be built: weights= must be a mapping from names of terms to weights, not 2.0."
    )
