"""GeometricMean against TorchJD's, and by hand."""

import numpy as np
import pytest
import torch
from torchjd import scalarization

from torch_pathloss import ConstructionError
from torch_pathloss.weighting import GeometricMean

ALL = torch.tensor([True, True, True])


def bound(**options):
    return GeometricMean(**options).bind(["a", "b", "c"])


def test_it_is_torchjds_value_and_gradient():
    values = [torch.tensor([3.0, 0.02, 700.0], requires_grad=True) for _ in range(2)]
    totals = [bound()(values[0], ALL).total, scalarization.GeometricMean()(values[1])]
    torch.testing.assert_close(*totals)
    for total in totals:
        total.backward()
    torch.testing.assert_close(values[0].grad, values[1].grad)


def test_weights_are_exponents_and_absent_terms_are_left_out():
    values = torch.tensor([4.0, 9.0, 0.0], dtype=torch.float64)
    total, effective = bound()(values, torch.tensor([True, True, False]), torch.tensor([1.0, 3.0, 50.0]))
    expected = (4 * 9**3) ** (1 / 4)
    assert total.item() == pytest.approx(expected, rel=1e-12)
    np.testing.assert_allclose(effective, [expected / 4 / 4, expected * 3 / 4 / 9, 0])


def test_the_product_of_many_large_or_small_values_does_not_overflow():
    many = torch.ones(100, dtype=torch.bool)
    for size in (1e30, 1e-30):
        total, effective = GeometricMean().bind([f"t{i}" for i in range(100)])(torch.full((100,), size), many)
        assert total.item() == pytest.approx(size, rel=1e-4)
        np.testing.assert_allclose(effective, np.full(100, 0.01), rtol=1e-4)


@pytest.mark.parametrize("value", [0.0, -0.0, -1.0])
def test_a_value_without_logarithm_makes_the_total_nan(value):
    assert bound()(torch.tensor([1.0, value, 1.0]), ALL).total.isnan()
    assert bound()(torch.tensor([1.0, value, 1.0]), torch.tensor([True, False, True])).total == 1


def test_an_offset_is_added_to_each_value():
    total, effective = bound(offset=1.0)(torch.tensor([0.0, 1.0, 3.0]), ALL)
    assert total.item() == pytest.approx(2)  # (1 * 2 * 4) ** (1 / 3)
    np.testing.assert_allclose(effective, [2 / 3, 1 / 3, 1 / 6], rtol=1e-6)
    assert repr(bound(offset=1.0)) == "GeometricMean(offset=1)"


def test_an_offset_that_is_not_finite_is_refused():
    with pytest.raises(ConstructionError) as error:
        GeometricMean(offset=torch.inf)
    assert str(error.value) == "GeometricMean cannot be built: offset must be finite, not inf."
