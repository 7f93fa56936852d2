"""SmoothTchebycheff against TorchJD's STCH, and by hand."""

import numpy as np
import pytest
import torch
from torchjd.scalarization import STCH

from torch_pathloss import ConstructionError
from torch_pathloss.weighting import SmoothTchebycheff

ALL = torch.tensor([True, True, True])


def bound(*args, **options):
    return SmoothTchebycheff(*args, **options).bind(["a", "b", "c"])


@pytest.mark.parametrize("mu", [0.01, 0.5, 3.0])
def test_it_is_torchjds_value_and_gradient(mu):
    weights, ideal = torch.tensor([1.0, 0.5, 2.0]), torch.tensor([0.0, 0.25, -1.0])
    values = [torch.tensor([3.0, 6.0, 0.51], requires_grad=True) for _ in range(2)]
    ours = bound(mu, ideal={"b": 0.25, "c": -1.0})
    totals = [ours(values[0], ALL, weights).total, STCH(mu, weights, ideal)(values[1])]
    torch.testing.assert_close(*totals)
    for total in totals:
        total.backward()
    torch.testing.assert_close(values[0].grad, values[1].grad)


def test_absent_terms_are_left_out_of_the_sum():
    values = torch.tensor([1.0, 0.0, 2.0], dtype=torch.float64)
    total, effective = bound(0.5)(values, torch.tensor([True, False, True]))
    exponentials = np.exp(np.array([1.0, 2.0]) / 0.5)
    assert total.item() == pytest.approx(0.5 * np.log(exponentials.sum()), rel=1e-12)
    np.testing.assert_allclose(effective[[0, 2]], exponentials / exponentials.sum())


def test_the_running_ideal_is_the_smallest_value_of_training():
    weighting = bound(1.0, ideal="running")
    for values, seen in (([3.0, 5, 0], [True, True, False]), ([4.0, 2, 7], [True, True, True])):
        total, _ = weighting(torch.tensor(values, requires_grad=True), torch.tensor(seen))
    assert weighting.ideal.tolist() == [3, 2, 7]
    assert total.item() == pytest.approx(np.log(np.exp([4 - 3, 0, 0]).sum()))
    weighting.eval()(torch.tensor([1.0, 1.0, 1.0]), ALL)
    assert weighting.ideal.tolist() == [3, 2, 7]
    assert "ideal" in weighting.state_dict()
    assert "ideal" not in bound(1.0).state_dict()


def test_options_out_of_range_are_refused():
    with pytest.raises(ConstructionError) as error:
        SmoothTchebycheff(0.0, ideal="best")
    assert str(error.value) == (
        "SmoothTchebycheff cannot be built:"
        "\n  1. mu must be above 0 and finite, not 0.0."
        "\n  2. ideal must be a number, a mapping by name or 'running', not 'best'."
    )
    with pytest.raises(ConstructionError) as error:
        SmoothTchebycheff(1.0, ideal={"a": torch.nan})
    assert str(error.value) == "SmoothTchebycheff cannot be built: ideal must be finite, not nan."
    with pytest.raises(ConstructionError, match=r"^SmoothTchebycheff does not fit the terms: ideal: There is no term"):
        bound(1.0, ideal={"x": 0.0})


def test_the_repr_shows_the_options():
    assert repr(bound(0.1, ideal="running")) == "SmoothTchebycheff(mu=0.1, ideal='running')"
