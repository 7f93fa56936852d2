"""Sample weights: by name, path, nesting and any spelling."""

from collections import namedtuple

import pytest
import torch
from tensordict import TensorDict
from torch import nn

from torch_pathloss import ArgumentError, PathLossModule, Term

Pair = namedtuple("Pair", "left right")
W = torch.tensor([1.0, 0.0])


def term():
    return Term(nn.MSELoss(reduction="none"), reduction="mean")


def values(losses, sample_weight):
    """Returns the value of each term on ones against zeros: 1 without a sample weight, 0.5 with `W`."""
    ones, zeros = (
        {"a": {"b": x, "x.y": x, "c d": x}, "l": [x, x], "p": Pair(x, x)} for x in (torch.ones(2), torch.zeros(2))
    )
    criterion = PathLossModule(dict.fromkeys(losses, None) | {name: term() for name in losses})
    return [value.item() for value in criterion.terms(ones, zeros, sample_weight=sample_weight).values()]


@pytest.mark.parametrize(
    "sample_weight",
    [
        {"a.b": W},
        {"a": {"b": W}},
        {("a", "b"): W},
        {'["a"].b': W},
        {"a['b']": W},
        {"a": {("b",): W, "x.y": None}},
        TensorDict({"a": {"b": W}}, batch_size=2),
    ],
    ids=["text", "nested", "tuple", "brackets", "single quotes", "nested tuple", "TensorDict"],
)
def test_a_sample_weight_is_found_by_any_spelling(sample_weight):
    assert values(["a.b", "l.0"], sample_weight) == [0.5, 1.0]


@pytest.mark.parametrize(
    "sample_weight", [{"l.1": W}, {"l[1]": W}, {("l", 1): W}, {"l": {1: W}}, {"l": {"1": W}}, {"l": [None, W]}]
)
def test_the_sample_weight_of_an_index_is_found_by_any_spelling(sample_weight):
    assert values(["l.0", "l.1"], sample_weight) == [1.0, 0.5]


@pytest.mark.parametrize("sample_weight", [{"p": Pair(None, W)}, {"p.right": W}, {"p": {"right": W}}])
def test_the_sample_weight_of_a_field_is_found(sample_weight):
    assert values(["p.left", "p.right"], sample_weight) == [1.0, 0.5]


@pytest.mark.parametrize("sample_weight", [{'a["x.y"]': W}, {"a": {"x.y": W}}, {("a", "x.y"): W}])
def test_the_sample_weight_of_a_quoted_key_is_found(sample_weight):
    assert values(['a["x.y"]', "a.b"], sample_weight) == [0.5, 1.0]


@pytest.mark.parametrize("path", ["a.b", ("a", "b")])
def test_a_path_serves_the_labels_that_have_no_sample_weight_of_their_own(path):
    assert values(["a.b:x", "a.b:y", "l.0"], {path: W}) == [0.5, 0.5, 1.0]
    assert values(["a.b:x", "a.b:y", "l.0"], {path: W, "a.b:x": torch.ones(2)}) == [1.0, 0.5, 1.0]


def message(losses, sample_weight):
    with pytest.raises(ArgumentError) as caught:
        values(losses, sample_weight)
    return str(caught.value)


def test_a_sample_weight_that_belongs_to_no_term_raises():
    terms = "The terms are 'a.b', 'l.*'."
    assert message(["a.b", "l.*"], {"a.c": W}) == (
        f"A sample weight is given for 'a.c', but there is no term 'a.c'. {terms} Did you mean 'a.b'?"
    )
    assert message(["a.b", "l.*"], {"a.b": W, "a": W}) == (
        f"A sample weight is given for 'a', but there is no term 'a'. {terms}"
    )
    assert message(["a.b", "l.*"], {"l": [W, W]}) == (
        f"A sample weight is given for 'l.0', but there is no term 'l.0'. {terms} Did you mean 'l.*'?"
    )
    assert message(["a.b", "l.*"], {"a b": W}) == (
        "The sample weights cannot be read: Cannot parse the path 'a b': the entry 'a b' holds a bracket, a quote, a "
        'blank or a character that does not print at position 0. Quote it: ["a b"].'
    )


def test_a_sample_weight_given_twice_raises():
    assert message(["a.b"], {"a.b": W, ("a", "b"): W}) == "The sample weight of 'a.b' is given twice. Give it once."
    assert message(["a.b:x"], {"a.b": W, "a.b:x": W}) == "The sample weight of 'a.b:x' is given twice. Give it once."


def test_one_leaf_that_two_terms_read_does_not_hide_another_that_none_reads():
    assert values(["l.1", "l.-1"], {"l": [None, W]}) == [0.5, 0.5]
    assert message(["l.1", "l.-1"], {"l": [None, W], "typo": W}) == (
        "A sample weight is given for 'typo', but there is no term 'typo'. The terms are 'l.1', 'l.-1'."
    )
