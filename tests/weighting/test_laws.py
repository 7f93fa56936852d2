"""Laws that hold for every weighting."""

import copy
import io
import pathlib
import pickle
import subprocess
import sys

import pytest
import torch
from _cases import CASES, NAMES, Training, assert_same_state, norms_of, seen_at, state_of, values_of
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode

every_weighting = pytest.mark.parametrize("case", CASES, ids=str)
ALL = torch.tensor([True, True, True])


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def trained(case, steps=6):
    training = Training(case)
    training.run(range(steps))
    training.optimizer.zero_grad()
    return training.weighting


@every_weighting
def test_a_step_of_training_changes_the_state_if_there_is_any(case):
    before, after = state_of(case.bound()), state_of(trained(case))
    assert not before or any(not torch.equal(before[key], after[key]) for key in before)


@every_weighting
def test_an_absent_term_leaves_its_statistics_alone(case):
    weighting = trained(case)
    before = state_of(weighting)
    seen = torch.tensor([True, False, True])
    for step in range(3):
        values = torch.where(seen, values_of(step), 0).requires_grad_()
        weighting(values, seen, None, norms_of(weighting, step))[0].backward()
        case.after(weighting, step, values.detach() / 2, seen)
    after = state_of(weighting)
    for key in before.keys() - set(case.records):
        if before[key].shape[-1:] == (3,):
            torch.testing.assert_close(after[key][..., 1], before[key][..., 1], rtol=0, atol=0, equal_nan=True)
    for parameter in weighting.parameters():
        assert parameter.grad[1] == 0


@every_weighting
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_a_value_that_is_not_finite_shows_in_the_total_and_counts_as_absent_in_the_statistics(case, value):
    totals, weightings = [], []
    for seen in (ALL, torch.tensor([True, False, True])):
        weighting = trained(case)
        values = values_of(99)
        values[1] = value if seen[1] else 0.0
        norms = norms_of(weighting, 99)
        if norms is not None and seen[1]:
            norms[1] = value
        total, _ = weighting(values.requires_grad_(), seen, None, norms)
        total.backward()
        totals.append(total)
        weightings.append(weighting)
    assert not totals[0].isfinite()
    assert totals[1].isfinite()
    assert_same_state(*weightings)
    for first, second in zip(*(weighting.parameters() for weighting in weightings), strict=True):
        torch.testing.assert_close(first.grad, second.grad, rtol=0, atol=0)


@every_weighting
@pytest.mark.parametrize("step", range(3))
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_the_effective_weights_are_the_derivative_of_the_total_by_the_values(case, step, dtype):
    weighting, seen = trained(case), seen_at(step)
    values = torch.where(seen, values_of(step, dtype), 0).requires_grad_()
    total, effective = weighting(values, seen, torch.tensor([1.0, 0.5, 2.0]), norms_of(weighting, step))
    (derivative,) = torch.autograd.grad(total, values)
    torch.testing.assert_close(effective, derivative, check_dtype=False)
    assert not effective.requires_grad
    assert effective[~seen].eq(0).all()
    assert effective[seen].gt(0).all()


@every_weighting
def test_a_weight_of_zero_takes_a_term_out(case):
    weighting, weights = trained(case), torch.tensor([1.0, 0.0, 1.0])
    values = values_of(3).requires_grad_()
    total, effective = weighting(values, ALL, weights, norms_of(weighting, 3))
    total.backward()
    assert effective[1] == 0
    assert values.grad[1] == 0
    for parameter in weighting.parameters():
        assert parameter.grad[1] == 0


@every_weighting
def test_where_nothing_is_seen_the_total_is_zero_with_zero_gradient(case):
    weighting = trained(case)
    values = torch.zeros(3, requires_grad=True)
    total, effective = weighting(values, ~ALL, None, norms_of(weighting, 0))
    total.backward()
    assert total == 0
    assert effective.eq(0).all()
    assert values.grad.eq(0).all()
    for parameter in weighting.parameters():
        assert parameter.grad.eq(0).all()


@every_weighting
@pytest.mark.parametrize("how", ["eval", "no_grad"])
def test_evaluation_changes_nothing(case, how):
    weighting = trained(case)
    before = copy.deepcopy(weighting)
    if how == "eval":
        weighting.eval()
    for step in range(3):
        with torch.set_grad_enabled(how == "eval"):
            weighting(values_of(step), seen_at(step), None, norms_of(weighting, step))
    assert_same_state(weighting, before)
    weighting.train()
    for module in (weighting, before):  # the next step is the one that it would have been
        module(values_of(5), ALL, None, norms_of(module, 5))[0].sum()
    assert_same_state(weighting, before)


@every_weighting
def test_a_resumed_training_is_the_same_to_the_last_bit(case):
    through, first, second = Training(case), Training(case), Training(case)
    expected = through.run(range(20))
    first.run(range(10))
    file = io.BytesIO()
    torch.save(first.state(), file)
    file.seek(0)
    second.load(torch.load(file, weights_only=True))
    found = second.run(range(10, 20))
    assert all(map(torch.equal, found, expected[10:]))
    assert torch.equal(second.model, through.model)
    assert_same_state(second.weighting, through.weighting)


@every_weighting
def test_forty_steps_are_one_graph_and_give_what_eager_steps_give(case):
    counter = CompileCounterWithBackend("aot_eager")
    eager = Training(case)
    compiled = Training(case, lambda weighting: torch.compile(weighting, backend=counter, fullgraph=True))
    with torch._dynamo.config.patch(error_on_recompile=True):
        found = compiled.run(range(40))
    assert counter.frame_count == 1
    torch.testing.assert_close(found, eager.run(range(40)))
    torch.testing.assert_close(state_of(compiled.weighting), state_of(eager.weighting), equal_nan=True)


@pytest.mark.slow  # a parameter, moments, integers; the others would add a minute
@pytest.mark.parametrize("name", ["Uncertainty", "FAMO", "RandomWeighting"])
def test_inductor_gives_what_eager_steps_give(name):
    (case,) = (case for case in CASES if case.name == name)
    eager, compiled = Training(case), Training(case, lambda weighting: torch.compile(weighting, fullgraph=True))
    torch.testing.assert_close(compiled.run(range(5)), eager.run(range(5)))
    torch.testing.assert_close(state_of(compiled.weighting), state_of(eager.weighting), equal_nan=True)
    torch.testing.assert_close(compiled.model, eager.model)


@every_weighting
def test_no_step_reads_from_the_device(case):
    weights = torch.tensor([1.0, 0.5, 2.0])
    with FakeTensorMode(allow_non_fake_inputs=True):  # which raises where a value would be read
        weighting = case.bound()
        for _ in range(3):
            values, seen = torch.rand(3, requires_grad=True), torch.rand(3) > 0.5
            norms = torch.rand(3) if weighting.uses_gradients else None
            total, _ = weighting(values, seen, weights, norms)
            total.backward()
            case.after(weighting, 0, values.detach(), seen)


@every_weighting
@pytest.mark.parametrize("twin", [copy.deepcopy, lambda module: pickle.loads(pickle.dumps(module))])
def test_a_copy_goes_on_by_itself(case, twin):
    weighting = trained(case)
    other = twin(weighting)
    assert_same_state(weighting, other)
    before = state_of(other)
    for step in range(4):
        weighting(values_of(step), ALL, None, norms_of(weighting, step))
    torch.testing.assert_close(state_of(other), before, equal_nan=True, rtol=0, atol=0)
    for step in range(4):
        other(values_of(step), ALL, None, norms_of(other, step))
    assert_same_state(weighting, other)


@every_weighting
def test_the_total_has_the_precision_of_the_values(case):
    weighting = trained(case)
    for dtype in (torch.float32, torch.float64):
        values = values_of(0, dtype).requires_grad_()
        total, _ = weighting(values, ALL, None, norms_of(weighting, 0))
        assert total.dtype is dtype
        assert total.ndim == 0
        total.backward()
        assert values.grad.dtype is dtype


@every_weighting
def test_state_in_double_precision_takes_float32_values(case):
    weighting = trained(case).double()
    total, _ = weighting(values_of(0).requires_grad_(), ALL, None, norms_of(weighting, 0))
    total.backward()
    assert total.isfinite()


@every_weighting
def test_a_cast_to_bfloat16_rounds_no_state(case):
    weighting = trained(case)
    before = state_of(weighting)
    weighting.to(torch.bfloat16)
    torch.testing.assert_close(state_of(weighting), before, rtol=0, atol=0, equal_nan=True)


@every_weighting
def test_the_state_of_other_terms_is_refused(case):
    saved = case.bound(["a", "b.c", "x"]).state_dict()
    weighting = trained(case)
    before = copy.deepcopy(weighting)
    with pytest.raises(RuntimeError, match=r"was saved for the terms \['a', 'b\.c', 'x'\]"):
        weighting.load_state_dict(saved)
    assert_same_state(weighting, before)


@pytest.fixture(scope="module")
def of_both_processes(tmp_path_factory):
    file = tmp_path_factory.mktemp("ranks") / "store"
    script = str(pathlib.Path(__file__).with_name("_processes.py"))
    processes = [
        subprocess.Popen([sys.executable, script, str(rank), str(file)], stderr=subprocess.PIPE, text=True)
        for rank in range(2)
    ]
    errors = [process.communicate(timeout=300)[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], "\n".join(errors)
    return [torch.load(f"{file}.{rank}", weights_only=True) for rank in range(2)]


@pytest.mark.slow
@every_weighting
def test_two_processes_with_other_values_and_absent_terms_keep_one_state(case, of_both_processes):
    first, second = (found[case.name] for found in of_both_processes)
    assert set(first["state"]) == set(state_of(case.bound()))
    torch.testing.assert_close(first["state"], second["state"], rtol=0, atol=0, equal_nan=True)
    for (mine, mine_seen), (theirs, theirs_seen) in zip(first["effective"], second["effective"], strict=True):
        both = mine_seen & theirs_seen
        if not case.normalizes or torch.equal(mine_seen, theirs_seen):
            assert torch.equal(mine[both], theirs[both])


def test_every_weighting_of_the_package_is_in_the_table():
    import torch_pathloss.weighting as package

    public = {name for name in package.__all__ if isinstance(getattr(package, name), type)}
    kinds = {name for name in public if issubclass(getattr(package, name), package.Weighting)}
    assert kinds - {"Weighting", "Factors", "Scalarizer"} == {type(case.make()).__name__ for case in CASES}
    assert len(NAMES) == 3
