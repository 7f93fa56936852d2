"""GradNorm against Algorithm 1 of the paper, whose derivative autograd takes."""

import pytest
import torch

from torch_pathloss import ConstructionError
from torch_pathloss.weighting import GradNorm

ALL = torch.tensor([True, True, True])


def series(steps):
    generator = torch.Generator().manual_seed(1)
    return [(torch.rand(3, generator=generator) + 0.2, torch.rand(3, generator=generator) * 5) for _ in range(steps)]


def algorithm_1(series, alpha, lr):
    """The loop of the paper: the weights are a leaf, the aim is a constant, the sum is restored after each step."""
    weights = torch.ones(3, dtype=torch.float64, requires_grad=True)
    first = None
    for values, norms in series:
        values, norms = values.double(), norms.double()
        first = values if first is None else first
        gradient_norms = weights * norms
        rate = (values / first) / (values / first).mean()
        aim = (gradient_norms.mean() * rate**alpha).detach()
        (gradient,) = torch.autograd.grad((gradient_norms - aim).abs().sum(), weights)
        moved = weights.detach() - lr * gradient
        weights = (moved * 3 / moved.sum()).requires_grad_()
    return weights.detach().float()


@pytest.mark.parametrize(("alpha", "lr"), [(1.5, 0.025), (0.0, 0.01), (0.12, 0.001)])
def test_it_is_algorithm_1_of_the_paper(alpha, lr):
    weighting = GradNorm(alpha, lr=lr).bind(["a", "b", "c"])
    for values, norms in series(20):
        weighting(values, ALL, None, norms)
    torch.testing.assert_close(weighting.factor, algorithm_1(series(20), alpha, lr))
    assert weighting.factor.sum().item() == pytest.approx(3.0)


def test_without_alpha_it_makes_the_norms_equal():
    weighting = GradNorm(0.0, lr=0.001).bind(["a", "b"])
    norms = torch.tensor([1.0, 4.0])
    for _ in range(2000):
        weighting(torch.ones(2), ALL[:2], None, norms)
    # f_a = 4 f_b and f_a + f_b = 2
    torch.testing.assert_close(weighting.factor, torch.tensor([1.6, 0.4]), atol=0.01, rtol=0)


def test_the_weights_that_the_user_set_multiply_the_factors_and_do_not_move_them():
    plain, weighted = (GradNorm().bind(["a", "b", "c"]) for _ in range(2))
    weights = torch.tensor([1.0, 2.0, 3.0])
    for values, norms in series(5):
        expected = plain(values, ALL, None, norms).weights * weights
        torch.testing.assert_close(weighted(values, ALL, weights, norms).weights, expected)
    torch.testing.assert_close(plain.factor, weighted.factor)


def test_a_factor_never_turns_a_term_around():
    weighting = GradNorm(0.0, lr=10.0).bind(["a", "b"])
    for _ in range(20):
        weighting(torch.ones(2), ALL[:2], None, torch.tensor([1.0, 100.0]))
        assert weighting.factor.gt(0).all()
        assert weighting.factor.isfinite().all()


def test_the_sum_over_the_terms_that_are_seen_stays_and_the_others_do_not_move():
    weighting = GradNorm(lr=0.1).bind(["a", "b", "c"])
    for values, norms in series(3):
        weighting(values, ALL, None, norms)
    before = weighting.factor.clone()
    values, norms = series(4)[-1]
    weighting(values, torch.tensor([True, False, True]), None, norms)
    assert weighting.factor[1] == before[1]
    assert weighting.factor[0] != before[0]
    torch.testing.assert_close(weighting.factor.sum(), before.sum())


def test_options_out_of_their_range_are_refused():
    with pytest.raises(ConstructionError) as error:
        GradNorm(-1.0, lr=float("nan"))
    assert str(error.value) == (
        "GradNorm cannot be built:"
        "\n  1. alpha must be finite and not negative, not -1.0."
        "\n  2. lr must be finite and not negative, not nan."
    )
    assert repr(GradNorm(feature="body.x")) == "GradNorm(alpha=1.5, lr=0.025, feature='body.x')"
