"""RandomWeighting: the formulas in numpy, and the distributions by their moments."""

import math

import numpy as np
import pytest
import torch
from test_generator import by_hand

from torch_pathloss import ConstructionError
from torch_pathloss.weighting import RandomWeighting

ALL = torch.tensor([True, True, True])


def bound(*args, **options):
    return RandomWeighting(*args, **options).bind(["a", "b", "c"])


def draws(weighting, count):
    values = torch.ones(3, requires_grad=True)
    return np.array([weighting(values, ALL).weights.numpy() for _ in range(count)], dtype=np.float64)


@pytest.mark.parametrize("seed", [0, 7, 2**32 - 1])
def test_the_draws_are_the_formulas_of_the_distributions(seed):
    normal, dirichlet = draws(bound(seed=seed), 50), draws(bound("dirichlet", seed=seed), 50)
    for counter in range(50):
        u = np.array([by_hand(seed, counter, index) for index in range(6)])
        gauss = np.exp(np.sqrt(-2 * np.log(1 - u[:3])) * np.cos(2 * np.pi * u[3:]))
        np.testing.assert_allclose(normal[counter], gauss / gauss.sum(), rtol=1e-4)
        exponential = -np.log(1 - u[:3])
        np.testing.assert_allclose(dirichlet[counter], exponential / exponential.sum(), rtol=1e-4)


def test_the_logarithms_of_the_normal_draws_have_the_moments_of_a_normal_distribution():
    x = np.log(draws(bound(seed=1), 8000))
    x = x[:, 0] - x[:, 1]  # the difference of two standard normal numbers: variance 2, kurtosis 3
    assert abs(x.mean()) < 4 * math.sqrt(2 / 8000)
    assert x.var() == pytest.approx(2, abs=4 * 2 * math.sqrt(2 / 8000))
    assert np.mean(x**4) / 4 == pytest.approx(3, abs=4 * math.sqrt(96 / 8000))
    assert abs(np.corrcoef(x[1:], x[:-1])[0, 1]) < 4 / math.sqrt(8000)


def test_the_dirichlet_draws_are_uniform_on_the_simplex():
    x = draws(bound("dirichlet", seed=1), 8000)
    np.testing.assert_allclose(x.sum(1), 1, rtol=1e-5)
    # Dirichlet(1, 1, 1): mean 1/3, variance 1/18, covariance -1/36; P(x < 1/2) = 3/4
    np.testing.assert_allclose(x.mean(0), 1 / 3, atol=4 * math.sqrt(1 / 18 / 8000))
    np.testing.assert_allclose(np.cov(x.T), (np.eye(3) * 3 - 1) / 36, atol=0.003)
    assert np.mean(x[:, 0] < 0.5) == pytest.approx(3 / 4, abs=4 * math.sqrt(3 / 16 / 8000))


def test_other_seeds_give_other_draws_and_one_seed_the_same():
    first, second, other = (draws(bound(seed=seed), 4) for seed in (3, 3, 4))
    assert np.array_equal(first, second)
    assert not np.isclose(first, other).any()


def test_the_generators_of_torch_are_not_touched():
    before = torch.get_rng_state()
    draws(bound(), 3)
    assert torch.equal(torch.get_rng_state(), before)


def test_an_evaluation_takes_the_mean_of_the_factors():
    weighting = bound()
    with torch.no_grad():
        assert weighting(torch.ones(3), ALL).weights.tolist() == pytest.approx([1 / 3] * 3)
    assert weighting.counter == 0


def test_a_checkpoint_holds_seed_and_counter():
    weighting, resumed = bound(seed=5), bound(seed=0)
    draws(weighting, 3)
    resumed.load_state_dict(weighting.state_dict())
    assert np.array_equal(draws(weighting, 3), draws(resumed, 3))


def test_options_out_of_range_are_refused():
    with pytest.raises(ConstructionError) as error:
        RandomWeighting("uniform", seed=-1)
    assert str(error.value) == (
        "RandomWeighting cannot be built:"
        "\n  1. distribution must be one of 'normal', 'dirichlet', not 'uniform'."
        "\n  2. seed must be an integer from 0 to 2**32 - 1, not -1."
    )


def test_the_repr_shows_the_distribution():
    assert (
        repr(bound("dirichlet", weighted_mean=True)) == "RandomWeighting(distribution='dirichlet', weighted_mean=True)"
    )
