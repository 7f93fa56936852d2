"""Under torch.compile and torch.export: one graph, no recompilation, the same values."""

from collections import OrderedDict

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._dynamo.testing import CompileCounter

from torch_pathloss import Input, Output, PathLossModule, Shared, Target, Term


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def randn(*shape):
    return torch.randn(*shape, requires_grad=True)


def dice(probability, target):
    return 1 - 2 * (probability * target).sum() / (probability.sum() + target.sum())


def criterion():
    """Terms of every kind: subtree, label, pattern, shared computation, reduction, input, constant, absent."""
    probability = Shared(torch.sigmoid, Output("mask"))
    return PathLossModule(
        {
            "label": nn.CrossEntropyLoss(),
            "detection": lambda output, target: (output["bbox"] - target["bbox"]).abs().mean(),
            "detection.bbox": nn.SmoothL1Loss(),
            "mask:dice": Term(dice, probability, Target("mask")),
            "mask:mse": Term(nn.MSELoss(), probability, Target("mask")),
            "aux.*": Term(nn.CrossEntropyLoss(), target=Target("label"), match="mean"),
            "score": Term(nn.MSELoss(reduction="none"), reduction="mean"),
            "scaled": Term(
                lambda x, factor, w: (x * factor * w).sum(), Output("score"), Input("factor"), torch.ones(1)
            ),
            "off": nn.MSELoss(),
        },
        weights={"detection.bbox": 5.0},
    )


def data(batch=4, aux=2):
    output = {
        "label": randn(batch, 3),
        "detection": {"bbox": randn(batch, 4)},
        "mask": randn(batch, 5),
        "aux": [randn(batch, 3) for _ in range(aux)],
        "score": randn(batch),
        "off": randn(2),
    }
    target = {
        "label": torch.randint(3, (batch,)),
        "detection": {"bbox": torch.randn(batch, 4)},
        "mask": torch.rand(batch, 5),
        "score": torch.randn(batch),
        "off": None,
    }
    return output, target, {"factor": torch.rand(batch)}, {"score": torch.rand(batch)}


def grads(loss, output):
    leaves = [leaf for leaf in torch.utils._pytree.tree_leaves(output) if leaf.requires_grad]
    return torch.autograd.grad(loss, leaves)


def assert_as_eager(compiled, module, sample):
    output, target, input, sample_weight = sample
    ours = compiled(output, target, input=input, sample_weight=sample_weight)
    logged = module.last.log()
    theirs = module(output, target, input=input, sample_weight=sample_weight)
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(logged, module.last.log(), equal_nan=True, rtol=1e-5, atol=1e-6)
    for a, b in zip(grads(ours, output), grads(theirs, output), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("warm", [False, True], ids=["cold", "after eager calls, explain and check"])
def test_every_kind_of_term_is_one_graph(warm):
    module, sample = criterion(), data()
    output, target, input, sample_weight = sample
    if warm:
        module(output, target, input=input, sample_weight=sample_weight)
        module.explain(output, target, input=input)
        module.check(output, target, input=input, sample_weight=sample_weight)
    counter = CompileCounter()
    compiled = torch.compile(module, backend=counter, fullgraph=True)
    assert_as_eager(compiled, module, sample)
    assert counter.frame_count == 1


@pytest.mark.slow
def test_inductor_gives_the_same_values_and_gradients():
    module = criterion()
    compiled = torch.compile(module, fullgraph=True)
    for sample in (data(), data(aux=0)):
        assert_as_eager(compiled, module, sample)


def test_a_weight_changed_a_thousand_times_compiles_nothing_again():
    module = PathLossModule({"a": nn.MSELoss(), "b": nn.L1Loss()})
    counter = CompileCounter()
    compiled = torch.compile(module, backend=counter, fullgraph=True)
    output, target = {"a": torch.ones(3), "b": torch.ones(3)}, {"a": torch.zeros(3), "b": torch.zeros(3)}
    for step in range(1000):
        module.weights["a"] = step / 8
        assert compiled(output, target).item() == step / 8 + 1
    assert counter.frame_count == 1


def test_eight_batch_sizes_need_at_most_two_graphs():
    module = criterion()
    counter = CompileCounter()
    compiled = torch.compile(module, backend=counter, fullgraph=True)
    for batch in range(3, 11):
        assert_as_eager(compiled, module, data(batch))
    assert counter.frame_count <= 2


def test_training_and_evaluation_work_in_one_compiled_criterion():
    module = PathLossModule({"a": nn.MSELoss()})
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
    a = randn(3)
    compiled({"a": a}, {"a": torch.zeros(3)}).backward()
    with torch.no_grad():
        assert compiled({"a": a}, {"a": torch.zeros(3)}).item() == F.mse_loss(a, torch.zeros(3)).item()


def test_the_whole_step_compiles_with_the_model():
    model, module = nn.Linear(4, 3), PathLossModule({"x": nn.CrossEntropyLoss(), "y": nn.MSELoss()})
    counter = CompileCounter()

    @torch.compile(backend=counter, fullgraph=True)
    def step(batch, label):
        x = model(batch)
        return module({"x": x, "y": x}, {"x": label, "y": torch.zeros_like(x)})

    loss = step(torch.randn(5, 4), torch.randint(3, (5,)))
    loss.backward()
    assert model.weight.grad is not None
    assert counter.frame_count == 1
    assert module.last.total == loss.detach()


def test_other_mappings_trace(subtests):
    module = PathLossModule({"a.0": nn.MSELoss(), "b": nn.MSELoss()})
    x, y = randn(2), randn(2)
    for mapping in (dict, OrderedDict):
        with subtests.test(mapping=mapping.__name__):
            compiled = torch.compile(module, backend="eager", fullgraph=True)
            output = mapping(a=(x,), b=y)
            loss = compiled(output, mapping(a=[torch.zeros(2)], b=torch.zeros(2)))
            torch.testing.assert_close(loss, (x**2).mean() + (y**2).mean())


def test_coverage_may_be_asked_for_in_compiled_code():
    for uncovered in ("warn", "error"):
        module = PathLossModule({"a": nn.MSELoss()}, uncovered=uncovered)
        compiled = torch.compile(module, backend="eager", fullgraph=True)
        assert compiled({"a": torch.ones(2)}, {"a": torch.zeros(2)}).item() == 1


def test_uncovered_error_fails_in_compiled_code_too():
    module = PathLossModule({"a": nn.MSELoss()}, uncovered="error")
    compiled = torch.compile(module, backend="eager", fullgraph=True)
    with pytest.raises(Exception, match="UncoveredError"):
        compiled({"a": torch.ones(2), "b": torch.ones(2)}, {"a": torch.zeros(2)})


@pytest.mark.parametrize("strict", [False, True])
def test_export_gives_the_same_values(strict):
    module, (output, target, input, sample_weight) = criterion(), data()
    keywords = {"input": input, "sample_weight": sample_weight}
    program = torch.export.export(module, (output, target), keywords, strict=strict)
    torch.testing.assert_close(program.module()(output, target, **keywords), module(output, target, **keywords))


def test_nothing_in_a_training_loop_reads_from_the_device_but_the_log():
    with torch._subclasses.fake_tensor.FakeTensorMode():  # a read of a value raises
        module, (output, target, input, sample_weight) = criterion(), data()
        module(output, target, input=input, sample_weight=sample_weight).backward()
        module.weights["label"] = 0.5
        module.weights["label"] = torch.ones(())
        module.weights.update({"label": 2.0, "off": torch.ones(())})
        module.step()
        module.terms(output, target, input=input, sample_weight=sample_weight)
        module.output_gradients(output, target, input=input, sample_weight=sample_weight)
        module.backward(output, target, input=input, sample_weight=sample_weight)
        last = module.last
        assert last.total.shape == last.values["label"].shape == last.weights["label"].shape == ()
        assert last.present["off"].shape == ()
        with pytest.raises(torch._subclasses.fake_tensor.DataDependentOutputException):
            module.last.log()
