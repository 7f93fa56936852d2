"""CoV-Weighting: whole sequences in NumPy, without a running formula, and terms that come and go."""

import numpy as np
import pytest
import torch
from torch import Tensor

from torch_pathloss import ConstructionError
from torch_pathloss.weighting import CoefficientOfVariation


def by_hand(history: np.ndarray) -> np.ndarray:
    """The coefficients after the updates ``[t, K]``: mean and deviation of the ratios as NumPy has them."""
    ratios = [np.ones(history.shape[1])] + [history[t] / history[:t].mean(0) for t in range(1, len(history))]
    return np.sqrt(np.var(ratios, axis=0) + 1e-8) / np.mean(ratios, axis=0)


def by_hand_with_decay(history: np.ndarray, decay: float) -> np.ndarray:
    """The same with decayed means, written out: weights of the past are powers of the decay, the first has no 1 - d."""

    def mean(rows: np.ndarray) -> np.ndarray:
        powers = decay ** np.arange(len(rows) - 1, -1, -1.0)
        powers[1:] *= 1 - decay
        return powers @ np.asarray(rows)

    ratios = [np.ones(history.shape[1])]
    total = np.zeros(history.shape[1])
    for t in range(1, len(history)):
        ratios.append(history[t] / mean(history[:t]))
        total += (ratios[t] - mean(ratios[:t])) * (ratios[t] - mean(ratios))
    return np.sqrt(total / len(history) + 1e-8) / mean(ratios)


def weights(weighting: CoefficientOfVariation, values: np.ndarray, seen: np.ndarray | None = None) -> Tensor:
    mask = torch.ones(len(values), dtype=torch.bool) if seen is None else torch.tensor(seen)
    return weighting(torch.where(mask, torch.tensor(values, dtype=torch.float32), 0), mask).weights


@pytest.fixture
def history():
    return np.random.default_rng(0).uniform(0.5, 2.0, (30, 3)) * [1.0, 100.0, 0.01] * np.linspace(1, 0.2, 30)[:, None]


def test_factors_are_the_coefficients_of_the_updates_before(history):
    weighting = CoefficientOfVariation().bind("abc")
    for t, values in enumerate(history):
        expected = np.full(3, 1 / 3) if t < 2 else by_hand(history[:t]) / by_hand(history[:t]).sum()
        np.testing.assert_allclose(weights(weighting, values).numpy(), expected, rtol=2e-5)


@pytest.mark.parametrize("decay", [0.0, 0.7, 0.99])
def test_factors_with_decayed_means(history, decay):
    weighting = CoefficientOfVariation(decay=decay).bind("abc")
    for values in history:
        found = weights(weighting, values)
    expected = by_hand_with_decay(history[:-1], decay)
    np.testing.assert_allclose(found.numpy(), expected / expected.sum(), rtol=2e-5)


def test_an_absent_term_is_as_if_the_call_had_not_been(history):
    weighting = CoefficientOfVariation().bind("abc")
    present = np.random.default_rng(1).uniform(size=history.shape) < 0.6
    for values, seen in zip(history, present, strict=True):
        weights(weighting, values, seen)
    found = weights(weighting, np.ones(3))
    own = np.array([by_hand(history[present[:, k], k][:, None])[0] for k in range(3)])
    np.testing.assert_allclose(found.numpy(), own / own.sum(), rtol=2e-5)


def test_factors_sum_to_1_over_the_terms_that_are_seen(history):
    weighting = CoefficientOfVariation().bind("abc")
    for values in history:
        weights(weighting, values)
    found = weights(weighting, np.ones(3), np.array([True, False, True]))
    expected = by_hand(history)[[0, 2]]
    np.testing.assert_allclose(found[[0, 2]].numpy(), expected / expected.sum(), rtol=2e-5)
    assert found[1] == 0


def test_a_term_that_joins_late_has_an_equal_share_for_two_updates(history):
    weighting = CoefficientOfVariation().bind("abc")
    for values in history:
        weights(weighting, values, np.array([True, True, False]))
    coefficients = by_hand(history)[:2]
    for _ in range(2):
        first, second, late = weights(weighting, np.array([0.0, 0.0, 4.0]), np.array([False, False, True])).tolist()
        assert (first, second, late) == (0.0, 0.0, 1.0)
    weighting.load_state_dict({**weighting.state_dict(), "count": torch.tensor([30, 30, 1])})
    found = weights(weighting, np.array([1.0, 1.0, 4.0])).numpy()
    np.testing.assert_allclose(found, [*(2 / 3 * coefficients / coefficients.sum()), 1 / 3], rtol=2e-5)


def test_a_loss_of_zero_leaves_everything_finite():
    weighting = CoefficientOfVariation().bind("ab")
    for values in [(0.0, 1.0), (0.0, 2.0), (5.0, 3.0), (1e30, 1.0), (1.0, 1.0)]:
        assert weights(weighting, np.array(values)).isfinite().all()
    assert all(buffer.isfinite().all() for buffer in weighting.buffers())


def test_losses_below_zero_have_positive_factors(history):
    weighting, mirrored = CoefficientOfVariation().bind("abc"), CoefficientOfVariation().bind("abc")
    for values in history:
        found, expected = weights(weighting, -values), weights(mirrored, values)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("decay", [1.0, -0.1])
def test_a_decay_out_of_range_raises(decay):
    with pytest.raises(ConstructionError) as error:
        CoefficientOfVariation(decay=decay)
    assert str(error.value) == (
        "CoefficientOfVariation cannot be built: decay must be at least 0 and below 1, or None for the mean of all "
        f"values, not {decay}."
    )


def test_repr_shows_what_is_given():
    assert repr(CoefficientOfVariation()) == "CoefficientOfVariation()"
    assert repr(CoefficientOfVariation(decay=0.5, weighted_mean=True)) == (
        "CoefficientOfVariation(decay=0.5, weighted_mean=True)"
    )
