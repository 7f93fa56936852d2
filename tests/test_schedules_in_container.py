"""Schedules and alternation in a container: the step, its state, absent phases, one graph for each."""

import copy
import io
import subprocess
import sys

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounter
from torch._subclasses.fake_tensor import FakeTensorMode

from torch_pathloss import ArgumentError, ConstructionError, PathLossModule, Term
from torch_pathloss.schedules import alternate, constant, linear

NAMES = ("a", "b")


def data(requires_grad=False):
    output = {name: torch.full((2,), float(i + 1), requires_grad=requires_grad) for i, name in enumerate(NAMES)}
    return output, {name: torch.zeros(2) for name in NAMES}


def scheduled(**keywords):
    return PathLossModule({name: nn.L1Loss() for name in NAMES}, weights={"b": linear(0.0, 1.0, steps=4)}, **keywords)


def phases(set_to_none=False, **keywords):
    weights = {
        "a": alternate(2, 1, set_to_none=set_to_none),
        "b": 3.0 * alternate(2, 1, phase=1, set_to_none=set_to_none),
    }
    return PathLossModule({name: nn.L1Loss() for name in NAMES}, weights=weights, **keywords)


def test_step_moves_the_weight_and_nothing_else_does():
    criterion = scheduled()
    totals = []
    for _ in range(6):
        criterion(*data())
        totals.append(criterion(*data()).item())
        criterion.step()
    assert totals == [1 + 2 * w for w in (0.0, 0.25, 0.5, 0.75, 1.0, 1.0)]
    assert criterion.weights.step.item() == 6


def test_a_schedule_is_given_in_the_term_or_set_later_and_any_function_is_one():
    criterion = PathLossModule({"a": Term(nn.L1Loss(), weight=lambda step: 1.0 / (1 + step)), "b": nn.L1Loss()})
    criterion.step()
    assert criterion.weights["a"].item() == 0.5
    criterion.weights["b"] = linear(1.0, 3.0, steps=2)
    assert criterion.weights["b"].item() == 2.0
    criterion.step()
    assert criterion.weights["b"].item() == 3.0
    assert list(criterion.weights.schedules) == ["a", "b"]


def test_a_number_for_a_scheduled_weight_is_refused_since_the_next_step_would_overwrite_it():
    criterion = scheduled()
    with pytest.raises(ArgumentError) as error:
        criterion.weights["b"] = 0.5
    assert str(error.value) == (
        "The weight of 'b' cannot be set to 0.5: it follows the schedule linear(0.0, 1.0, steps=4), "
        "which would overwrite it at the next step. Set another schedule, such as schedules.constant(0.5)."
    )
    with pytest.raises(ArgumentError):
        criterion.weights.update({"a": 2.0, "b": 0.5})
    assert criterion.weights["a"].item() == 1.0
    criterion.weights["b"] = constant(0.5)
    criterion.step()
    assert criterion.weights["b"].item() == 0.5


def test_a_schedule_that_gives_no_finite_number_is_refused_and_changes_nothing():
    with pytest.raises(ConstructionError) as built:
        PathLossModule({"a": nn.L1Loss()}, weights={"a": nothing})
    assert str(built.value) == (
        "PathLossModule cannot be built: The weight of 'a': the schedule nothing gave None of type NoneType at step 0. "
        "It must give a finite number."
    )
    criterion = PathLossModule({"a": nn.L1Loss(), "b": nn.L1Loss()}, weights={"a": until_two, "b": linear(0, 1, 2)})
    criterion.step()
    with pytest.raises(ArgumentError) as stepped:
        criterion.step()
    assert str(stepped.value) == (
        "The weight of 'a': the schedule until_two gave inf of type float at step 2. It must give a finite number."
    )
    assert criterion.weights.step.item() == 1
    assert criterion.weights["b"].item() == 0.5


def nothing(step):
    return None


def until_two(step):
    return 1.0 if step < 2 else float("inf")


def test_it_prints_weights_with_their_schedules():
    assert repr(scheduled()) == (
        "PathLossModule(\n"
        "  (a):  L1Loss()  weight 1                               Output('a'), Target('a')\n"
        "  (b):  L1Loss()  weight 0 by linear(0.0, 1.0, steps=4)  Output('b'), Target('b')\n"
        ")"
    )
    assert repr(scheduled().weights) == "Weights({'a': 1, 'b': 0 by linear(0.0, 1.0, steps=4)})"
    inactive = phases().explain(*data()).splitlines()[-1]
    assert inactive.endswith("absent: its schedule is in an inactive phase")


def test_the_step_is_saved_and_a_loaded_criterion_goes_on_as_if_never_stopped():
    criterion = phases()
    for _ in range(5):
        criterion.step()
    saved = io.BytesIO()
    torch.save(criterion.state_dict(), saved)
    saved.seek(0)
    loaded = phases()
    loaded.load_state_dict(torch.load(saved, weights_only=True))
    for other in (loaded, copy.deepcopy(criterion)):
        assert other.weights.inactive == criterion.weights.inactive == {"a": False}
        twin = copy.deepcopy(criterion)
        for _ in range(4):
            assert other.weights.value.tolist() == twin.weights.value.tolist()
            assert other.weights.step.item() == twin.weights.step.item()
            other.step()
            twin.step()


def test_a_checkpoint_of_other_terms_leaves_the_step_alone():
    criterion = scheduled()
    other = PathLossModule({"x": nn.L1Loss()})
    other.step()
    with pytest.raises(RuntimeError, match="The weights were saved for other terms"):
        criterion.load_state_dict(other.state_dict())
    assert criterion.weights.step.item() == 0


def test_an_inactive_term_is_not_computed_and_is_absent():
    calls = []

    def counted(output, target):
        calls.append(1)
        return (output - target).abs().mean()

    criterion = PathLossModule(
        {"a": counted, "b": nn.L1Loss()}, weights={"a": alternate(1, 2), "b": alternate(1, 2, phase=1)}
    )
    logs = []
    for _ in range(3):
        criterion(*data())
        logs.append(criterion.last.log())
        criterion.step()
    assert len(calls) == 1
    assert [log["total"] for log in logs] == [1.0, 2.0, 2.0]
    assert [str(log["terms/a"]) for log in logs] == ["1.0", "nan", "nan"]
    assert [str(log["terms/b"]) for log in logs] == ["nan", "2.0", "2.0"]
    assert [log["weights/b"] for log in logs] == [0.0, 1.0, 1.0]


def forward_and_backward(criterion, output, target):
    criterion(output, target).backward()


def backward(criterion, output, target):
    criterion.backward({name: leaf * 1 for name, leaf in output.items()}, target)


WAYS = [
    (forward_and_backward, False, None),
    (forward_and_backward, True, None),
    (backward, False, None),
    (forward_and_backward, False, "aot_eager"),
    (forward_and_backward, True, "aot_eager"),
    (backward, False, "aot_eager"),
]


@pytest.mark.parametrize("set_to_none", [False, True])
@pytest.mark.parametrize(("way", "grad_in_forward", "backend"), WAYS)
def test_the_outputs_of_an_inactive_term_get_zero_gradient_or_none_where_asked(
    way, grad_in_forward, backend, set_to_none
):
    torch._dynamo.reset()
    criterion = phases(set_to_none, grad_in_forward=grad_in_forward)
    if backend:
        criterion.compile(backend=backend)
    for step in range(4):
        output, target = data(requires_grad=True)
        way(criterion, output, target)
        active, inactive, weight = ("b", "a", 3.0) if step == 2 else ("a", "b", 1.0)
        assert output[active].grad.tolist() == [weight / 2] * 2
        if set_to_none:
            assert output[inactive].grad is None
        else:
            assert output[inactive].grad.tolist() == [0.0, 0.0]
        criterion.step()


def test_a_node_that_an_active_term_reads_too_gets_the_gradient_of_that_one():
    criterion = PathLossModule(
        {"a:one": nn.L1Loss(), "a:two": nn.L1Loss()}, weights={"a:two": alternate(1, 1, phase=1, set_to_none=True)}
    )
    output, target = data(requires_grad=True)
    criterion(output, target).backward()
    assert output["a"].grad.tolist() == [0.5, 0.5]


@pytest.mark.parametrize("way", [forward_and_backward, backward])
def test_forty_steps_of_a_schedule_are_one_graph_and_each_phase_is_at_most_one(way):
    for criterion, graphs in ((scheduled(), 1), (phases(), 2)):
        torch._dynamo.reset()
        counter = CompileCounter()
        criterion.compile(backend=counter)
        for _ in range(40):
            way(criterion, *data(requires_grad=True))
            criterion.step()
        assert counter.frame_count == graphs


def test_a_compiled_step_takes_the_scheduled_weight():
    torch._dynamo.reset()
    criterion = scheduled()
    compiled = torch.compile(criterion, backend="aot_eager", fullgraph=True)
    totals = []
    for _ in range(3):
        totals.append(compiled(*data()).item())
        criterion.step()
    assert totals == [1.0, 1.5, 2.0]


def test_step_reads_nothing_from_the_device():
    with FakeTensorMode():
        criterion = phases()
        for _ in range(3):
            criterion.step()
    assert criterion.weights.inactive == {"b": False}


EVERY_SCHEDULE = """
import sys, torch
from torch import nn
from torch_pathloss import PathLossModule
from torch_pathloss import schedules as s

def criterion():
    weights = [
        s.constant(0.3), s.linear(0.0, 1.0, 17, begin=2), s.cosine(2.0, 0.1, 13), s.exponential(1.0, 0.01, 19),
        s.piecewise({0: 0.5, 7: s.linear(0.0, 1.0, 5), 15: 3.0}), s.cyclical(20, cycles=3), s.one_cycle(1.0, 20),
        s.alternate(3, 2), 0.7 * s.alternate(3, 2, phase=1), s.by_epoch(s.cosine(1.0, 0.0, 4), 5),
        s.cosine(1.0, 0.0, 20) * s.cyclical(20) + 0.1, lambda step: 1.0 / (1 + step),
    ]
    return PathLossModule([nn.MSELoss() for _ in weights], weights=weights)

def train(module, parameter, steps):
    logs = []
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        parameter.grad = None
        target = [torch.rand(2, generator=generator) for _ in module.weights]
        module([parameter * (1 + i) for i in range(len(target))], target).backward()
        with torch.no_grad():
            parameter -= 0.01 * parameter.grad
        module.step()
        logs.append(module.last.record.clone())
    return torch.stack(logs)
"""

RESUME = """
state = torch.load(sys.argv[1], weights_only=True)
module, parameter = criterion(), nn.Parameter(state["parameter"])
module.load_state_dict(state["criterion"])
logs = train(module, parameter, range(10, 20))
torch.save({"logs": logs, "parameter": parameter.data, "weights": module.weights.value}, sys.argv[1])
"""


def test_every_schedule_goes_on_in_another_process_to_the_last_bit(tmp_path):
    made = {}
    exec(EVERY_SCHEDULE, made)
    straight, parameter = made["criterion"](), nn.Parameter(torch.zeros(2))
    logs = made["train"](straight, parameter, range(20))
    first, half = made["criterion"](), nn.Parameter(torch.zeros(2))
    made["train"](first, half, range(10))
    torch.save({"criterion": first.state_dict(), "parameter": half.data}, tmp_path / "state.pt")
    subprocess.run([sys.executable, "-c", EVERY_SCHEDULE + RESUME, tmp_path / "state.pt"], check=True)
    found = torch.load(tmp_path / "state.pt", weights_only=True)
    expected = {"logs": logs[10:], "parameter": parameter.data, "weights": straight.weights.value}
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    assert len({tuple(row) for row in logs[:, 12:24].T.tolist()}) == 12  # every schedule moves in its own way
