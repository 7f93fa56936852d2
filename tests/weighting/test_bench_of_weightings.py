"""What bench.weightings compares: its table is whole, and its toy is that of the papers."""

import math

import pytest
import torch

from bench import _rules, _toy


def test_every_weighting_is_compared():
    assert _rules.missing() == set()


@pytest.mark.parametrize(
    ("point", "first", "second"),
    [
        # lower half: tanh(4) ((7 -+ x)^2 / 10 - 20), in the middle of the front and at an end
        ((0.0, -8.0), math.tanh(4) * (4.9 - 20), math.tanh(4) * (4.9 - 20)),
        ((7.0, -8.0), math.tanh(4) * -20, math.tanh(4) * (19.6 - 20)),
        # upper half: tanh(1) (log |0.5 (-1 - 7) + tanh 2| + 6) and tanh(1) (log |0.5 (-1 + 3) - tanh 2 + 2| + 6)
        (
            (1.0, 2.0),
            math.tanh(1) * (math.log(4 - math.tanh(2)) + 6),
            math.tanh(1) * (math.log(3 - math.tanh(2)) + 6),
        ),
        ((0.0, 0.0), 0.0, 0.0),
    ],
)
def test_the_toy_losses_are_those_of_the_papers(point, first, second):
    x = torch.tensor(point, dtype=torch.float64)
    found = [_toy.loss_at(x, number).item() for number in (0, 1)]
    assert found == pytest.approx([first, second])


def test_the_front_has_no_gap_and_the_middle_of_the_upper_half_has():
    ends = torch.tensor([7.0, -8.0]), torch.tensor([-7.0, -8.0])
    for point in (*ends, torch.tensor([0.0, -8.0])):
        assert abs(_toy.gap(torch.stack([_toy.loss_at(point, number) for number in (0, 1)]))) < 0.02
    assert _toy.gap(torch.zeros(2)) > 10


def test_fixed_weights_scale_the_gradients_of_the_toy():
    x = torch.nn.Parameter(torch.tensor([1.0, -2.0]))
    criterion = _toy.criterion_for(_rules.RULES["weights by hand"], seed=0)
    total = criterion({"x": x})
    expected = sum(_toy.loss_at(x, number) + _toy.SHIFT for number in (0, 1))  # 10 * 0.1 of the first
    torch.testing.assert_close(total, expected)
