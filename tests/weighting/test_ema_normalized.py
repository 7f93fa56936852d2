"""EMANormalized: averages written out as weighted means, and terms that come and go."""

import numpy as np
import pytest
import torch
from torch import Tensor

from torch_pathloss import ConstructionError
from torch_pathloss.weighting import EMANormalized

ALL = (True, True, True)


def average(history: np.ndarray, decay: float) -> np.ndarray:
    """The bias-corrected moving average: a mean with weights decay ** age."""
    return np.average(history, axis=0, weights=decay ** np.arange(len(history) - 1, -1, -1.0))


def weights(weighting: EMANormalized, values: np.ndarray, seen: tuple[bool, ...] = ALL) -> Tensor:
    mask = torch.tensor(seen)
    return weighting(torch.where(mask, torch.tensor(values, dtype=torch.float32), 0), mask).weights


@pytest.fixture
def history():
    return np.random.default_rng(0).uniform(0.5, 2.0, (25, 3)) * [1.0, 1000.0, 1e-4]


@pytest.mark.parametrize("decay", [0.5, 0.9, 0.9999])
def test_each_value_is_divided_by_its_moving_average(history, decay):
    weighting = EMANormalized(decay=decay).bind("abc")
    for t, values in enumerate(history, 1):
        np.testing.assert_allclose(weights(weighting, values).numpy(), 1 / average(history[:t], decay), rtol=1e-5)


def test_the_first_weighted_value_is_exactly_1_and_so_is_each_with_a_decay_of_0(history):
    for weighting in (EMANormalized().bind("abc"), EMANormalized(decay=0.0).bind("abc")):
        np.testing.assert_allclose(weights(weighting, history[0]).numpy() * history[0], np.ones(3), rtol=1e-6)
    np.testing.assert_allclose(weights(weighting, history[1]).numpy() * history[1], np.ones(3), rtol=1e-6)


def test_initial_brings_each_value_to_the_mean_of_its_first_ones(history):
    weighting = EMANormalized(scale="initial", initial_updates=4).bind("abc")
    for t, values in enumerate(history, 1):
        expected = history[: min(t, 4)].mean(0) / average(history[:t], 0.9)
        np.testing.assert_allclose(weights(weighting, values).numpy(), expected, rtol=1e-5)


def test_mean_brings_the_terms_that_are_seen_to_the_mean_of_their_averages(history):
    weighting = EMANormalized(scale="mean").bind("abc")
    for values in history:
        found = weights(weighting, values)
    averages = average(history, 0.9)
    np.testing.assert_allclose(found.numpy(), averages.mean() / averages, rtol=1e-5)
    found = weights(weighting.eval(), history[-1], (True, False, True))
    np.testing.assert_allclose(found.numpy(), averages[[0, 2]].mean() / averages * [1, 0, 1], rtol=1e-5)


def test_an_absent_term_is_as_if_the_call_had_not_been(history):
    weighting = EMANormalized().bind("abc")
    present = np.random.default_rng(1).uniform(size=history.shape) < 0.6
    for values, seen in zip(history, present, strict=True):
        weights(weighting, values, tuple(seen))
    expected = [1 / average(history[present[:, k], k], 0.9) for k in range(3)]
    np.testing.assert_allclose(weights(weighting.eval(), np.ones(3)).numpy(), expected, rtol=1e-5)


def test_a_term_that_was_never_seen_in_an_update_has_the_factor_1():
    weighting = EMANormalized().bind("abc").eval()
    assert weights(weighting, np.array([4.0, 5.0, 6.0])).tolist() == [1.0, 1.0, 1.0]


def test_a_value_below_zero_keeps_its_sign_and_a_value_of_zero_is_finite():
    weighting = EMANormalized().bind("abc")
    values = torch.tensor([-4.0, 0.0, 2.0])
    total, found = weighting(values, torch.tensor(ALL))
    torch.testing.assert_close(found, torch.tensor([0.25, 1e8, 0.5]))
    assert total == 0  # -1 + 0 + 1


def test_the_gradient_is_that_of_the_value_over_a_constant():
    weighting = EMANormalized().bind("ab")
    values = torch.tensor([4.0, 0.5], requires_grad=True)
    weighting(values, torch.tensor([True, True])).total.backward()
    torch.testing.assert_close(values.grad, torch.tensor([0.25, 2.0]))


def test_all_problems_are_in_one_message():
    with pytest.raises(ConstructionError) as error:
        EMANormalized(scale="two", decay=1.0, initial_updates=0)
    assert str(error.value) == (
        "EMANormalized cannot be built:\n"
        "  1. scale must be one of 'one', 'initial', 'mean', not 'two'.\n"
        "  2. decay must be at least 0 and below 1, not 1.0.\n"
        "  3. initial_updates must be an integer of at least 1, not 0."
    )


def test_repr_shows_what_matters():
    assert repr(EMANormalized()) == "EMANormalized(scale='one', decay=0.9)"
    assert repr(EMANormalized(scale="initial", weighted_mean=True)) == (
        "EMANormalized(scale='initial', decay=0.9, initial_updates=10, weighted_mean=True)"
    )
