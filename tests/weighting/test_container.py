"""Weightings in a container: every way to the gradients, absent terms, one graph, resume in another process."""

import pathlib
import subprocess
import sys

import pytest
import torch
from _cases import CASES, assert_same_state, state_of
from _container import Heads, criterion_of, train
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torchjd import scalarization

from torch_pathloss import ArgumentError, CheckError, ConstructionError, CriterionReturnError, Input, PathLossModule
from torch_pathloss.weighting import FAMO, GradNorm, OutputBalancer, Uncertainty, Weighted, WeightedSum, Weighting

every_weighting = pytest.mark.parametrize("case", CASES, ids=str)
ONE_OF_EACH = list({type(case.make()): case for case in CASES}.values())


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def trained(case, steps=5, **keywords):
    heads, criterion, logs = train(case, range(steps), **keywords)
    return {
        "logs": logs,
        "model": dict(heads.named_parameters()),
        "criterion": dict(criterion.named_parameters()),
        "weighting": state_of(criterion.weighting),
    }


@every_weighting
@pytest.mark.parametrize("how", ["backward", "grad_in_forward"])
def test_every_way_to_the_gradients_is_the_same_training(case, how):
    torch.testing.assert_close(trained(case, how=how), trained(case), equal_nan=True)


@every_weighting
def test_the_total_and_its_gradients_are_those_of_the_weighting_called_by_hand(case):
    criterion, twin = criterion_of(case), criterion_of(case)
    weighting = twin.weighting
    x = torch.tensor([0.5, 2.0, 3.0], requires_grad=True)
    y = x.detach().clone().requires_grad_()

    def output(z):
        return {"a": z[:1], "b": {"c": z[1:2]}, "d": [z[2:]]}

    target = {"a": torch.zeros(1), "b": {"c": torch.zeros(1)}, "d": [torch.zeros(1)]}
    loss = criterion(output(x), target)
    loss.backward()
    values = torch.stack([y[0] ** 2, y[1].abs(), y[2] ** 2])
    norms = torch.tensor([1.0, 1.0, 6.0]) if weighting.uses_gradients else None  # |2 y_0|, |sign y_1|, |2 y_2|
    total, effective = weighting(values, torch.ones(3, dtype=torch.bool), torch.tensor([1.0, 0.5, 2.0]), norms)
    total.backward()
    torch.testing.assert_close(loss, total)
    torch.testing.assert_close(x.grad, y.grad)
    torch.testing.assert_close(torch.stack(list(criterion.last.weights.values())), effective)
    for mine, theirs in zip(criterion.weighting.parameters(), weighting.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad)
    assert_same_state(criterion.weighting, weighting)


@every_weighting
def test_absent_terms_and_empty_selections_are_not_seen(case):
    criterion = criterion_of(case, where=Input("use"))
    x = torch.tensor([0.5, 2.0, 3.0], requires_grad=True)
    output = {"a": x[:1], "b": {"c": x[1:2]}, "d": [x[2:]]}
    target = {"a": torch.zeros(1), "b": {"c": None}, "d": [torch.zeros(1)]}
    loss = criterion(output, target, input={"use": torch.tensor(False)})
    loss.backward()
    assert {name: seen.item() for name, seen in criterion.last.present.items()} == {
        "a": False,
        "b.c": False,
        "d.*": True,
    }
    assert criterion.last.weights["a"] == 0
    assert criterion.last.weights["b.c"] == 0
    assert criterion.last.weights["d.*"] > 0
    assert x.grad[:2].tolist() == [0.0, 0.0]
    assert x.grad[2] > 0


@pytest.mark.parametrize("case", ONE_OF_EACH, ids=str)
@pytest.mark.parametrize("how", ["compiled", "compiled backward"])
def test_forty_steps_are_one_graph_and_the_same_training(case, how):
    counter = CompileCounterWithBackend("aot_eager")
    with torch._dynamo.config.patch(error_on_recompile=True):
        found = trained(case, 40, how=how, backend=counter)
    assert counter.frame_count == 1
    torch.testing.assert_close(found, trained(case, 40), equal_nan=True, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("case", ONE_OF_EACH, ids=str)
@pytest.mark.parametrize("grad_in_forward", [False, True])
def test_compiled_gradients_are_those_of_the_weights_of_the_same_step(case, grad_in_forward):
    """Torch's partitioner computes again in backward what is cheap, from state that forward has changed since."""
    criterion = criterion_of(case, grad_in_forward=grad_in_forward)
    criterion.compile(backend="aot_eager")
    for step in range(4):
        x = (torch.tensor([1.0, 2.0, 3.0]) * 3.0 ** ((step * torch.arange(3)) % 4)).requires_grad_()
        output = {"a": x[:1], "b": {"c": x[1:2]}, "d": [x[2:]]}
        with torch._dynamo.config.patch(trace_autograd_ops=True):
            criterion(output, {"a": torch.zeros(1), "b": {"c": torch.zeros(1)}, "d": [torch.zeros(1)]}).backward()
        derivative = torch.stack([2 * x[0], torch.ones(()), 2 * x[2]]).detach()
        torch.testing.assert_close(x.grad, torch.stack(list(criterion.last.weights.values())) * derivative)


def test_a_memory_budget_by_which_backward_computes_the_weights_again_is_refused():
    case = next(case for case in CASES if str(case) == "EMANormalized")
    criterion = criterion_of(case)
    criterion.compile(backend="aot_eager")
    x = torch.ones(3, requires_grad=True)
    output = {"a": x[:1], "b": {"c": x[1:2]}, "d": [x[2:]]}
    target = {"a": torch.zeros(1), "b": {"c": torch.zeros(1)}, "d": [torch.zeros(1)]}
    with (
        torch._functorch.config.patch(activation_memory_budget=0.0),
        pytest.raises(Exception, match="activation_memory_budget below 1"),
    ):
        criterion(output, target)


@pytest.mark.parametrize("case", [case for case in ONE_OF_EACH if case.make().uses_gradients], ids=str)
def test_gradients_of_terms_are_traced_without_the_flag_of_dynamo(case):
    found = trained(case, how="compiled by torch", backend="aot_eager")
    torch.testing.assert_close(found, trained(case), equal_nan=True)


@pytest.fixture(scope="module")
def continued(tmp_path_factory):
    """Ten steps of every weighting, saved; the next ten in a new process."""
    folder = tmp_path_factory.mktemp("resume")
    for number, case in enumerate(CASES):
        train(case, range(10), save=folder / f"{number}.pt")
    script = str(pathlib.Path(__file__).with_name("_container.py"))
    subprocess.run([sys.executable, script, str(folder)], check=True, capture_output=True, text=True)
    return folder


@pytest.mark.slow
@every_weighting
def test_a_training_that_goes_on_in_another_process_is_the_same_to_the_last_bit(case, continued):
    found = torch.load(continued / f"{CASES.index(case)}.pt.resumed", weights_only=True)
    heads, criterion, logs = train(case, range(20))
    expected = {"logs": logs[10:], "model": heads.state_dict(), "criterion": criterion.state_dict()}
    torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize(
    "make",
    [
        scalarization.GeometricMean,
        scalarization.Mean,
        lambda: scalarization.STCH(mu=0.5),
        lambda: scalarization.UW(2),
    ],
)
def test_a_scalarizer_of_torchjd_is_accepted_as_it_is(make):
    torch.manual_seed(0)
    rule = make()
    criterion = PathLossModule({"a": nn.MSELoss(), "b": nn.L1Loss()}, weights={"b": 3.0}, weighting=rule)
    output = {name: torch.randn(4, requires_grad=True) for name in "ab"}
    target = {name: torch.randn(4) for name in "ab"}
    values = torch.stack(
        [nn.functional.mse_loss(output["a"], target["a"]), 3 * nn.functional.l1_loss(output["b"], target["b"])]
    )
    expected = rule(values)
    gradients = torch.autograd.grad(expected, [*output.values()])
    for way in ("forward", "backward"):
        if way == "forward":
            loss = criterion(output, target)
            found = torch.autograd.grad(loss, [*output.values()])
        else:
            for leaf in output.values():
                leaf.grad = None
            loss = criterion.backward({name: leaf * 1 for name, leaf in output.items()}, target)
            found = [leaf.grad for leaf in output.values()]
        torch.testing.assert_close(loss.detach(), expected.detach())
        torch.testing.assert_close(list(found), list(gradients))
    (derivative,) = torch.autograd.grad(rule(cut := values.detach().requires_grad_()), cut)
    recorded = torch.stack(list(criterion.last.weights.values()))
    torch.testing.assert_close(recorded, derivative * torch.tensor([1.0, 3.0]))


def both(present=True):
    output = {"a": torch.ones(2, requires_grad=True), "b": torch.ones(2, requires_grad=True)}
    return output, {"a": torch.zeros(2), "b": torch.zeros(2) if present else None}


def largest(values: Tensor) -> Tensor:
    return values.amax()


def test_a_function_is_a_weighting_and_is_told_of_no_absent_term():
    criterion = PathLossModule({"a": nn.L1Loss(), "b": nn.L1Loss()}, weights={"b": 3.0}, weighting=largest)
    assert criterion(*both()).item() == 3.0
    message = (
        "The weighting largest needs every term, but 'b' is absent or may be (where=). "
        "Use a weighting of torch_pathloss.weighting, which leaves absent terms out."
    )
    with pytest.raises(ArgumentError) as error:
        criterion(*both(present=False))
    assert str(error.value) == message
    with pytest.raises(CheckError, match="needs every term, but 'b' is absent"):
        criterion.check(*both(present=False))


def test_what_a_function_returns_must_be_a_scalar():
    criterion = PathLossModule({"a": nn.L1Loss(), "b": nn.L1Loss()}, weighting=square)
    with pytest.raises(CriterionReturnError) as error:
        criterion(*both())
    assert str(error.value) == "The weighting square returned a tensor of shape (2,), not a scalar."


def square(values: Tensor) -> Tensor:
    return values**2


def test_what_is_no_weighting_is_refused():
    with pytest.raises(ConstructionError) as error:
        PathLossModule({"a": nn.L1Loss()}, weighting="famo")
    assert str(error.value) == (
        "weighting= must be a weighting or a function [K] values -> scalar: 'famo' of type str is not callable."
    )
    with pytest.raises(ConstructionError, match=r"FAMO is a class. Did you mean FAMO\(\)\?"):
        PathLossModule({"a": nn.L1Loss()}, weighting=FAMO)


def test_a_weighting_belongs_to_one_criterion():
    weighting = WeightedSum()
    PathLossModule({"a": nn.L1Loss(), "b": nn.L1Loss()}, weighting=weighting)
    with pytest.raises(ConstructionError) as error:
        PathLossModule({"c": nn.L1Loss()}, weighting=weighting)
    assert str(error.value) == (
        "This WeightedSum keeps the state of the terms 'a', 'b' already. Make one weighting for each criterion."
    )


def test_a_weighting_that_uses_gradients_may_have_no_parameters():
    class Trained(Weighting):
        uses_gradients = True

        def setup(self, names):
            self.factor = nn.Parameter(torch.ones(len(names)))

        def forward(self, values, seen, weights=None, norms=None):
            return Weighted((self.factor * values).sum(), self.factor.detach())

    with pytest.raises(ConstructionError) as error:
        PathLossModule({"a": nn.L1Loss()}, weighting=Trained())
    assert str(error.value) == (
        "The weighting Trained uses gradients and has parameters, which would get none. Keep its state in buffers."
    )


def test_update_is_refused_where_the_weighting_does_not_use_it():
    for weighting, found in ((None, "there is none"), (WeightedSum(), "this one is WeightedSum")):
        criterion = PathLossModule({"a": nn.L1Loss(), "b": nn.L1Loss()}, weighting=weighting)
        with pytest.raises(ArgumentError) as error:
            criterion.update(*both())
        assert str(error.value) == (
            f"update() is for a weighting that uses the values after the step, such as FAMO, but {found}. "
            "Leave the call out."
        )


def test_the_weighting_is_printed_and_its_parameters_are_missed_in_the_optimizer():
    criterion = PathLossModule({"a": nn.L1Loss(), "b": nn.L1Loss()}, weighting=Uncertainty())
    assert "(weighting):  Uncertainty(" in repr(criterion)
    with pytest.raises(CheckError, match=r"'weighting\.log_variance'"):
        criterion.check_optimizer(torch.optim.SGD(nn.Linear(1, 1).parameters()))


@pytest.mark.parametrize("weighting", [GradNorm, OutputBalancer])
def test_norms_are_taken_at_a_feature_of_the_model(weighting):
    torch.manual_seed(0)
    heads, x = Heads(), torch.randn(6, 3)
    target = {"a": torch.randn(6, 2), "b": {"c": torch.randn(6, 1)}}
    criterion = PathLossModule({"a": nn.MSELoss(), "b.c": nn.L1Loss()}, weighting=weighting(feature="feature"))
    output = heads(x)
    criterion(output, target).backward()
    again = heads(x)
    feature = again["feature"]
    terms = [nn.functional.mse_loss(again["a"], target["a"]), nn.functional.l1_loss(again["b"]["c"], target["b"]["c"])]
    norms = torch.stack([torch.autograd.grad(term, feature, retain_graph=True)[0].norm() for term in terms])
    oracle = weighting().bind(["a", "b.c"])
    oracle(torch.stack(terms).detach(), torch.tensor([True, True]), torch.ones(2), norms)
    torch.testing.assert_close(state_of(criterion.weighting), state_of(oracle))
    with pytest.raises(ArgumentError) as error:
        criterion({**output, "feature": torch.ones(2)}, target)
    assert str(error.value) == (
        f"The weighting {weighting.__name__} takes the norms of gradients at 'feature' of the output, "
        "but that is a tensor without gradient. It must be a tensor of the model's graph."
    )
    with pytest.raises(Exception, match="whose graph is not part of what is compiled"):
        criterion.compile()


@pytest.mark.parametrize("weighting", [GradNorm, OutputBalancer])
def test_in_evaluation_no_gradients_of_terms_are_computed_and_it_can_be_exported(weighting):
    criterion = PathLossModule({"a": nn.L1Loss(), "b": nn.MSELoss()}, weighting=weighting())
    output, target = both()
    for _ in range(3):
        criterion(output, target).backward()
    before = state_of(criterion.weighting)
    criterion.eval()
    expected = criterion(output, target)
    assert expected.grad_fn.name() != "GradientInForwardBackward"
    exported = torch.export.export(criterion, (output, target)).module()
    torch.testing.assert_close(exported(output, target), expected)
    torch.testing.assert_close(state_of(criterion.weighting), before, rtol=0, atol=0)
