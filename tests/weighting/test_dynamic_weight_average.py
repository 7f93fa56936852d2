"""DynamicWeightAverage against TorchJD's DWA, and by hand."""

import numpy as np
import pytest
import torch
from torchjd.scalarization import DWA

from torch_pathloss import ArgumentError, ConstructionError
from torch_pathloss.weighting import DynamicWeightAverage

ALL = torch.tensor([True, True, True])


def values_of(step):
    return torch.rand(3, generator=torch.Generator().manual_seed(step)) + 0.1


def bound(*args, **kwargs):
    return DynamicWeightAverage(*args, **kwargs).bind(["a", "b", "c"])


def softmax(rates):
    return np.exp(rates) / np.exp(rates).sum()


@pytest.mark.parametrize("temperature", [2.0, 0.3])
def test_by_epoch_it_weighs_as_torchjd_does(temperature):
    ours, theirs = bound(temperature=temperature), DWA(temperature)
    step = 0
    for batches in (3, 1, 4, 2, 5):
        for _ in range(batches):
            values = values_of(step)
            torch.testing.assert_close(ours(values, ALL).total, theirs(values))
            step += 1
        ours.end_epoch()
        theirs.step()


def test_by_window_it_weighs_as_torchjd_does_with_a_step_after_every_window():
    ours, theirs = bound(4), DWA()
    for step in range(23):
        torch.testing.assert_close(ours(values_of(step), ALL).total, theirs(values_of(step)))
        if step % 4 == 3:
            theirs.step()


def test_a_mean_is_over_the_steps_in_which_the_term_was_seen():
    weighting = bound()
    for epoch in ([(8.0, 1.0), (4.0, None)], [(3.0, None), (3.0, 5.0)]):
        for a, b in epoch:
            seen = torch.tensor([True, b is not None, False])
            weighting(torch.tensor([a, b or 0.0, 0.0], requires_grad=True), seen)
        weighting.end_epoch()
    # a: 3 / 6; b: 5 / 1, not 2.5 / 0.5; c was never seen
    rates = np.array([0.5, 5.0, 1.0])
    found = weighting(torch.ones(3), ALL).weights
    np.testing.assert_allclose(found.numpy(), 3 * softmax(rates / 2), rtol=1e-6)


def test_a_term_that_misses_an_epoch_keeps_the_means_that_it_has():
    weighting = bound(temperature=1.0)
    for values, seen in (([4.0, 4, 4], ALL), ([0.0, 2, 2], ~torch.tensor([True, False, False])), ([3.0, 1, 2], ALL)):
        weighting(torch.tensor(values, requires_grad=True), seen)
        weighting.end_epoch()
    rates = np.array([3 / 4, 1 / 2, 1])
    np.testing.assert_allclose(weighting(torch.ones(3), ALL).weights.numpy(), 3 * softmax(rates), rtol=1e-6)


def test_each_term_has_windows_of_its_own():
    weighting = bound(2)
    for step in range(8):
        b = step % 2 == 0
        weighting(torch.tensor([2.0, 1.0 + step if b else 0.0, 1.0], requires_grad=True), torch.tensor([True, b, True]))
    # b was seen with 1, 3 and then with 5, 7
    found = weighting(torch.ones(3), ALL).weights
    np.testing.assert_allclose(found.numpy(), 3 * softmax(np.array([1, 6 / 2, 1]) / 2), rtol=1e-6)


def test_a_mean_of_zero_counts_as_no_change():
    weighting = bound()
    for value in (0.0, 1.0):
        weighting(torch.tensor([value, 1.0, 1.0], requires_grad=True), ALL)
        weighting.end_epoch()
    assert weighting(torch.ones(3), ALL).weights.tolist() == [1, 1, 1]


def test_the_weights_of_the_user_do_not_change_the_rates():
    weighting, weights = bound(1), torch.tensor([10.0, 1.0, 1.0])
    for value in (2.0, 1.0):
        weighting(torch.tensor([value, 1.0, 1.0], requires_grad=True), ALL, weights)
    rates = np.array([0.5, 1, 1])
    np.testing.assert_allclose(
        weighting(torch.ones(3), ALL, weights).weights.numpy(), 3 * softmax(rates / 2) * [10, 1, 1], rtol=1e-6
    )


def test_the_end_of_an_epoch_is_refused_where_there_is_a_window():
    with pytest.raises(ArgumentError) as error:
        bound(25).end_epoch()
    assert str(error.value) == (
        "This DynamicWeightAverage takes its means over windows of 25 steps by itself. "
        "Leave out end_epoch(), or the window."
    )


def test_options_out_of_range_are_refused():
    with pytest.raises(ConstructionError) as error:
        DynamicWeightAverage(0, temperature=0)
    assert str(error.value) == (
        "DynamicWeightAverage cannot be built:"
        "\n  1. window must be a number of steps of at least 1, or None, not 0."
        "\n  2. temperature must be above 0, not 0."
    )


def test_the_repr_shows_the_options():
    assert repr(bound()) == "DynamicWeightAverage(temperature=2)"
    assert repr(bound(9, weighted_mean=True)) == "DynamicWeightAverage(window=9, temperature=2, weighted_mean=True)"
