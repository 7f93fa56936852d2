"""SoftAdapt: the authors' published numbers, a NumPy port of their package, and terms that come and go."""

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from torch_pathloss import ConstructionError
from torch_pathloss.weighting import SoftAdapt

# The README of dr-aheydari/SoftAdapt, examples 1 and 2, with beta = 0.1.
COMPONENTS = [[1, 2, 3, 4, 5], [150, 100, 50, 10, 0.1], [1500, 1000, 500, 100, 1], [10, 20, 30, 40, 50]]
PUBLISHED = {
    ("original", 3): [0.99343, 6.5666e-3, 3.8908e-22],
    ("normalized", 3): [0.3221, 0.3251, 0.3528],
    ("loss_weighted", 3): [0.87978, 0.12022, 7.1234e-20],
    ("original", 4): [2.8850e-01, 1.9070e-03, 1.1299e-22, 7.0959e-01],
    ("normalized", 4): [0.2436, 0.2459, 0.2673, 0.2432],
    ("loss_weighted", 4): [3.8861e-02, 5.3104e-03, 3.1465e-21, 9.5583e-01],
}
VECTORS = json.loads((Path(__file__).with_name("vectors") / "soft_adapt.json").read_text())


def weights(weighting: SoftAdapt, *values: float, absent: tuple[int, ...] = ()) -> Tensor:
    seen = torch.tensor([position not in absent for position in range(len(values))])
    return weighting(torch.where(seen, torch.tensor(values), 0), seen).weights


@pytest.mark.parametrize(("variant", "count"), PUBLISHED)
def test_the_published_numbers(variant, count):
    weighting = SoftAdapt(variant).bind("abcd"[:count])
    for values in zip(*COMPONENTS[:count], strict=True):
        found = weights(weighting, *map(float, values))
    torch.testing.assert_close(found, torch.tensor(PUBLISHED[variant, count]), rtol=2e-4, atol=0)


@pytest.mark.parametrize("case", VECTORS, ids=lambda c: f"{c['variant']}-{c['window']}-{c['accuracy_order']}")
def test_the_numbers_of_an_independent_port(case):
    weighting = SoftAdapt(
        case["variant"], beta=case["beta"], window=case["window"], accuracy_order=case["accuracy_order"]
    ).bind("abcd")
    for values in case["values"]:
        found = weights(weighting, *values)
    torch.testing.assert_close(found, torch.tensor(case["weights"]), rtol=2e-4, atol=1e-7)


def test_shares_are_equal_until_the_window_is_full_and_then_constant_until_the_next_is():
    weighting = SoftAdapt("original", beta=1.0, window=2).bind("ab")
    values = [(1.0, 3.0), (2.0, 2.0), (9.0, 9.0), (8.0, 9.5)]
    found = [weights(weighting, *pair) for pair in values]
    # slopes 1 and -1 after the second update, -1 and 0.5 after the fourth
    for step, slopes in enumerate([(0.0, 0.0), (1.0, -1.0), (1.0, -1.0), (-1.0, 0.5)]):
        torch.testing.assert_close(found[step], torch.softmax(torch.tensor(slopes), 0))


def test_every_1_slides_the_window():
    weighting = SoftAdapt("original", beta=1.0, window=2, every=1).bind("ab")
    values = [(1.0, 3.0), (2.0, 2.0), (0.0, 1.0)]
    found = [weights(weighting, *pair) for pair in values]
    torch.testing.assert_close(found[2], torch.softmax(torch.tensor([-2.0, -1.0]), 0))


def test_an_absent_term_keeps_its_window_and_the_others_share_its_part():
    weighting = SoftAdapt("original", beta=1.0, window=2, every=1).bind("abc")
    weights(weighting, 1.0, 3.0, 4.0)
    weights(weighting, 2.0, 2.5, 3.0)
    absent = weights(weighting, 2.0, 0.0, 3.0, absent=(1,))
    torch.testing.assert_close(absent[[0, 2]], torch.softmax(torch.tensor([0.0, 0.0]), 0))
    assert absent[1] == 0
    found = weights(weighting, 2.0, 2.0, 3.0)  # the slope of b is 2 - 2.5: the call without it does not count
    torch.testing.assert_close(found, torch.softmax(torch.tensor([0.0, -0.5, 0.0]), 0))


def test_a_term_that_joins_late_has_an_equal_share_until_its_window_is_full():
    weighting = SoftAdapt("original", beta=1.0, window=2, every=1).bind("abc")
    weights(weighting, 1.0, 3.0, 0.0, absent=(2,))
    weights(weighting, 2.0, 2.0, 0.0, absent=(2,))
    found = weights(weighting, 3.0, 1.0, 7.0)
    expected = [*(2 / 3 * torch.softmax(torch.tensor([1.0, -1.0]), 0)).tolist(), 1 / 3]
    torch.testing.assert_close(found, torch.tensor(expected))


def test_loss_weighted_takes_the_magnitude_of_a_mean_below_zero():
    weighting = SoftAdapt(window=2).bind("ab")
    for _ in range(2):
        found = weights(weighting, -3.0, 1.0)
    torch.testing.assert_close(found, torch.tensor([0.75, 0.25]))


def test_values_that_overflow_the_slope_leave_the_last_one():
    weighting = SoftAdapt("original", window=2, every=1).bind("ab")
    weights(weighting, 3e38, 1.0)
    assert weights(weighting, 1.0, 1.0).tolist() == [0.0, 1.0]
    weights(weighting, -3e38, 1.0)
    assert weights(weighting, 3e38, 1.0).tolist() == [0.0, 1.0]  # a slope of 6e38 is infinite in float32
    assert weights(weighting, 3e38, 1.0).tolist() == [0.5, 0.5]


def test_all_problems_are_in_one_message():
    with pytest.raises(ConstructionError) as error:
        SoftAdapt("soft", beta=float("nan"), window=3, accuracy_order=3, every=0)
    assert str(error.value) == (
        "SoftAdapt cannot be built:\n"
        "  1. variant must be one of 'original', 'normalized', 'loss_weighted', not 'soft'.\n"
        "  2. beta must be finite, not nan.\n"
        "  3. accuracy_order must be an integer from 1 to window - 1 = 2, not 3.\n"
        "  4. every must be an integer of at least 1, not 0."
    )


@pytest.mark.parametrize("window", [1, 2.5])
def test_a_window_too_short_for_a_slope_raises(window):
    with pytest.raises(ConstructionError) as error:
        SoftAdapt(window=window)
    assert str(error.value) == (
        "SoftAdapt cannot be built: "
        f"window must be an integer of at least 2, since a slope needs two values, not {window}."
    )


def test_repr_shows_what_is_not_given_too():
    assert repr(SoftAdapt("normalized", window=4)) == (
        "SoftAdapt('normalized', beta=0.1, window=4, accuracy_order=3, every=4)"
    )
