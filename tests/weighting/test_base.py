"""What all weightings share."""

import pytest
import torch

from torch_pathloss import ConstructionError
from torch_pathloss.weighting import WeightedSum
from torch_pathloss.weighting._base import equal_to, over_ranks


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


def test_a_value_that_equals_the_mean_over_processes_has_its_own_gradient():
    values, seen = torch.tensor([1.1, 0.3, torch.inf], requires_grad=True), torch.tensor([True, False, True])
    found = equal_to(torch.tensor([2.7, 0.4, 0.0]), values, seen)
    assert found[:2].tolist() == torch.tensor([2.7, 0.4]).tolist()
    assert found[2].isnan()
    found[:2].sum().backward()
    assert values.grad.tolist() == [1, 0, 0]
