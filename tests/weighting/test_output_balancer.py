"""OutputBalancer against equations 5 and 6 of the paper, written out with sums over all steps so far."""

import pytest
import torch
from torch import nn

from torch_pathloss import ConstructionError, PathLossModule
from torch_pathloss.weighting import OutputBalancer

BOTH = torch.tensor([True, True])


def average(norms, decay):
    """The moving average as the sum of all norms so far, with weights that add up to 1."""
    weights = [decay ** (len(norms) - 1 - step) for step in range(len(norms))]
    return sum(w * n for w, n in zip(weights, norms, strict=True)) / sum(weights)


def test_it_is_the_formula_of_the_paper():
    decay, norm, weights = 0.8, 2.0, [1.0, 3.0]
    weighting = OutputBalancer(norm, decay=decay).bind(["a", "b"])
    seen = [[], []]
    for step in range(6):
        norms = [1.0 + step, 10.0 / (1 + step)]
        for history, value in zip(seen, norms, strict=True):
            history.append(value)
        _, effective = weighting(torch.ones(2), BOTH, torch.tensor(weights), torch.tensor(norms))
        expected = [norm * w / sum(weights) / average(h, decay) for w, h in zip(weights, seen, strict=True)]
        torch.testing.assert_close(effective, torch.tensor(expected))


def test_an_absent_term_leaves_its_share_to_the_others_and_keeps_its_average():
    weighting = OutputBalancer(decay=0.5).bind(["a", "b"])
    weighting(torch.ones(2), BOTH, None, torch.tensor([2.0, 4.0]))
    _, effective = weighting(torch.ones(2), torch.tensor([False, True]), None, torch.tensor([0.0, 8.0]))
    # b: (0.5 * 4 + 8) / 1.5
    torch.testing.assert_close(effective, torch.tensor([0.0, 1.5 / 10]))
    _, effective = weighting(torch.ones(2), BOTH, None, torch.tensor([2.0, 8.0]))
    # a: (0.5 * 2 + 2) / 1.5; b: (0.25 * 4 + 0.5 * 8 + 8) / 1.75
    torch.testing.assert_close(effective, torch.tensor([0.5 / 2.0, 0.5 * 1.75 / 13]))


def test_a_term_without_gradient_gets_no_weight():
    weighting = OutputBalancer().bind(["a", "b"])
    total, effective = weighting(torch.tensor([5.0, 1.0]), BOTH, None, torch.tensor([0.0, 1.0]))
    assert effective.tolist() == [0.0, 0.5]
    assert total == 0.5


def test_the_gradient_at_the_outputs_has_the_norm_and_the_shares_that_were_asked_for():
    criterion = PathLossModule(
        {"a": nn.MSELoss(), "b": nn.L1Loss()}, weights={"b": 4.0}, weighting=OutputBalancer(10.0, decay=0.0)
    )
    for scale in (1.0, 1000.0):
        output = {"a": scale * torch.randn(3, 4), "b": torch.randn(5)}
        _, gradients = criterion.value_and_grad(output, {"a": torch.zeros(3, 4), "b": torch.zeros(5)})
        assert gradients["a"].norm().item() == pytest.approx(2.0)
        assert gradients["b"].norm().item() == pytest.approx(8.0)


def test_evaluation_uses_the_averages_of_training():
    criterion = PathLossModule({"a": nn.MSELoss(), "b": nn.L1Loss()}, weighting=OutputBalancer())
    output, target = {"a": torch.full((4,), 3.0), "b": torch.ones(4)}, {"a": torch.zeros(4), "b": torch.zeros(4)}
    with torch.no_grad():
        assert criterion(output, target).item() == pytest.approx(0.5 * 9 + 0.5 * 1)  # no average yet
    trained, _ = criterion.value_and_grad(output, target)
    with torch.no_grad():
        # |2 * 3 / 4| * sqrt 4 = 3 and 1 / 4 * sqrt 4 = 0.5
        assert criterion(output, target).item() == pytest.approx(0.5 * 9 / 3 + 0.5 * 1 / 0.5)
    assert trained.item() == pytest.approx(2.5)


def test_options_out_of_their_range_are_refused():
    with pytest.raises(ConstructionError) as error:
        OutputBalancer(0.0, decay=1.0)
    assert str(error.value) == (
        "OutputBalancer cannot be built:"
        "\n  1. norm must be finite and positive, not 0.0."
        "\n  2. decay must be at least 0 and less than 1, not 1.0."
    )
