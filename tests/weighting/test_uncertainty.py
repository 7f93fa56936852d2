"""Uncertainty against TorchJD's UW, and by hand in numpy."""

import numpy as np
import pytest
import torch
from torchjd.scalarization import UW

from torch_pathloss import ConstructionError
from torch_pathloss.weighting import Uncertainty

NAMES = ["a", "b.c", "d.*"]
ALL = torch.tensor([True, True, True])


def with_log_variance(weighting, numbers):
    with torch.no_grad():
        weighting.log_variance.copy_(torch.tensor(numbers))
    return weighting


def test_the_regression_form_trains_as_torchjd_does():
    ours, theirs = Uncertainty().bind(NAMES), UW(3)
    optimizers = [torch.optim.Adam(module.parameters(), lr=0.1) for module in (ours, theirs)]
    for step in range(30):
        values = [torch.tensor([1.0, 20.0 / (step + 1), 0.05], requires_grad=True) for _ in range(2)]
        totals = [ours(values[0], ALL).total, theirs(values[1])]
        torch.testing.assert_close(*totals)
        for total, optimizer in zip(totals, optimizers, strict=True):
            optimizer.zero_grad()
            total.backward()
            optimizer.step()
        torch.testing.assert_close(values[0].grad, values[1].grad)
    torch.testing.assert_close(ours.log_variance.data, theirs.log_var.data)


@pytest.mark.parametrize("regularizer", ["log", "log1p"])
def test_both_forms_and_regularizers_are_the_formulas_of_the_papers(regularizer):
    weighting = Uncertainty({("b", "c"): "classification", "a": "regression"}, regularizer=regularizer).bind(NAMES)
    s, v, w = np.array([-0.5, 0.25, 2.0]), np.array([3.0, 0.5, 7.0]), np.array([2.0, 0.5, 1.0])
    with_log_variance(weighting, s)
    sigma = np.exp(s / 2)
    regular = np.log(sigma) if regularizer == "log" else np.log(1 + sigma**2)
    parts = v / (sigma**2 * [2, 1, 2]) + regular
    total, effective = weighting(torch.tensor(v), ALL, torch.tensor(w))
    assert total.item() == pytest.approx(np.sum(w * parts), rel=1e-6)
    np.testing.assert_allclose(effective.numpy(), w / (sigma**2 * [2, 1, 2]), rtol=1e-6)
    total.backward()
    # d/ds of v / (c sigma^2) is its negative; of s / 2 it is 1/2, and of log(1 + e^s) it is e^s / (1 + e^s)
    regular_slope = 0.5 if regularizer == "log" else sigma**2 / (1 + sigma**2)
    slope = w * (regular_slope - v / (sigma**2 * [2, 1, 2]))
    np.testing.assert_allclose(weighting.log_variance.grad.numpy(), slope, rtol=1e-5)


def test_an_absent_term_loses_both_halves():
    weighting = with_log_variance(Uncertainty().bind(NAMES), [1.0, 2.0, 3.0])
    total, effective = weighting(torch.tensor([0.0, 4.0, 0.0]), torch.tensor([False, True, False]))
    assert total.item() == pytest.approx(0.5 * np.exp(-2) * 4 + 0.5 * 2)
    assert effective.tolist() == pytest.approx([0, 0.5 * np.exp(-2), 0])
    optimizer = torch.optim.SGD(weighting.parameters(), lr=0.1)
    for _ in range(200):  # without the mask the first would run to -10
        optimizer.zero_grad()
        weighting(torch.tensor([0.0, 4.0, 0.0]), torch.tensor([False, True, False])).total.backward()
        optimizer.step()
    assert weighting.log_variance.tolist()[::2] == [1.0, 3.0]


def test_log_variances_start_where_they_are_told_to():
    assert Uncertainty(log_variance=-0.5).bind(NAMES).log_variance.tolist() == [-0.5] * 3
    assert Uncertainty(log_variance={"d.*": 1.0}).bind(NAMES).log_variance.tolist() == [0, 0, 1]


def test_what_does_not_fit_is_said_at_once():
    with pytest.raises(ConstructionError) as error:
        Uncertainty("Gauss", regularizer="square", log_variance=float("inf"))
    assert str(error.value) == (
        "Uncertainty cannot be built:"
        "\n  1. form must be one of 'regression', 'classification', not 'Gauss'."
        "\n  2. regularizer must be one of 'log', 'log1p', not 'square'."
        "\n  3. log_variance must be finite, not inf."
    )
    with pytest.raises(ConstructionError) as error:
        Uncertainty({"b.d": "classification"}).bind(NAMES)
    assert str(error.value) == (
        "Uncertainty does not fit the terms: form: There is no term 'b.d'. "
        "The terms are 'a', 'b.c', 'd.*'. Did you mean 'b.c'?"
    )


def test_the_repr_says_which_forms():
    weighting = Uncertainty({"a": "classification"}, regularizer="log1p")
    assert repr(weighting) == "Uncertainty(form={'a': 'classification'}, regularizer='log1p')"
