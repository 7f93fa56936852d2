"""`normalizer` and `accumulate` in one process: sums over boxes, tokens and pixels."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._dynamo.testing import CompileCounter

from torch_pathloss import (
    ArgumentError,
    CheckError,
    ConstructionError,
    Input,
    Output,
    PathLossModule,
    Shared,
    Target,
    Term,
)


@pytest.fixture(autouse=True)
def fresh_dynamo():
    yield
    torch._dynamo.reset()


def leaf(*shape):
    return torch.randn(*shape, requires_grad=True)


def l1(normalizer, **options):
    return Term(nn.L1Loss(reduction="none"), reduction="sum", normalizer=normalizer, **options)


COUNTS = {
    "a tensor": (Target("count"), 5.0),
    "a tensor of integers, one a sample": (Target("counts"), 6.0),
    "a mask": (Target("valid"), 3.0),
    "an integer": (Target("number"), 7.0),
    "a float of the input": (Input("number"), 2.5),
    "a shared computation": (Shared(lambda y: y.numel(), Target("x")), 4.0),
    "of the output": (Shared(lambda x: x.ge(-9).sum(), Output("x")), 4.0),
    "a constant": (2.0, 2.0),
}


@pytest.mark.parametrize("name", COUNTS)
def test_a_sum_is_divided_by_the_sum_of_the_normalizer(name):
    normalizer, count = COUNTS[name]
    module = PathLossModule({"x": l1(normalizer)})
    x, y = leaf(2, 2), torch.randn(2, 2)
    target = {
        "x": y,
        "count": torch.tensor(5.0),
        "counts": torch.tensor([1, 2, 3]),
        "valid": torch.tensor([[True, False], [True, True]]),
        "number": 7,
    }
    loss = module({"x": x}, target, input={"number": 2.5})
    by_hand = F.l1_loss(x, y, reduction="sum") / count
    torch.testing.assert_close(loss, by_hand)
    torch.testing.assert_close(torch.autograd.grad(loss, x), torch.autograd.grad(by_hand, x))


def test_a_criterion_that_sums_by_itself_is_divided_too():
    module = PathLossModule({"x": Term(nn.MSELoss(reduction="sum"), normalizer=Target("n"))})
    assert module({"x": torch.full((3,), 2.0)}, {"x": torch.zeros(3), "n": torch.tensor(6)}).item() == 2.0


@pytest.mark.parametrize("count", [0, 0.25, -3.0, torch.tensor(0), torch.zeros(0)], ids=str)
def test_a_count_is_at_least_1(count):
    module = PathLossModule({"x": l1(Target("n"))})
    assert module({"x": torch.ones(3)}, {"x": torch.zeros(3), "n": count}).item() == 3.0


def test_values_and_counts_beyond_the_range_of_their_type_are_right():
    x = torch.ones(3000, dtype=torch.bfloat16)
    module = PathLossModule({"x": l1(Target("valid"))})
    valid = torch.ones(3000, dtype=torch.uint8)
    assert module({"x": x}, {"x": torch.zeros_like(x), "valid": valid}).item() == 1.0


def test_the_pixels_of_a_segmentation_are_counted_and_selected():
    x, y = leaf(2, 4, 3, 3), torch.randint(4, (2, 3, 3))
    y[0, :, 1] = y[1] = -100
    valid = Shared(lambda y: y != -100, Target("x"))
    term = Term(nn.CrossEntropyLoss(reduction="none"), where=valid, reduction="sum", normalizer=valid)
    loss = PathLossModule({"x": term})({"x": x}, {"x": y})
    by_hand = F.cross_entropy(x, y)  # torch's own mean over what is not -100
    torch.testing.assert_close(loss, by_hand)
    torch.testing.assert_close(torch.autograd.grad(loss, x), torch.autograd.grad(by_hand, x))


def test_nothing_selected_and_nothing_counted_is_0_with_zero_gradient():
    x = leaf(3, 4)
    none = torch.zeros(3, dtype=torch.bool)
    module = PathLossModule({"x": l1(Target("valid"), where=Target("valid"))})
    loss = module({"x": x}, {"x": torch.full((3, 4), torch.nan), "valid": none})
    loss.backward()
    assert loss.item() == 0
    assert (x.grad == 0).all()
    assert math.isnan(module.last.log()["terms/x"])


@pytest.mark.parametrize("missing", ["x", "n"])
def test_a_term_is_absent_with_its_target_and_counts_0_without_its_normalizer(missing):
    module = PathLossModule({"x": l1(Target("n"))})
    x = leaf(3)
    target = {"x": torch.zeros(3), "n": torch.tensor(2.0), missing: None}
    loss = module({"x": x}, target)
    loss.backward()
    assert module.last.present["x"] == (missing == "n")
    torch.testing.assert_close(loss.detach(), x.detach().abs().sum() if missing == "n" else torch.tensor(0.0))
    assert x.grad is not None


def test_all_matches_of_a_pattern_have_one_count():
    module = PathLossModule({"x.*": l1(Target("n"), target=Target("y"))})
    output = {"x": [torch.ones(2), torch.full((2,), 3.0)]}
    assert module(output, {"y": torch.zeros(2), "n": torch.tensor(4)}).item() == (2 + 6) / 4


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (
            lambda: Term(nn.L1Loss(), normalizer=Target("n")),
            "Term cannot be built: normalizer divides a sum, but L1Loss() returns a mean. "
            'Build it with reduction="sum", or with reduction="none" and the Term with reduction="sum".',
        ),
        (
            lambda: Term(nn.L1Loss(reduction="none"), reduction="mean", normalizer=Target("n")),
            "Term cannot be built: normalizer divides a sum, but the reduction is 'mean'. Use reduction=\"sum\".",
        ),
        (
            lambda: Term(nn.L1Loss(reduction="none"), reduction="sum", normalizer="n"),
            "Term cannot be built: normalizer must be a source, such as Target('count'), or a number, "
            "not 'n' of type str.",
        ),
        (
            lambda: Term(nn.L1Loss(reduction="none"), reduction="sum", normalizer=True),
            "Term cannot be built: normalizer must be a source, such as Target('count'), or a number, "
            "not True of type bool.",
        ),
        (
            lambda: PathLossModule({"x.*": l1(Target("n.*"))}),
            "PathLossModule cannot be built: Term 'x.*': the normalizer Target('n.*') is a pattern. Its count serves "
            "all matches, so that every process adds up one number; make it with Shared(function, Target('...')).",
        ),
    ],
    ids=["of a mean", "of a reduction", "text", "bool", "pattern"],
)
def test_a_normalizer_that_does_not_fit_is_refused(build, message):
    with pytest.raises(ConstructionError) as error:
        build()
    assert str(error.value) == message


@pytest.mark.parametrize(
    ("count", "message"),
    [
        ([1, 2], "its normalizer is a list of length 2. It must be a tensor or a number."),
        ("2", "its normalizer is a str. It must be a tensor or a number."),
        (
            torch.ones(2, device="meta"),
            "its normalizer is on meta, but the weights are on cpu. Move it to the outputs' device.",
        ),
    ],
    ids=["list", "text", "device"],
)
def test_a_count_that_is_none_is_refused(count, message):
    module = PathLossModule({"x": l1(Target("n"))})
    with pytest.raises(ArgumentError) as error:
        module({"x": torch.ones(3)}, {"x": torch.ones(3), "n": count})
    assert str(error.value) == f"Term 'x': {message}"
    with pytest.raises(CheckError) as error:
        module.check({"x": torch.ones(3)}, {"x": torch.ones(3), "n": count})
    assert str(error.value).endswith(f"Term 'x': {message}")


def test_one_graph_serves_every_count():
    module = PathLossModule({"x": l1(Target("n")), "x:valid": l1(Target("valid"), where=Target("valid"))})
    counter = CompileCounter()
    compiled = torch.compile(module, backend=counter, fullgraph=True)
    for n in range(5):
        valid = torch.arange(4) < n
        target = {"x": torch.zeros(4), "n": torch.tensor(n), "valid": valid}
        assert compiled({"x": torch.ones(4)}, target).item() == pytest.approx(4 / max(1, n) + (n > 0))
    assert counter.frame_count == 1


def test_counts_that_are_python_numbers_need_few_graphs():
    module = PathLossModule({"x": l1(Target("n"))})
    counter = CompileCounter()
    compiled = torch.compile(module, backend=counter, fullgraph=True)
    for n in range(2, 12):
        assert compiled({"x": torch.ones(4)}, {"x": torch.zeros(4), "n": n}).item() == pytest.approx(4 / n)
    assert counter.frame_count <= 2


# accumulate


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.layer = nn.Linear(3, 4).double()

    def forward(self, x):
        return {"x": self.layer(x)}


def detections():
    """Returns ten samples with different numbers of valid boxes; what is not valid is NaN."""
    valid = torch.arange(4) < torch.tensor([4, 0, 1, 2, 0, 0, 3, 1, 1, 4])[:, None]
    y = torch.where(valid, torch.randn(10, 4, dtype=torch.float64), torch.nan)
    return torch.randn(10, 3, dtype=torch.float64), y, valid


def boxes(**sources):
    valid = Target("valid")
    return PathLossModule({"x": l1(valid, where=valid)}, weights={"x": 0.5}, **sources)


@pytest.mark.parametrize(
    "way",
    [
        *("call", "backward", "grad_in_forward"),
        *(pytest.param(f"compiled {way}", marks=pytest.mark.slow) for way in ("call", "backward")),
    ],
)
def test_four_micro_batches_of_unequal_size_are_the_whole_batch(way):
    x, y, valid = detections()
    model = Model()
    by_hand = 0.5 * (model(x)["x"] - y)[valid].abs().sum() / valid.sum()
    (expected,) = torch.autograd.grad(by_hand, model.layer.weight)
    module = boxes(grad_in_forward=way == "grad_in_forward")
    if way.startswith("compiled"):
        module.compile(backend="aot_eager")
    sizes = [4, 1, 2, 3]
    xs, targets = (
        x.split(sizes),
        [{"x": a, "valid": b} for a, b in zip(y.split(sizes), valid.split(sizes), strict=True)],
    )
    for _ in range(2):  # a second step does not add to the counts of the first
        model.zero_grad()
        total = 0.0
        with module.accumulate(targets):
            for part, target in zip(xs, targets, strict=True):
                if way.endswith("backward"):
                    total += module.backward(model(part), target, scale=1 / 4).item() / 4
                else:
                    loss = module(model(part), target) / 4
                    loss.backward()
                    total += loss.item()
        assert total == pytest.approx(by_hand.item(), rel=1e-6)
        torch.testing.assert_close(model.layer.weight.grad, expected, rtol=1e-6, atol=1e-6)
    outside = module(model(xs[0]), targets[0])
    own = 0.5 * (model(xs[0])["x"] - targets[0]["x"])[targets[0]["valid"]].abs().sum() / targets[0]["valid"].sum()
    torch.testing.assert_close(outside, own)


def test_other_terms_take_no_part_and_absent_ones_count_0():
    module = PathLossModule({"x": l1(Target("n")), "y": l1(Target("m")), "z": nn.L1Loss()})
    targets = [
        {"x": torch.zeros(2), "n": 3, "y": None, "m": torch.tensor(8), "z": torch.zeros(2)},
        {"x": torch.zeros(2), "n": torch.tensor([1, 4]), "y": torch.zeros(2), "m": 4, "z": torch.zeros(2)},
    ]
    output = {name: torch.ones(2) for name in "xyz"}
    with module.accumulate(targets):
        found = [module.terms(output, target) for target in targets]
    assert [terms["x"].item() for terms in found] == [2 / 8 * 2] * 2
    # an absent term is not divided by the count of the batch in which it is absent
    assert [terms["y"].item() for terms in found] == [0.0, 2 / 4 * 2]
    assert [terms["z"].item() for terms in found] == [1.0, 1.0]


def test_a_normalizer_of_the_input_takes_the_inputs():
    module = PathLossModule({"x": l1(Input("n"))})
    target = {"x": torch.zeros(2)}
    inputs = [{"n": torch.tensor(1)}, {"n": torch.tensor(3)}]
    with module.accumulate([target, target], inputs=inputs):
        assert [module({"x": torch.ones(2)}, target, input=i).item() for i in inputs] == [2 / 4 * 2] * 2


def test_after_an_error_inside_of_it_counts_are_those_of_a_call_again():
    module = PathLossModule({"x": l1(Target("n"))})
    target = {"x": torch.zeros(2), "n": 2}
    with pytest.raises(KeyboardInterrupt), module.accumulate([target] * 2):
        raise KeyboardInterrupt
    assert module({"x": torch.ones(2)}, target).item() == 1.0


def enter(module, *args, **keywords):
    with module.accumulate(*args, **keywords):
        pass


ONE = {"x": torch.zeros(2), "n": 2}


@pytest.mark.parametrize(
    ("term", "targets", "inputs", "message"),
    [
        (nn.L1Loss(), [ONE], None, "accumulate() sums normalizers, but no term has one. Leave it out."),
        (
            l1(Target("n")),
            [],
            None,
            "accumulate() needs the target of each micro-batch, and as many inputs, not 0 targets.",
        ),
        (
            l1(Target("n")),
            [ONE],
            [{}, {}],
            "accumulate() needs the target of each micro-batch, and as many inputs, not 1 targets and 2 inputs.",
        ),
        (
            l1(Shared(torch.numel, Output("x"))),
            [ONE],
            None,
            "Term 'x': its normalizer reads the output, which accumulate() does not have yet. "
            "Count with Target('...') or Input('...').",
        ),
        (
            l1(Target("m")),
            [ONE],
            None,
            "Term 'x': the target has no 'm'. The walk stopped at the root, a dict with the keys 'x', 'n'.",
        ),
        (
            l1(Input("n")),
            [ONE],
            None,
            "Term 'x': it reads 'n' of the input, but the input of the call is None. Pass it to the call.",
        ),
    ],
    ids=["no normalizer", "no micro-batches", "other number of inputs", "of the output", "misspelt", "no input"],
)
def test_what_cannot_be_counted_is_refused(term, targets, inputs, message):
    with pytest.raises((ArgumentError, KeyError)) as error:
        enter(PathLossModule({"x": term}), targets, inputs=inputs)
    assert str(error.value) == message


def test_a_mapping_is_not_a_list_of_micro_batches():
    with pytest.raises(ArgumentError) as error:
        enter(PathLossModule({"x": l1(Target("n"))}), ONE)
    assert str(error.value) == (
        "accumulate() needs a list with the target of each micro-batch, not a dict with the keys 'x', 'n'."
    )


def test_it_is_not_entered_twice():
    module = PathLossModule({"x": l1(Target("n"))})
    with module.accumulate([ONE] * 2):
        with pytest.raises(ArgumentError) as error:
            enter(module, [ONE])
        assert module({"x": torch.ones(2)}, ONE).item() == 2 / 4 * 2  # it goes on
    assert str(error.value) == "accumulate() is entered twice. Leave it after the micro-batches of one step."


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_counts_are_exact_after_the_criterion_was_converted(dtype):
    module = PathLossModule({"x": l1(Target("n"))}).to(dtype)
    target = {"x": torch.zeros(2), "n": torch.tensor(100_001)}  # beyond float16, and no bfloat16
    with module.accumulate([target, target]):
        loss = module({"x": torch.ones(2)}, target)
    torch.testing.assert_close(loss, torch.tensor(2 / 200_002 * 2), check_dtype=False)
