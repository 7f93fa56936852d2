"""Terms and sources against the same losses written out by hand."""

import copy
import functools

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torch_pathloss import (
    ArgumentError,
    ConstructionError,
    Input,
    Output,
    PathLossModule,
    Shared,
    Target,
    Term,
)

STATE = ["weights.value", "weights.step", "weights._extra_state"]


def randn(*shape, dtype=torch.float32):
    return torch.randn(*shape, dtype=dtype, requires_grad=True)


def gradients(loss, *leaves):
    return torch.autograd.grad(loss, leaves, retain_graph=True)


def assert_same(loss: Tensor, by_hand: Tensor, *leaves: Tensor) -> None:
    """The loss and its gradients equal those of the expression written out."""
    torch.testing.assert_close(loss, by_hand, check_dtype=False)
    for ours, theirs in zip(gradients(loss, *leaves), gradients(by_hand, *leaves), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_ctc_takes_its_lengths_by_keyword():
    criterion = PathLossModule(
        {"text": Term(nn.CTCLoss(), input_lengths=Input("frames"), target_lengths=Target("length"))}
    )
    scores = randn(12, 3, 6)
    text = torch.randint(1, 6, (3, 5))
    frames, length = torch.tensor([12, 11, 9]), torch.tensor([5, 4, 2])
    log_probs = scores.log_softmax(-1)
    loss = criterion({"text": log_probs}, {"text": text, "length": length}, input={"frames": frames})
    assert_same(loss, F.ctc_loss(log_probs, text, frames, length), scores)


def test_triplet_takes_three_outputs():
    sources = (Output("anchor"), Output("positive"), Output("negative"))
    criterion = PathLossModule({"embedding": Term(nn.TripletMarginLoss(margin=0.7), *sources)})
    a, p, n = randn(4, 8), randn(4, 8), randn(4, 8)
    loss = criterion({"anchor": a, "positive": p, "negative": n})
    assert_same(loss, F.triplet_margin_loss(a, p, n, margin=0.7), a, p, n)


def test_cosine_embedding_takes_two_outputs_and_a_target():
    criterion = PathLossModule(
        {"pair": Term(nn.CosineEmbeddingLoss(), Output("left"), Output("right"), Target("same"))}
    )
    left, right, same = randn(4, 8), randn(4, 8), torch.tensor([1, -1, 1, -1])
    loss = criterion({"left": left, "right": right}, {"same": same})
    assert_same(loss, F.cosine_embedding_loss(left, right, same), left, right)


def test_the_kl_of_a_vae_needs_no_target():
    def kl(mean: Tensor, log_variance: Tensor) -> Tensor:
        return -0.5 * (1 + log_variance - mean**2 - log_variance.exp()).sum(1).mean()

    criterion = PathLossModule(
        {"reconstruction": nn.MSELoss(), "latent": Term(kl, Output("latent.mean"), Output("latent.log_variance"))},
        weights={"latent": 0.1},
    )
    x, m, v, y = randn(4, 6), randn(4, 2), randn(4, 2), torch.randn(4, 6)
    loss = criterion({"reconstruction": x, "latent": {"mean": m, "log_variance": v}}, {"reconstruction": y})
    assert_same(loss, F.mse_loss(x, y) + 0.1 * kl(m, v), x, m, v)


def test_distillation_compares_two_outputs():
    def distill(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
        soft = F.softmax(teacher.detach() / temperature, -1)
        return F.kl_div(F.log_softmax(student / temperature, -1), soft, reduction="batchmean") * temperature**2

    criterion = PathLossModule(
        {
            "student": nn.CrossEntropyLoss(),
            "student:distill": Term(distill, Output("student"), Output("teacher"), temperature=2.0),
        }
    )
    student, teacher, y = randn(4, 5), randn(4, 5), torch.tensor([0, 1, 2, 3])
    loss = criterion({"student": student, "teacher": teacher}, {"student": y})
    assert_same(loss, F.cross_entropy(student, y) + distill(student, teacher, 2.0), student)


def dice(probability: Tensor, target: Tensor) -> Tensor:
    return 1 - (2 * (probability * target).sum() + 1) / (probability.sum() + target.sum() + 1)


@pytest.mark.parametrize("same_object", [True, False])
def test_a_shared_softmax_is_evaluated_once_a_call(same_object):
    calls = []

    def softmax(logits):
        calls.append(logits)
        return logits.softmax(1)

    first = Shared(softmax, Output("mask"))
    second = first if same_object else Shared(softmax, Output("mask"))
    criterion = PathLossModule(
        {"mask:dice": Term(dice, first, Target("mask")), "mask:mse": Term(nn.MSELoss(), second, Target("mask"))}
    )
    x, y = randn(2, 3, 4, 4), torch.rand(2, 3, 4, 4)
    loss = criterion({"mask": x}, {"mask": y})
    assert len(calls) == 1
    assert_same(loss, dice(x.softmax(1), y) + F.mse_loss(x.softmax(1), y), x)
    criterion({"mask": x}, {"mask": y})
    assert len(calls) == 2


def test_shared_computations_nest_and_differ_by_their_constants():
    scaled = [Shared(torch.mul, Output("x"), factor) for factor in (2.0, 3.0)]
    criterion = PathLossModule({f"x:{i}s": Term(torch.mean, Shared(torch.square, s)) for i, s in enumerate(scaled)})
    x = randn(5)
    assert_same(criterion({"x": x}), (2 * x).square().mean() + (3 * x).square().mean(), x)


def test_zero_and_minus_zero_are_two_constants():
    quotients = [Shared(torch.div, 1.0, Shared(torch.mul, Output("x"), zero)) for zero in (0.0, -0.0)]
    criterion = PathLossModule({f"x:{i}s": Term(torch.sum, q) for i, q in enumerate(quotients)})
    values = criterion.terms({"x": torch.ones(1)}).values()
    assert [value.item() for value in values] == [float("inf"), float("-inf")]


def test_a_shared_module_trains_its_parameters():
    projection = nn.Linear(4, 2)
    criterion = PathLossModule({"x": Term(nn.MSELoss(), Shared(projection, Output("x")), Target("x"))})
    assert {id(p) for p in criterion.parameters()} == {id(p) for p in projection.parameters()}
    criterion({"x": randn(3, 4)}, {"x": torch.randn(3, 2)}).backward()
    assert projection.weight.grad is not None


def test_deep_supervision_follows_a_list_whose_length_changes():
    criterion = PathLossModule(
        {"aux.*": Term(nn.CrossEntropyLoss(), target=Target("label"), match="mean")}, weights={"aux.*": 0.4}
    )
    label = torch.tensor([0, 1, 2])
    for length in (3, 1, 5):
        aux = [randn(3, 4) for _ in range(length)]
        by_hand = 0.4 * sum(F.cross_entropy(a, label) for a in aux) / length
        assert_same(criterion({"aux": aux}, {"label": label}), by_hand, *aux)


def test_a_pattern_pairs_output_and_target_by_what_the_wildcards_stand_for():
    criterion = PathLossModule({"heads.*.logits": nn.MSELoss()})
    a, b = randn(3), randn(3)
    target = {"heads": {"b": {"logits": torch.zeros(3)}, "c": None, "a": {"logits": torch.ones(3)}}}
    loss = criterion({"heads": {"a": {"logits": a}, "b": {"logits": b}}}, target)
    assert_same(loss, F.mse_loss(a, torch.ones(3)) + F.mse_loss(b, torch.zeros(3)), a, b)


def test_patterns_in_two_outputs_go_together():
    criterion = PathLossModule({"consistency": Term(nn.MSELoss(), Output("student.*"), Output("teacher.*"))})
    s, t = [randn(2), randn(2)], [randn(2), randn(2)]
    loss = criterion({"student": s, "teacher": t})
    assert_same(loss, F.mse_loss(s[0], t[0]) + F.mse_loss(s[1], t[1]), *s, *t)


def test_a_shared_computation_in_a_pattern_is_done_once_for_each_match():
    calls = []

    def sigmoid(x):
        calls.append(x)
        return x.sigmoid()

    probability = Shared(sigmoid, Output("masks.*"))
    criterion = PathLossModule(
        {
            "masks.*:dice": Term(dice, probability, Target("masks.*")),
            "masks.*:mse": Term(nn.MSELoss(), probability, Target("masks.*")),
        }
    )
    x, y = [randn(4), randn(4)], [torch.rand(4), torch.rand(4)]
    loss = criterion({"masks": x}, {"masks": y})
    assert len(calls) == 2
    by_hand = sum(dice(a.sigmoid(), b) + F.mse_loss(a.sigmoid(), b) for a, b in zip(x, y, strict=True))
    assert_same(loss, by_hand, *x)


def test_a_target_under_another_name_is_given_by_position_or_keyword():
    x, y = randn(3, 4), torch.tensor([0, 1, 2])
    for term in (
        Term(nn.CrossEntropyLoss(), Output("logits"), Target("label")),
        Term(nn.CrossEntropyLoss(), target=Target("label")),
        Term(F.cross_entropy, target=Target("label")),
        Term(nn.CrossEntropyLoss(), input=Output("logits"), target=Target("label")),
    ):
        loss = PathLossModule({"logits": term})({"logits": x}, {"label": y})
        assert_same(loss, F.cross_entropy(x, y), x)


def test_a_keyword_for_the_first_parameter_leaves_the_target_at_its_path():
    x, y = randn(3), torch.randn(3)
    criterion = PathLossModule({"y": Term(nn.MSELoss(), input=Output("x"))})
    assert_same(criterion({"x": x}, {"y": y}), F.mse_loss(x, y), x)


def test_a_second_parameter_with_a_default_is_not_filled_with_the_target():
    def norm(x, eps=0.5):
        return (x**2 + eps).sum()

    x = randn(3)
    criterion = PathLossModule({"x": Term(norm, x=Output("x"))})
    assert_same(criterion({"x": x}), norm(x), x)


def test_a_criterion_with_keyword_only_parameters_gets_keywords_only():
    def criterion(*, prediction, reference):
        return (prediction - reference).abs().sum()

    x, y = randn(3), torch.randn(3)
    module = PathLossModule({"any": Term(criterion, prediction=Output("x"), reference=Target("y"))})
    assert_same(module({"x": x}, {"y": y}), (x - y).abs().sum(), x)


def test_class_weights_of_the_batch_go_to_the_keyword_weight():
    x, y, w = randn(4, 3), torch.tensor([0, 1, 2, 0]), torch.tensor([0.2, 1.0, 3.0])
    criterion = PathLossModule({"logits": Term(F.cross_entropy, weight=Input("class_weight"))})
    loss = criterion({"logits": x}, {"logits": y}, input={"class_weight": w})
    assert_same(loss, F.cross_entropy(x, y, weight=w), x)


def test_a_criterion_with_parameters_is_trained_and_one_with_buffers_is_saved():
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.tensor(2.0))

        def forward(self, input, target):
            return (self.scale * (input - target)).abs().mean()

    weight = torch.tensor([1.0, 2.0, 3.0])
    criterion = PathLossModule({"box": Scaled(), "label": nn.CrossEntropyLoss(weight=weight)})
    x, y, logits, label = randn(4), torch.randn(4), randn(2, 3), torch.tensor([0, 2])
    criterion({"box": x, "label": logits}, {"box": y, "label": label}).backward()
    torch.testing.assert_close(criterion.get_submodule("/box").scale.grad, (x - y).abs().mean().detach())
    assert set(criterion.state_dict()) == {"/box.scale", "/label.weight", *STATE}


class Scaled(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(2.0))

    def forward(self, input, target, *, power=1):
        return (self.scale * (input - target)).abs().pow(power).mean()


def test_a_criterion_with_parameters_is_seen_through_a_partial():
    scaled = Scaled()
    criterion = PathLossModule({"x": functools.partial(functools.partial(scaled), power=2)})
    assert [id(p) for p in criterion.parameters()] == [id(scaled.scale)]
    assert not criterion.eval().get_submodule("/x").module.training
    twin = copy.deepcopy(criterion)
    (scale,) = twin.parameters()
    twin({"x": torch.ones(2)}, {"x": torch.zeros(2)}).backward()  # 2 * (1 * 1) * 2
    assert scale.grad.item() == 4
    assert scaled.scale.grad is None


def test_a_module_with_an_attribute_called_func_is_itself():
    class Cropped(nn.Module):
        func = staticmethod(F.mse_loss)

        def forward(self, input, target):
            return self.func(input[: len(target)], target)

    criterion = PathLossModule({"x": Cropped()})
    assert criterion({"x": torch.ones(3)}, {"x": torch.zeros(2)}).item() == 1


def test_a_constant_tensor_moves_with_the_module_and_is_not_saved():
    anchors = torch.tensor([1.0, 2.0])
    criterion = PathLossModule({"x": Term(nn.MSELoss(), Output("x"), anchors)})
    x = randn(2)
    assert_same(criterion({"x": x}), F.mse_loss(x, anchors), x)
    assert list(criterion.state_dict()) == STATE
    x = randn(2, dtype=torch.float64)
    assert_same(criterion.double()({"x": x}), F.mse_loss(x, anchors.double()), x)


def test_a_constant_parameter_is_trained():
    centre = nn.Parameter(torch.zeros(2))
    criterion = PathLossModule({"x": Term(nn.MSELoss(), Output("x"), centre)})
    assert [id(p) for p in criterion.parameters()] == [id(centre)]
    criterion({"x": torch.ones(2)}).backward()
    torch.testing.assert_close(centre.grad, -torch.ones(2))


@pytest.mark.parametrize("shape", [(6,), (6, 3), (6, 2, 2)])
def test_reductions_with_sample_weights_follow_their_formulas(shape):
    x, y, w = randn(*shape), torch.randn(*shape), torch.rand(6)
    error = (x - y) ** 2
    spread = w.view(6, *(1,) * (len(shape) - 1)).expand(shape)
    by_hand = {
        "mean": (spread * error).sum() / error.numel(),
        "weighted_mean": (spread * error).sum() / spread.sum(),
        "sum": (spread * error).sum(),
    }
    for reduction, expected in by_hand.items():
        criterion = PathLossModule({"x": Term(nn.MSELoss(reduction="none"), reduction=reduction)})
        assert_same(criterion({"x": x}, {"x": y}, sample_weight=w), expected, x)


def test_reductions_without_sample_weights_are_torch_s_own():
    x, y = randn(6, 3), torch.randn(6, 3)
    for reduction, expected in {"mean": F.mse_loss(x, y), "weighted_mean": F.mse_loss(x, y)}.items():
        criterion = PathLossModule({"x": Term(nn.MSELoss(reduction="none"), reduction=reduction)})
        assert_same(criterion({"x": x}, {"x": y}), expected, x)
    criterion = PathLossModule({"x": Term(nn.MSELoss(reduction="none"), reduction="sum")})
    assert_same(criterion({"x": x}, {"x": y}), F.mse_loss(x, y, reduction="sum"), x)


def test_weighted_mean_over_no_weight_is_zero_with_zero_gradient():
    criterion = PathLossModule({"x": Term(nn.MSELoss(reduction="none"), reduction="weighted_mean")})
    x = randn(3)
    loss = criterion({"x": x}, {"x": torch.zeros(3)}, sample_weight=torch.zeros(3))
    assert loss.item() == 0
    assert gradients(loss, x)[0].tolist() == [0, 0, 0]


def test_sample_weights_are_found_by_name_path_and_nesting():
    none = nn.MSELoss(reduction="none")
    criterion = PathLossModule(
        {"a.b": Term(none, reduction="mean"), "a.c:x": Term(none, reduction="mean"), "d": nn.MSELoss()}
    )
    b, c, d, w = randn(4), randn(4), randn(4), torch.rand(4)
    zeros = torch.zeros(4)
    output, target = {"a": {"b": b, "c": c}, "d": d}, {"a": {"b": zeros, "c": zeros}, "d": zeros}
    by_hand = (w * b**2).mean() + (c**2).mean() + (d**2).mean()
    for given in ({"a.b": w}, {"a": {"b": w}}, {"a": {"b": w, "c": None}}):
        assert_same(criterion(output, target, sample_weight=given), by_hand, b, c, d)
    by_hand = (b**2).mean() + (w * c**2).mean() + (d**2).mean()
    for given in ({"a.c:x": w}, {"a.c": w}, {"a": {"c": w}}):
        assert_same(criterion(output, target, sample_weight=given), by_hand, b, c, d)


def test_a_pattern_takes_one_sample_weight_for_its_matches():
    criterion = PathLossModule({"aux.*": Term(nn.MSELoss(reduction="none"), reduction="mean")})
    x, w = [randn(4), randn(4)], torch.rand(4)
    loss = criterion({"aux": x}, {"aux": [torch.zeros(4)] * 2}, sample_weight={"aux.*": w})
    assert_same(loss, sum((w * a**2).mean() for a in x), *x)


def message(error, function, *args, **kwargs):
    with pytest.raises(error) as caught:
        function(*args, **kwargs)
    return str(caught.value)


def test_sample_weights_that_fit_no_term_raise():
    unreduced, reduced = nn.MSELoss(reduction="none"), nn.MSELoss()
    criterion = PathLossModule(
        {"x": Term(unreduced, reduction="mean"), "y": reduced, "z": Term(reduced, reduction="mean")}
    )
    tree = {name: torch.zeros(3) for name in "xyz"}

    def call(sample_weight):
        return message(ArgumentError, criterion, tree, tree, sample_weight=sample_weight)

    assert call({"xx": torch.ones(3)}) == (
        "A sample weight is given for 'xx', but there is no term 'xx'. The terms are 'x', 'y', 'z'. Did you mean 'x'?"
    )
    assert call({"x": 0.5}) == "The sample weight of 'x' must be a tensor, not a float."
    assert call({"y": torch.ones(3)}) == (
        "Term 'y': it has a sample weight but no reduction. "
        'Build its criterion with reduction="none" and wrap it as Term(criterion, reduction="mean").'
    )
    assert call(torch.ones(3)) == call({"y": torch.ones(3)})
    assert call({"z": torch.ones(3)}) == (
        "Term 'z': it has a sample weight, but its criterion reduces by itself. "
        'Build the criterion with reduction="none".'
    )
    assert call({"x": torch.ones(2)}) == (
        "Term 'x': its sample weight has shape (2,), but its criterion returned shape (3,). "
        "The first dimensions must agree."
    )


def test_every_problem_of_a_term_is_told_at_once():
    text = message(ConstructionError, Term, 3, weight=float("nan"), reduction="none", match="max")
    assert text == (
        "Term cannot be built:"
        "\n  1. 3 of type int is not callable."
        "\n  2. a weight must be finite, not nan."
        "\n  3. reduction must be one of None, 'mean', 'weighted_mean', 'sum', not 'none'."
        "\n  4. match must be one of 'sum', 'mean', not 'max'."
    )


def test_a_criterion_that_cannot_take_its_sources_is_refused_at_construction():
    def kl(latent: Tensor) -> Tensor:
        return latent.sum()

    assert message(ConstructionError, PathLossModule, {"latent": kl}) == (
        "PathLossModule cannot be built: Term 'latent': kl takes (latent: torch.Tensor) -> torch.Tensor and cannot be "
        "called with (Output('latent'), Target('latent')): too many positional arguments. "
        "Give its arguments as sources, as in Term(criterion, Output('x'))."
    )


def test_reprs_can_be_read():
    assert repr(Output("a.b")) == "Output('a.b')"
    assert repr(Shared(torch.sigmoid, Output("a"), 2)) == "Shared(sigmoid, Output('a'), 2)"
    term = Term(nn.MSELoss(reduction="none"), Output("a"), weight=2.0, reduction="mean", match="mean")
    assert repr(term) == "Term(MSELoss(), Output('a'), weight=2.0, reduction='mean', match='mean')"
    assert repr(Term(functools.partial(F.mse_loss, reduction="sum"))) == "Term(mse_loss)"


def test_sources_are_equal_by_tree_and_path():
    assert Output("a.b") == Output(("a", "b"))
    assert len({Output("a"), Output("a"), Target("a"), Input("a")}) == 3


def test_a_shared_computation_takes_keywords():
    x = randn(2, 3)
    softmax = Shared(torch.softmax, Output("x"), dim=1)
    assert repr(softmax) == "Shared(softmax, Output('x'), dim=1)"
    criterion = PathLossModule({"x": Term(nn.L1Loss(), softmax, torch.zeros(2, 3))})
    assert_same(criterion({"x": x}), x.softmax(1).abs().mean(), x)
    assert "<Tensor of shape (2, 3)>" in repr(criterion)
