"""`known` and `filled`: missing labels marked NaN, `None` or a sentinel."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._dynamo.testing import CompileCounter

from torch_pathloss import ArgumentError, ConstructionError, Input, PathLossModule, Target, Term, filled, known


@pytest.fixture(autouse=True)
def fresh_dynamo():
    yield
    torch._dynamo.reset()


def mse(where, **sources):
    return Term(nn.MSELoss(reduction="none"), where=where, reduction="mean", **sources)


def mask(source, value):
    """Returns what a source makes of a target, as the container asks for it."""
    found = []

    def where(output, target):
        found.append(source.function(target["x"], **source.keyword_sources))
        return found[0].any()

    PathLossModule({"x": Term(lambda output: output.sum(), Input("one"), where=where)})(
        None, {"x": value}, input={"one": torch.ones(1)}
    )
    return found[0].tolist()


@pytest.mark.parametrize(
    ("options", "labels", "expected"),
    [
        ({}, [1.0, math.nan, math.inf], [True, False, True]),
        ({"missing": -1}, [0, -1, 2], [True, False, True]),
        ({"missing": -1}, [0.0, -1.0, math.nan], [True, False, True]),
        ({"missing": -100}, [[0, 1], [-100, 1], [-100, -100]], [True, False, False]),
        ({"missing": -100, "per": "element"}, [[0, 1], [-100, 1]], [[True, True], [False, True]]),
        ({"per": "element"}, [[math.nan, 1.0], [0.0, math.nan]], [[False, True], [True, False]]),
        ({}, [[[1.0], [2.0]], [[math.nan], [2.0]]], [True, False]),
        ({"missing": math.inf}, [1.0, math.inf, -math.inf], [True, False, True]),
        ({}, 3.0, True),
        ({}, math.nan, False),
        ({}, torch.zeros(0, 4), []),
    ],
)
def test_what_is_not_the_mark_is_known(options, labels, expected):
    assert mask(known(Target("x"), **options), torch.as_tensor(labels)) == expected


def test_nan_labels_are_left_out():
    module = PathLossModule({"age": mse(known(Target("age")))})
    x = torch.tensor([30.0, 40.0, 50.0], requires_grad=True)
    loss = module({"age": x}, {"age": torch.tensor([33.0, math.nan, 49.0])})
    loss.backward()
    assert loss.item() == (9 + 1) / 2
    assert x.grad.tolist() == [-3.0, 0.0, 1.0]


def test_a_sentinel_class_is_left_out():
    x, y = torch.randn(4, 3, requires_grad=True), torch.tensor([0, -1, 2, -1])
    term = Term(nn.CrossEntropyLoss(reduction="none"), where=known(Target("x"), missing=-1), reduction="mean")
    loss = PathLossModule({"x": term})({"x": x}, {"x": y})
    by_hand = F.cross_entropy(x, y, ignore_index=-1)
    torch.testing.assert_close(loss, by_hand)
    torch.testing.assert_close(torch.autograd.grad(loss, x), torch.autograd.grad(by_hand, x))


def test_pixels_and_labels_of_which_some_are_missing_are_left_out_one_by_one():
    unreduced = nn.CrossEntropyLoss(reduction="none"), nn.BCEWithLogitsLoss(reduction="none")
    module = PathLossModule(
        {
            "mask": Term(unreduced[0], where=known(Target("mask"), missing=255, per="element"), reduction="mean"),
            "tags": Term(unreduced[1], where=known(Target("tags"), per="element"), reduction="mean"),
        }
    )
    mask = torch.randint(3, (2, 4, 4))
    mask[0, 1] = mask[1, :, 2] = 255
    tags = torch.tensor([[1.0, math.nan, 0.0], [math.nan, 1.0, math.nan]])
    x = {"mask": torch.randn(2, 3, 4, 4), "tags": torch.randn(2, 3)}
    found = module.terms(x, {"mask": mask, "tags": tags})
    torch.testing.assert_close(found["mask"], F.cross_entropy(x["mask"], mask, ignore_index=255))
    there = ~tags.isnan()
    torch.testing.assert_close(found["tags"], F.binary_cross_entropy_with_logits(x["tags"][there], tags[there]))


def test_labels_that_are_none_are_filled_or_make_the_term_absent():
    module = PathLossModule({"age": mse(known(Target("age")))})
    output = {"age": torch.tensor([30.0, 40.0])}
    assert module(output, {"age": filled([None, 42.0])}).item() == 4.0
    assert module(output, {"age": filled([None, None])}).item() == 0.0
    assert not module.last.present["age"]
    assert module(output, {"age": None}).item() == 0.0


def test_one_mask_serves_several_terms():
    module = PathLossModule({"x": mse(known(Target("y")), target=Target("y")), "x:again": mse(known(Target("y")))})
    assert len([name for name, _ in module.named_children() if "shared" in name]) == 1


def test_each_match_of_a_pattern_has_its_own_labels():
    module = PathLossModule({"x.*": mse(known(Target("x.*")))})
    x = {"a": torch.tensor([1.0, 2.0]), "b": torch.tensor([3.0, 4.0])}
    y = {"a": torch.tensor([math.nan, 0.0]), "b": torch.tensor([0.0, math.nan])}
    assert module({"x": x}, {"x": y}).item() == 4.0 + 9.0


def test_one_graph_serves_every_mark():
    module = PathLossModule(
        {"x": mse(known(Target("x"))), "y": mse(known(Target("y"), missing=-1, per="element"), target=Target("y"))}
    )
    counter = CompileCounter()
    compiled = torch.compile(module, backend=counter, fullgraph=True)
    for x, y in (([1.0, math.nan], [-1.0, 3.0]), ([math.nan, 2.0], [-1.0, -1.0])):
        output, target = {"x": torch.zeros(2), "y": torch.zeros(2)}, {"x": torch.tensor(x), "y": torch.tensor(y)}
        assert compiled(output, target).item() == module(output, target).item()
        assert math.isfinite(module.last.total)
    assert counter.frame_count == 1


def test_repr_says_what_is_looked_for():
    term = mse(known(Target("age"), missing=-1))
    assert repr(term) == (
        "Term(MSELoss(), reduction='mean', where=Shared(is_not, Target('age'), missing=-1, per='sample'))"
    )


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: known("age"), "known() needs a source, such as Target('age'), not 'age'."),
        (lambda: known(Target("x"), per="row"), "per must be one of 'sample', 'element', not 'row'."),
        (
            lambda: known(Target("x"), missing=None),
            "known() needs the number that marks a missing label, such as math.nan or -1, not None. Labels of which "
            "some are None are no tensor yet: fill them where batches are made, with torch_pathloss.filled(labels).",
        ),
        (
            lambda: known(Target("x"), missing=True),
            "known() needs the number that marks a missing label, such as math.nan or -1, not True. Labels of which "
            "some are None are no tensor yet: fill them where batches are made, with torch_pathloss.filled(labels).",
        ),
    ],
    ids=["text", "per", "None", "bool"],
)
def test_what_is_no_mark_is_refused(build, message):
    with pytest.raises(ConstructionError) as error:
        build()
    assert str(error.value) == message


@pytest.mark.parametrize(
    ("options", "labels", "message"),
    [
        (
            {},
            torch.tensor([1, 2]),
            "known() looks for NaN in labels of torch.int64, which cannot hold it. "
            "Say what marks a missing label, as in known(source, missing=-1).",
        ),
        *(
            (
                {"missing": missing},
                torch.ones(2, dtype=dtype),
                f"known() looks for {missing!r} in labels of {dtype}, which cannot hold it. "
                "Mark missing labels with a number of their type, or give them a type that can.",
            )
            for missing, dtype in (
                (-100, torch.uint8),
                (255, torch.int8),
                (-1, torch.bool),
                (0.5, torch.int64),
                (math.inf, torch.int32),
                (1e6, torch.float16),
            )
        ),
        (
            {},
            [torch.tensor(1.0), None],
            "known() needs labels in one tensor, not a list of length 2. "
            "Make it where batches are made, with torch_pathloss.filled(labels).",
        ),
    ],
    ids=lambda value: str(value)[:12],
)
def test_labels_that_cannot_hold_the_mark_are_refused(options, labels, message):
    module = PathLossModule({"x": mse(known(Target("x"), **options))})
    with pytest.raises(ArgumentError) as error:
        module({"x": torch.ones(2)}, {"x": labels})
    assert str(error.value) == f"Term 'x': {message}"


@pytest.mark.parametrize(
    ("labels", "options", "expected"),
    [
        ([1.0, None, 2.0], {}, torch.tensor([1.0, math.nan, 2.0])),
        ([1, None], {}, torch.tensor([1.0, math.nan])),
        ([1, None], {"missing": -1}, torch.tensor([1, -1])),
        ([True, None], {}, torch.tensor([1.0, math.nan])),
        ([None, torch.ones(2)], {}, torch.tensor([[math.nan, math.nan], [1.0, 1.0]])),
        ([torch.tensor(3), None], {"missing": -100}, torch.tensor([3, -100])),
        ([torch.tensor(3), torch.tensor(4)], {"missing": -1}, torch.tensor([3, 4])),
    ],
    ids=str,
)
def test_filled_makes_one_tensor(labels, options, expected):
    torch.testing.assert_close(filled(labels, **options), expected, equal_nan=True)


def test_nothing_but_none_is_none():
    assert filled([None, None]) is None
    assert filled([]) is None


def test_a_mark_that_the_labels_cannot_hold_is_refused():
    with pytest.raises(ArgumentError) as error:
        filled([torch.tensor(1), None])
    assert str(error.value) == (
        "filled() would mark missing labels of torch.int64 with nan, which that type cannot hold. "
        "Mark them with another number, as in filled(labels, missing=-1)."
    )
