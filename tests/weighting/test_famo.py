"""FAMO against TorchJD's, and by hand in numpy."""

import io

import numpy as np
import pytest
import torch
from torchjd import scalarization

from torch_pathloss import ConstructionError
from torch_pathloss.weighting import FAMO

ALL = torch.tensor([True, True, True])


def values_of(step):
    scale = torch.tensor([1.0, 30.0, 0.1])
    return (torch.rand(3, generator=torch.Generator().manual_seed(step)) + 0.2) * scale


def bound(*args, **kwargs):
    return FAMO(*args, **kwargs).bind(["a", "b", "c"])


@pytest.mark.parametrize("options", [{}, {"weight_decay": 0.01, "lr": 0.5}])
def test_it_learns_as_torchjd_does(options):
    minimum = {"b": 3.0}
    ours, theirs = bound(minimum, **options), scalarization.FAMO(3, torch.tensor([0.0, 3.0, 0.0]), **options)
    for step in range(30):
        values = [values_of(step).requires_grad_() for _ in range(2)]
        totals = [ours(values[0], ALL).total, theirs(values[1])]
        torch.testing.assert_close(*totals)
        for total in totals:
            total.backward()
        torch.testing.assert_close(values[0].grad, values[1].grad)
        ours.update(values_of(step + 500), ALL)
        theirs.update(values_of(step + 500))
        torch.testing.assert_close(ours.logits, theirs._w.data, rtol=1e-5, atol=1e-5)


def test_the_plain_step_is_the_algorithm_of_the_paper():
    weighting = bound(optimizer="sgd", lr=0.5, weight_decay=0.01)
    xi = np.zeros(3)
    for step in range(10):
        before, after = values_of(step).numpy() + 1e-8, values_of(step + 500).numpy() + 1e-8
        weighting(values_of(step).requires_grad_(), ALL)
        weighting.update(torch.tensor(after), ALL)
        z = np.exp(xi) / np.exp(xi).sum()
        jacobian = np.diag(z) - np.outer(z, z)
        xi = xi - 0.5 * (jacobian @ (np.log(before) - np.log(after)) + 0.01 * xi)
        np.testing.assert_allclose(weighting.logits.numpy(), xi, rtol=1e-4)


def test_a_term_that_is_absent_before_or_after_the_step_learns_nothing_and_does_not_disturb():
    ours, theirs = bound(), scalarization.FAMO(2)
    for step in range(9):
        third_before, third_after = step % 3 == 0, step % 3 == 1
        before, after = values_of(step), values_of(step + 500)
        before[2], after[2] = before[2] * third_before, after[2] * third_after
        _, effective = ours(before.requires_grad_(), torch.tensor([True, True, third_before]))
        theirs(before[:2].detach())
        ours.update(after, torch.tensor([True, True, third_after]))
        theirs.update(after[:2])
        torch.testing.assert_close(ours.logits, torch.cat([theirs._w.data, torch.zeros(1)]), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(effective.sum(), torch.tensor(1.0))


def test_weights_of_the_user_are_where_the_logits_start():
    weighting, weights = bound(), torch.tensor([1.0, 4.0, 2.0])
    theirs = scalarization.FAMO(3, weight_decay=0.0)
    ours = bound(weight_decay=0.0)
    with torch.no_grad():
        theirs._w.copy_(weights.log())
    for step in range(10):
        torch.testing.assert_close(ours(values_of(step).requires_grad_(), ALL, weights).total, theirs(values_of(step)))
        ours.update(values_of(step + 500), ALL)
        theirs.update(values_of(step + 500))
    torch.testing.assert_close(ours.logits + weights.log(), theirs._w.data, rtol=1e-5, atol=1e-5)
    # proportional to w_k / v_k
    np.testing.assert_allclose(weighting(torch.tensor([1.0, 2, 4]), ALL, weights).weights, [2 / 7, 4 / 7, 1 / 7])


def test_a_second_update_after_one_call_changes_nothing_and_neither_does_one_in_evaluation():
    weighting = bound()
    weighting.update(values_of(0), ALL)
    assert weighting.logits.tolist() == [0, 0, 0]
    weighting(values_of(0).requires_grad_(), ALL)
    weighting.eval().update(values_of(1), ALL)
    assert weighting.logits.tolist() == [0, 0, 0]
    weighting.train().update(values_of(1), ALL)
    logits = weighting.logits.clone()
    assert logits.ne(0).all()
    weighting.update(values_of(2), ALL)
    assert torch.equal(weighting.logits, logits)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -1.0])
def test_a_value_after_the_step_that_has_no_logarithm_is_left_out(value):
    first, second = bound(), bound()
    for weighting, seen in ((first, ALL), (second, torch.tensor([True, False, True]))):
        weighting(values_of(0).requires_grad_(), ALL)
        weighting.update(torch.tensor([0.5, value, 0.2]), seen)
    assert torch.equal(first.logits, second.logits)


def test_a_value_below_its_minimum_makes_the_total_nan_and_does_not_stay():
    weighting = bound(0.5)
    assert weighting(torch.tensor([1.0, 0.4, 1.0], requires_grad=True), ALL).total.isnan()
    weighting.update(torch.tensor([0.9, 0.6, 0.7]), ALL)
    assert weighting.logits.isfinite().all()
    assert weighting.logits[1] == 0


def test_a_training_resumes_between_the_call_and_the_update():
    through, saved, resumed = bound(), bound(), bound()
    for weighting in (through, saved):
        for step in range(3):
            weighting(values_of(step).requires_grad_(), ALL)
            if step < 2:
                weighting.update(values_of(step + 500), ALL)
    file = io.BytesIO()
    torch.save(saved.state_dict(), file)
    file.seek(0)
    resumed.load_state_dict(torch.load(file, weights_only=True))
    for weighting in (through, resumed):
        weighting.update(values_of(502), ALL)
    assert torch.equal(through.logits, resumed.logits)


def test_the_update_is_one_graph():
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    ours, eager = bound(), bound()
    update = torch.compile(ours.update, backend=counter, fullgraph=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for step in range(40):
            for weighting, learn in ((ours, update), (eager, eager.update)):
                weighting(values_of(step).requires_grad_(), ALL)
                learn(values_of(step + 500), torch.tensor([True, step % 2 == 0, True]))
    assert counter.frame_count == 1
    torch.testing.assert_close(ours.logits, eager.logits)
    torch._dynamo.reset()


def test_options_out_of_range_are_refused():
    with pytest.raises(ConstructionError) as error:
        FAMO({"a": torch.nan}, lr=-1.0, weight_decay=-0.1, optimizer="adamw")
    assert str(error.value) == (
        "FAMO cannot be built:"
        "\n  1. minimum must be finite, not nan."
        "\n  2. lr must be at least 0, not -1.0."
        "\n  3. weight_decay must be at least 0, not -0.1."
        "\n  4. optimizer must be one of 'adam', 'sgd', not 'adamw'."
    )
    with pytest.raises(ConstructionError, match=r"^FAMO does not fit the terms: minimum: There is no term 'x'\."):
        bound({"x": 0.0})
