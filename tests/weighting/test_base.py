"""What all weightings share."""

import pytest
import torch

from torch_pathloss import ConstructionError
from torch_pathloss.weighting import WeightedSum
from torch_pathloss.weighting._base import mean_over_ranks, over_ranks


def test_a_weighting_serves_one_criterion():
    weighting = WeightedSum().bind(["a", "b"])
    with pytest.raises(ConstructionError) as error:
        weighting.bind(["a"])
    assert str(error.value) == (
        "This WeightedSum keeps the state of the terms 'a', 'b' already. Make one weighting for each criterion."
    )


def test_a_factor_is_masked_weighted_and_normalised_in_this_order():
    weighting = WeightedSum(weighted_mean=True).bind(["a", "b", "c"])
    values, seen = torch.tensor([4.0, 0.0, 8.0]), torch.tensor([True, False, True])
    total, effective = weighting(values, seen, torch.tensor([1.0, 5.0, 3.0]))
    assert effective.tolist() == [0.25, 0.0, 0.75]
    assert total.item() == 7.0


def test_values_that_are_not_finite_are_not_counted():
    values = torch.tensor([1.0, torch.nan, torch.inf, 0.0])
    mean, seen = over_ranks(values, torch.tensor([True, True, True, False]))
    assert mean.tolist() == [1, 0, 0, 0]
    assert seen.tolist() == [True, False, False, False]


def test_the_mean_over_one_process_is_the_value_with_its_gradient():
    values = torch.tensor([1.1, 0.3, torch.inf], requires_grad=True)
    mean, seen = mean_over_ranks(values, torch.tensor([True, False, True]), together=True)
    assert mean[:2].tolist() == [values[0].item(), 0]
    assert mean[2].isnan()
    assert seen.tolist() == [True, False, True]
    mean[:2].sum().backward()
    assert values.grad.tolist() == [1, 0, 0]
