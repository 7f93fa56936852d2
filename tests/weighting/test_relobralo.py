"""ReLoBRaLo: the formula in NumPy with the draws of integers of Python, and terms that come and go."""

import numpy as np
import pytest
import torch
from test_generator import by_hand as draw
from torch import Tensor

from torch_pathloss import ConstructionError
from torch_pathloss.weighting import ReLoBRaLo

ALL = (True, True, True)


def softmax(logits: np.ndarray) -> np.ndarray:
    powers = np.exp(logits - logits.max())
    return powers / powers.sum()


def by_hand(history: np.ndarray, alpha: float, temperature: float, rho: float, seed: int) -> np.ndarray:
    """The authors' algorithm: factors 1, then of the last update alone, then smoothed with a look back at times."""
    count = history.shape[1]
    factors = np.ones(count)
    for t in range(1, len(history)):
        recent = count * softmax(history[t] / (temperature * history[t - 1]))
        first = count * softmax(history[t] / (temperature * history[0]))
        past = factors if draw(seed, t, 0) < rho else first
        factors = recent if t == 1 else alpha * past + (1 - alpha) * recent
    return factors


def weights(weighting: ReLoBRaLo, values: np.ndarray, seen: tuple[bool, ...] = ALL) -> Tensor:
    mask = torch.tensor(seen)
    return weighting(torch.where(mask, torch.tensor(values, dtype=torch.float32), 0), mask).weights


@pytest.fixture
def history():
    return np.random.default_rng(0).uniform(0.5, 2.0, (40, 3)) * [1.0, 100.0, 0.01]


@pytest.mark.parametrize(
    ("alpha", "temperature", "rho", "seed"), [(0.999, 0.1, 0.99, 0), (0.9, 1.0, 0.5, 3), (0.5, 0.3, 0.0, 2**32 - 1)]
)
def test_factors_are_those_of_the_formula(history, alpha, temperature, rho, seed):
    weighting = ReLoBRaLo(alpha=alpha, temperature=temperature, rho=rho, seed=seed).bind("abc")
    for t, values in enumerate(history, 1):
        expected = by_hand(history[:t], alpha, temperature, rho, seed)
        np.testing.assert_allclose(weights(weighting, values).numpy(), expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("rho", [0.0, 1.0])
def test_with_rho_0_each_update_looks_back_and_with_rho_1_none(history, rho):
    weighting = ReLoBRaLo(alpha=1.0, temperature=1.0, rho=rho).bind("abc")
    for values in history:
        found = weights(weighting, values).numpy()
    first, second, last = history[0], history[1], history[-1]
    expected = 3 * softmax(last / first) if rho == 0 else 3 * softmax(second / first)
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_the_draw_is_one_for_all_terms_and_changes_with_the_seed_alone(history):
    def sequence(seed: int, disturb: int) -> Tensor:
        torch.manual_seed(disturb)
        weighting = ReLoBRaLo(rho=0.5, temperature=1.0, seed=seed).bind("abc")
        return torch.stack([weights(weighting, values) for values in history])

    assert sequence(5, 0).equal(sequence(5, 1))
    assert not sequence(5, 0).equal(sequence(6, 0))


def test_torch_generators_are_left_alone(history):
    before = torch.get_rng_state()
    weights(ReLoBRaLo().bind("abc"), history[0])
    assert torch.get_rng_state().equal(before)


def test_an_absent_term_keeps_its_factor_and_the_others_are_balanced_without_it(history):
    weighting = ReLoBRaLo(alpha=0.9, temperature=1.0, rho=1.0).bind("abc")
    for values in history[:5]:
        expected = weights(weighting, values).numpy()
    found = weights(weighting, history[5], (True, False, True)).numpy()
    expected[[0, 2]] = 0.9 * expected[[0, 2]] + 0.1 * 2 * softmax((history[5] / history[4])[[0, 2]])
    np.testing.assert_allclose(found, expected * [1, 0, 1], rtol=1e-5)
    found = weights(weighting, history[6]).numpy()  # b is compared with its own last value
    recent = 3 * softmax(history[6] / [history[5, 0], history[4, 1], history[5, 2]])
    np.testing.assert_allclose(found, 0.9 * expected + 0.1 * recent, rtol=1e-5)


def test_a_term_that_joins_late_has_the_factor_1_once_and_then_its_own_balance(history):
    weighting = ReLoBRaLo(alpha=0.9, temperature=1.0, rho=1.0).bind("abc")
    for values in history[:5]:
        weights(weighting, values, (True, True, False))
    assert weights(weighting, history[5])[2] == 1
    found = weights(weighting, history[6])[2].item()
    assert found == pytest.approx(3 * softmax(history[6] / history[5])[2], rel=1e-5)


def test_a_loss_of_zero_leaves_everything_finite():
    weighting = ReLoBRaLo().bind("abc")
    for values in [(0.0, 1.0, 1.0), (0.0, 2.0, 1.0), (5.0, 3.0, 1.0), (1e38, 1.0, 0.0), (1.0, 1.0, 1.0)]:
        assert weights(weighting, np.array(values)).isfinite().all()


def test_all_problems_are_in_one_message():
    with pytest.raises(ConstructionError) as error:
        ReLoBRaLo(alpha=1.5, temperature=0.0, rho=-0.1, seed=-1)
    assert str(error.value) == (
        "ReLoBRaLo cannot be built:\n"
        "  1. alpha must be from 0 to 1, not 1.5.\n"
        "  2. rho must be from 0 to 1, not -0.1.\n"
        "  3. temperature must be positive, not 0.0.\n"
        "  4. seed must be an integer from 0 to 2**32 - 1, not -1."
    )


def test_repr_shows_every_option():
    assert repr(ReLoBRaLo(seed=3)) == "ReLoBRaLo(alpha=0.999, temperature=0.1, rho=0.99, seed=3)"


def test_a_seed_that_is_no_integer_raises():
    with pytest.raises(ConstructionError) as error:
        ReLoBRaLo(seed=0.5)
    assert str(error.value) == "ReLoBRaLo cannot be built: seed must be an integer from 0 to 2**32 - 1, not 0.5."
