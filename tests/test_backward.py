"""Laws of the backward pass: every way gives what ``criterion(output, target).backward()`` gives."""

from __future__ import annotations

import copy
import functools
import warnings
from typing import Any

import pytest
import torch
from _laws import CASES, Case
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter
from torch.utils._pytree import tree_leaves, tree_map

from torch_pathloss import (
    ArgumentError,
    CompileError,
    Input,
    Output,
    PathLossModule,
    PathNotFoundError,
    Shared,
    Target,
    Term,
)
from torch_pathloss import _compile as how


def model_of(output: Any) -> Any:
    """Returns the output behind one more operation, as a model's is, so that gradients arrive at its inputs."""
    done: dict[int, Tensor] = {}

    def behind(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor) or not leaf.requires_grad:
            return leaf
        return done.setdefault(id(leaf), leaf * 1)  # one tensor at two places stays one

    return tree_map(behind, output)


def inputs_of(output: Any, module: nn.Module) -> list[Tensor]:
    leaves = [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor) and leaf.requires_grad]
    return list(
        dict.fromkeys([*(leaf._base if leaf._base is not None else leaf for leaf in leaves), *module.parameters()])
    )


def taken(inputs: list[Tensor]) -> list[Tensor | None]:
    """Returns the gradients that have arrived, and clears them."""
    found = [None if tensor.grad is None else tensor.grad.clone() for tensor in inputs]
    for tensor in inputs:
        tensor.grad = None
    return found


def assert_same(ours: Any, theirs: Any, **tolerance: float) -> None:
    for a, b in zip(ours, theirs, strict=True):
        if a is None or b is None:
            assert a is b
        else:
            torch.testing.assert_close(a, b, **tolerance)


def by_call(case: Case, dtype: torch.dtype = torch.float32):
    """Returns a case with its total and gradients as ``criterion(output, target).backward()`` gives them."""
    torch.manual_seed(0)
    module, output, target, keywords = case.make(dtype)
    inputs = inputs_of(output, module)
    for tensor in inputs:
        tensor.retain_grad()
    loss = module(model_of(output), target, **keywords)
    loss.backward()
    return module, output, target, keywords, inputs, loss.detach(), taken(inputs), module.last.log()


COMPILED = pytest.mark.parametrize("case", [case for case in CASES if case.compiles], ids=str)
ALL = pytest.mark.parametrize("case", CASES, ids=str)
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)


@ALL
@DTYPES
@pytest.mark.parametrize("consume", [False, True], ids=["", "consume"])
def test_backward_gives_the_same_total_gradients_and_record(case, dtype, consume):
    module, output, target, keywords, inputs, total, gradients, logged = by_call(case, dtype)
    ours = module.backward(model_of(output), target, **keywords, consume=consume)
    assert not ours.requires_grad
    torch.testing.assert_close(ours, total)
    assert_same(taken(inputs), gradients)
    torch.testing.assert_close(module.last.log(), logged, equal_nan=True)


@ALL
def test_a_second_backward_accumulates_and_scale_multiplies(case):
    module, output, target, keywords, inputs, total, gradients, _ = by_call(case)
    module.backward(model_of(output), target, **keywords)
    ours = module.backward(model_of(output), target, **keywords, scale=torch.tensor(2.0))
    torch.testing.assert_close(ours, total)
    assert_same(taken(inputs), [None if g is None else 3 * g for g in gradients])
    module.backward(model_of(output), target, **keywords, scale=0.5)
    assert_same(taken(inputs), [None if g is None else 0.5 * g for g in gradients])


@ALL
@DTYPES
def test_value_and_grad_gives_the_gradients_at_the_leaves_and_touches_nothing(case, dtype):
    module, output, target, keywords, inputs, total, _, logged = by_call(case, dtype)
    leaves = [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor) and leaf.requires_grad]
    loss = module(output, target, **keywords)
    expected = dict(zip(map(id, leaves), torch.autograd.grad(loss, leaves, allow_unused=True), strict=True))
    ours, tree = module.value_and_grad(output, target, **keywords)
    assert not ours.requires_grad
    torch.testing.assert_close(ours, total)
    assert taken(inputs) == [None] * len(inputs)
    torch.testing.assert_close(module.last.log(), logged, equal_nan=True)
    merged: dict[int, Tensor | None] = dict.fromkeys(expected)  # a tensor at two places has two gradients
    for leaf, gradient in zip(flat(output), flat(tree), strict=True):
        if id(leaf) in merged and gradient is not None:
            sofar = merged[id(leaf)]
            merged[id(leaf)] = gradient if sofar is None else sofar + gradient
        elif not isinstance(leaf, Tensor) or not leaf.is_floating_point():
            assert gradient is None
    assert_same(merged.values(), expected.values())


@ALL
@DTYPES
def test_grad_in_forward_gives_the_same_under_any_incoming_gradient(case, dtype):
    module, output, target, keywords, inputs, total, gradients, logged = by_call(case, dtype)
    module._grad_in_forward = True
    loss = module(model_of(output), target, **keywords)
    torch.testing.assert_close(loss.detach(), total)
    torch.testing.assert_close(module.last.log(), logged, equal_nan=True)
    (0.5 * loss).backward(retain_graph=True)
    assert_same(taken(inputs), [None if g is None else 0.5 * g for g in gradients])
    loss.backward()
    assert_same(taken(inputs), gradients)


@ALL
def test_output_gradients_add_up_to_the_gradients_of_the_total(case):
    module, output, target, keywords, _, _, _, _ = by_call(case)
    _, tree = module.value_and_grad(output, target, **keywords)
    terms = module.output_gradients(output, target, **keywords)
    assert list(terms) == list(module.weights)
    summed: list[Any] = [None] * len(flat(tree))
    for name, gradients in terms.items():
        for position, gradient in enumerate(flat(gradients)):
            if gradient is not None:
                weighted = module.weights[name] * gradient
                summed[position] = weighted if summed[position] is None else summed[position] + weighted
    assert_same(summed, flat(tree))


@ALL
def test_gradcheck_holds_for_the_call_and_for_grad_in_forward(case):
    torch.manual_seed(0)
    module, output, target, keywords = case.make(torch.float64)
    module.double()  # weights in float64
    leaves = [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor) and leaf.requires_grad]
    leaves = list(dict.fromkeys(leaves))
    bases = [leaf.detach().clone().requires_grad_() for leaf in leaves]
    places = {id(leaf): position for position, leaf in enumerate(leaves)}

    def total(*tensors: Tensor) -> Tensor:
        tree = tree_map(lambda leaf: tensors[places[id(leaf)]] if id(leaf) in places else leaf, output)
        return module(tree, target, **keywords)

    assert torch.autograd.gradcheck(total, bases)
    module._grad_in_forward = True
    assert torch.autograd.gradcheck(total, bases)


def ways(module: PathLossModule, target: Any, keywords: dict[str, Any]) -> dict[str, Any]:
    """Returns the ways from an output to gradients in the model that `compile` compiles."""
    return {
        "call": lambda output: module(output, target, **keywords).backward(),
        "backward": lambda output: module.backward(output, target, **keywords),
        "backward with consume": lambda output: module.backward(output, target, **keywords, consume=True),
        "scaled": lambda output: module.backward(output, target, **keywords, scale=torch.tensor(1.0)),
    }


def assert_compiled_law(case: Case, backend: str, grad_in_forward: bool) -> None:
    torch._dynamo.reset()
    module, output, target, keywords, inputs, total, gradients, logged = by_call(case)
    module._grad_in_forward = grad_in_forward
    module.compile(backend=backend)
    for run in ways(module, target, keywords).values():
        run(model_of(output))
        assert_same(taken(inputs), gradients)
        torch.testing.assert_close(module.last.log(), logged, equal_nan=True, rtol=1e-5, atol=1e-6)
    ours, tree = module.value_and_grad(output, target, **keywords)
    torch.testing.assert_close(ours, total)
    module._compiled_pass = None
    _, expected = module.value_and_grad(output, target, **keywords)
    assert_same(flat(tree), flat(expected))


def flat(tree: Any) -> list[Any]:
    return tree_leaves(tree, is_leaf=lambda leaf: leaf is None)


@COMPILED
@pytest.mark.parametrize("grad_in_forward", [False, True], ids=["", "grad_in_forward"])
def test_compiled_every_way_gives_the_same(case, grad_in_forward):
    assert_compiled_law(case, "aot_eager", grad_in_forward)


@COMPILED
@pytest.mark.slow
def test_compiled_with_inductor_every_way_gives_the_same(case):
    assert_compiled_law(case, "inductor", grad_in_forward=False)


@COMPILED
def test_value_and_grad_traces_in_the_caller_s_graph_without_any_flag(case):
    torch._dynamo.reset()
    module, output, target, keywords, _, total, _, logged = by_call(case)
    expected = module.value_and_grad(output, target, **keywords)[1]
    step = torch.compile(functools.partial(module.value_and_grad, **keywords), backend="aot_eager", fullgraph=True)
    if list(module.parameters()):
        for parameter in module.parameters():
            parameter.requires_grad_(False)
    ours, tree = step(output, target)
    torch.testing.assert_close(ours, total)
    torch.testing.assert_close(module.last.log(), logged, equal_nan=True, rtol=1e-5, atol=1e-6)
    for a, b in zip(flat(tree), flat(expected), strict=True):
        # torch.func gives zeros where a leaf has no influence
        torch.testing.assert_close(a, torch.zeros_like(a) if b is None and a is not None else b)


@pytest.mark.parametrize(
    "case", [c for c in CASES if c.name in ("MSE", "subtree", "shared computation", "patterns")], ids=str
)
def test_under_autocast_the_gradients_are_the_same(case):
    torch.manual_seed(0)
    module, output, target, keywords = case.make(torch.float32)
    inputs = inputs_of(output, module)
    with torch.autocast("cpu", torch.bfloat16):
        halves = tree_map(lambda x: x.bfloat16() if isinstance(x, Tensor) and x.requires_grad else x, output)
        module(halves, target, **keywords).backward()
        gradients = taken(inputs)
        halves = tree_map(lambda x: x.bfloat16() if isinstance(x, Tensor) and x.requires_grad else x, output)
        total = module.backward(halves, target, **keywords)
    assert total.dtype is torch.float32
    assert_same(taken(inputs), gradients, rtol=2e-2, atol=1e-2)  # bfloat16 has 8 bits


def test_a_grad_scaler_scales_and_unscales():
    model, module = nn.Linear(4, 2), PathLossModule({"y": nn.MSELoss()})
    x, y = torch.randn(8, 4), torch.randn(8, 2)
    module({"y": model(x)}, {"y": y}).backward()
    expected = model.weight - 0.1 * model.weight.grad
    for way in ("backward", "grad_in_forward"):
        twin = copy.deepcopy(model)
        twin.zero_grad()
        optimizer = torch.optim.SGD(twin.parameters(), lr=0.1)
        scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
        if way == "backward":
            module.backward({"y": twin(x)}, {"y": y}, scale=scaler.scale(torch.ones(())))
        else:
            scaler.scale(PathLossModule({"y": nn.MSELoss()}, grad_in_forward=True)({"y": twin(x)}, {"y": y})).backward()
        assert twin.weight.grad.norm() > 10 * model.weight.grad.norm()
        scaler.step(optimizer)
        scaler.update()
        torch.testing.assert_close(twin.weight, expected)


def test_consume_empties_the_places_of_the_leaves_and_nothing_else():
    module = PathLossModule({"a": nn.MSELoss(), "b.*": nn.MSELoss(), "t.0": nn.MSELoss()})
    x = torch.ones(2, requires_grad=True)
    output = {"a": x * 1, "b": [x * 2, x * 3], "t": (x * 4,), "uncovered": x * 5, "index": torch.tensor(1)}
    zeros = torch.zeros(2)
    module.backward(output, {"a": zeros, "b": [zeros, zeros], "t": (zeros,)}, consume=True)
    assert output["a"] is None
    assert output["b"] == [None, None]
    assert isinstance(output["t"][0], Tensor)
    assert isinstance(output["uncovered"], Tensor)
    assert output["index"] == 1


def test_with_grad_in_forward_the_graph_of_a_criterion_is_gone_after_the_call():
    module = PathLossModule({"a": nn.CrossEntropyLoss()}, grad_in_forward=True)
    x = torch.randn(4, 3, requires_grad=True)
    loss = module({"a": x}, {"a": torch.tensor([0, 1, 2, 0])})
    assert type(loss.grad_fn).__name__ == "GradientInForwardBackward"
    with pytest.raises(RuntimeError, match="does not require grad"):
        torch.autograd.grad(torch.autograd.grad(loss, x, create_graph=True)[0].sum(), x)
    with torch.no_grad():
        assert not module({"a": x}, {"a": torch.tensor([0, 1, 2, 0])}).requires_grad


def test_an_error_in_backward_names_the_term_and_leaves_no_gradient():
    module = PathLossModule({"a": nn.MSELoss(), "b.c": nn.MSELoss()})
    x = torch.ones(2, requires_grad=True)
    for way in (module.backward, module.value_and_grad, module.output_gradients):
        with pytest.raises(KeyError, match=r"^Term 'b\.c': the output has no 'b\.c'\."):
            way({"a": x, "b": {}}, {"a": torch.zeros(2)})
    assert x.grad is None


class Reads(nn.Module):
    """A criterion that decides on the host."""

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        error = (input - target).square().mean()
        return error if error.item() > 1 else error.sqrt()


def test_a_criterion_that_cannot_be_traced_is_named_and_still_works_in_eager_mode():
    module = PathLossModule({"a": nn.MSELoss(), "b": Reads()})
    output = {"a": torch.ones(2, requires_grad=True), "b": torch.ones(2, requires_grad=True)}
    target = {"a": torch.zeros(2), "b": torch.zeros(2)}
    module.backward(output, target)
    module.compile(backend="eager")
    for way in (module, module.backward, module.value_and_grad):
        with pytest.raises(CompileError) as caught:
            way(output, target)
        text = str(caught.value)
        assert text.startswith(
            "The criterion cannot be compiled: Term 'b': its criterion cannot be traced into one graph. "
        )
        assert text.endswith("Mend it, or do not compile the criterion; eager mode runs it.")
    loose = PathLossModule({"a": nn.MSELoss(), "b": Reads()})
    loose.compile(backend="eager", fullgraph=False)
    torch.testing.assert_close(loose(output, target), module.eval()._call_impl(output, target))


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_a_criterion_on_another_device_than_the_outputs_raises_before_anything_is_compiled(compiled):
    counter = CompileCounter()
    module = PathLossModule({"a": nn.MSELoss(), "b": nn.MSELoss()})
    if compiled:
        module.compile(backend=counter)
    output = {name: torch.zeros(2, device="meta", requires_grad=True) for name in "ab"}
    target = {name: torch.zeros(2, device="meta") for name in "ab"}
    for way in (module, module.backward, module.value_and_grad):
        with pytest.raises(ArgumentError) as caught:
            way(output, target)
        assert str(caught.value) == (
            "Term 'a': its value is on meta, but the weights are on cpu. "
            "Move the criterion to the outputs' device with criterion.to('meta')."
        )
    assert counter.frame_count == 0


def test_what_is_wrong_in_eager_mode_says_the_same_compiled():
    module = PathLossModule({"a": nn.MSELoss(), "b.c": nn.MSELoss()})
    module.compile(backend="eager")
    x = torch.ones(2, requires_grad=True)
    for way in (module, module.backward, module.value_and_grad):
        with pytest.raises(PathNotFoundError, match=r"^Term 'b\.c': the output has no 'b\.c'\. The walk stopped"):
            way({"a": x, "b": {"d": x}}, {"a": torch.zeros(2), "b": {"c": torch.zeros(2)}})


def test_a_compiled_criterion_can_be_copied_and_the_copy_is_not_compiled():
    module = PathLossModule({"a": nn.MSELoss()})
    module.compile(backend="eager")
    module.backward({"a": torch.ones(2, requires_grad=True)}, {"a": torch.zeros(2)})
    twin = copy.deepcopy(module)
    assert twin._compiled_pass is None
    assert twin({"a": torch.ones(2)}, {"a": torch.zeros(2)}).item() == 1


def test_compile_keeps_what_the_caller_gives():
    ours = how.arguments({})
    assert ours["fullgraph"] is True
    assert ours["options"]["combo_kernels"] is True
    assert how.arguments({"fullgraph": False, "backend": "eager"}) == {
        "fullgraph": False,
        "backend": "eager",
    }
    merged = how.arguments({"mode": "reduce-overhead", "options": {"combo_kernels": False}})
    assert "mode" not in merged
    assert merged["options"]["triton.cudagraphs"] is True
    assert merged["options"]["combo_kernels"] is False


def test_large_terms_are_differentiated_one_after_the_other():
    order = []

    class Recording(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, name):
            ctx.name = name
            order.append(f"forward {name}")
            return x.square().mean()

        @staticmethod
        def backward(ctx, gradient):
            order.append(f"backward {ctx.name}")
            return gradient.expand(2**19), None

    names = ["a", "b", "c"]
    module = PathLossModule({n: Term(lambda x, n=n: Recording.apply(x, n), x=Output(n)) for n in names})
    output = {name: torch.randn(2**19, requires_grad=True) for name in names}  # 2 MiB each
    module.backward(output)
    assert order == [f"{way} {name}" for name in names for way in ("forward", "backward")]


def test_a_shared_computation_between_large_terms_is_evaluated_once():
    calls = []

    def sigmoid(x: Tensor) -> Tensor:
        calls.append(x)
        return x.sigmoid()

    shared = Shared(sigmoid, Output("x"))
    module = PathLossModule(
        {
            "x:a": Term(nn.MSELoss(), shared, Target("x")),
            "y": nn.MSELoss(),
            "x:b": Term(nn.L1Loss(), shared, Target("x")),
        }
    )
    output = {name: torch.randn(2**19, requires_grad=True) for name in "xy"}
    module.backward(output, {name: torch.zeros(2**19) for name in "xy"})
    assert len(calls) == 1


def test_nothing_in_backward_reads_from_the_device():
    with warnings.catch_warnings(), torch._subclasses.fake_tensor.FakeTensorMode():  # a read of a value raises
        for case in CASES:
            if case.name == "CTC":  # torch's own ctc_loss reads the lengths
                continue
            module, output, target, keywords = case.make(torch.float32)
            module.backward(model_of(output), target, **keywords, scale=torch.ones(()))
            module.backward(model_of(output), target, **keywords, consume=True)
            module.value_and_grad(output, target, **keywords)
            module._grad_in_forward = True
            if any(isinstance(leaf, Tensor) and leaf.requires_grad for leaf in tree_leaves(output)):
                module(model_of(output), target, **keywords).backward()


def test_a_leaf_takes_its_gradient_over_without_a_copy():
    module = PathLossModule({"a": nn.MSELoss(), "b": nn.MSELoss()})
    output = {name: torch.randn(3, requires_grad=True) for name in "ab"}
    target = {name: torch.zeros(3) for name in "ab"}
    for backend in (None, "aot_eager"):
        if backend:
            module.compile(backend=backend)
        module.backward(output, target)  # compiles
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            output["a"].grad = output["b"].grad = None
            module.backward(output, target)
        inside = {event.name for event in profile.events() if "AccumulateGrad" in getattr(event.cpu_parent, "name", "")}
        assert inside
        assert "aten::copy_" not in inside
        torch.testing.assert_close(output["a"].grad, output["a"].detach() * 2 / 3)


def test_a_gradient_in_memory_that_a_cuda_graph_writes_again_is_copied():
    for given, expected in (
        ({}, False),
        ({"mode": "reduce-overhead"}, True),
        ({"options": {"triton.cudagraphs": True}}, True),
        ({"mode": "max-autotune"}, True),
        ({"mode": "max-autotune-no-cudagraphs"}, False),
        ({"backend": "cudagraphs"}, True),
        ({"backend": "aot_eager"}, False),
    ):
        assert how.may_overwrite_results(how.arguments(given)) is expected, given
    module = PathLossModule({"a": nn.MSELoss()})
    module.compile(backend="eager")
    module._gives_away = False
    kept = torch.full((3,), 7.0)
    module._compiled_pass = lambda *_, **__: (torch.zeros(()), [kept], [])
    output = {"a": torch.randn(3, requires_grad=True)}
    module.backward(output, {"a": torch.zeros(3)})
    kept.zero_()
    assert output["a"].grad.tolist() == [7.0, 7.0, 7.0]


def test_hooks_at_an_output_and_at_a_parameter_see_their_gradients():
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.tensor(2.0))

        def forward(self, input: Tensor, target: Tensor) -> Tensor:
            return (self.scale * (input - target)).sum()

    module = PathLossModule({"a": Scaled(), "b": nn.MSELoss()})
    a, b = torch.ones(3, requires_grad=True), torch.ones(2, requires_grad=True)
    seen = []
    a.register_hook(lambda gradient: seen.append(("a", gradient.tolist())))
    scale = module.get_submodule("/a").scale
    scale.register_post_accumulate_grad_hook(lambda tensor: seen.append(("scale", tensor.grad.item())))
    module.backward({"a": a, "b": b * 1}, {"a": torch.zeros(3), "b": torch.zeros(2)})
    assert sorted(seen) == [("a", [2.0, 2.0, 2.0]), ("scale", 3.0)]
    assert b.grad.tolist() == [1.0, 1.0]


def test_two_criteria_of_the_same_modules_and_other_paths_have_graphs_of_their_own():
    torch._dynamo.reset()
    output = {"a": torch.ones(2, requires_grad=True), "b": torch.full((2,), 3.0, requires_grad=True)}
    target = {"a": torch.zeros(2), "b": torch.zeros(2)}
    criteria = [PathLossModule({name: nn.MSELoss()}) for name in "ab"]
    criteria.append(PathLossModule({"a": Term(nn.MSELoss(), Output("b"), Target("b"))}))
    for module in criteria:
        module.compile(options={"guard_filter_fn": how.without_plan}, backend="eager")
    for _ in range(2):
        assert [module(output, target).item() for module in criteria] == [1.0, 9.0, 9.0]
        assert [module.backward(output, target).item() for module in criteria] == [1.0, 9.0, 9.0]


def test_a_constant_that_changes_is_noticed_without_the_guards_on_the_plan():
    torch._dynamo.reset()
    factors = [2.0]
    module = PathLossModule({"a": Term(lambda x, f: x.sum() * f[0], Output("a"), factors)})
    module.compile(options={"guard_filter_fn": how.without_plan}, backend="eager")
    assert module({"a": torch.ones(3)}).item() == 6
    factors[0] = 5.0
    assert module({"a": torch.ones(3)}).item() == 15


def test_of_the_plan_only_its_identity_is_guarded():
    torch._dynamo.reset()
    kept: list[str] = []

    def recording(guards):
        keep = how.without_plan(guards)
        kept.extend(guard.name for guard, is_kept in zip(guards, keep, strict=True) if is_kept)
        return keep

    module = PathLossModule({"a": nn.MSELoss(), "b.*": nn.L1Loss()})
    module.compile(options={"guard_filter_fn": recording}, backend="eager")
    output = {"a": torch.ones(2, requires_grad=True), "b": [torch.ones(2)]}
    for way in (module, module.value_and_grad):
        kept.clear()
        way(output, {"a": torch.zeros(2), "b": [torch.zeros(2)]})
        assert {name for name in kept if "_plan." in name} == {"self._plan.identity"}
        assert any("target" in name for name in kept)


def of_arguments(way, backend=None):
    """Gradients at everything that a criterion is computed from and that is not of the output."""
    torch.manual_seed(0)
    prototype = torch.randn(3, requires_grad=True)
    scale = torch.tensor(2.0, requires_grad=True)
    weight = torch.rand(3, requires_grad=True)
    head = nn.Linear(3, 3)
    hidden = nn.Parameter(torch.randn(3))

    def through_head(output: Tensor, target: Tensor) -> Tensor:
        return (head(output) + hidden - target).square().mean()

    module = PathLossModule(
        {
            "a": nn.MSELoss(),
            "b": Term(lambda x, y, s: (x - s * y).abs().mean(), s=Input("scale")),
            "c": Term(nn.MSELoss(reduction="none"), reduction="mean"),
            "d": through_head,
            "e.*": nn.MSELoss(),
        },
        grad_in_forward=way == "grad_in_forward",
    )
    if backend:
        module.compile(backend=backend)
    output = {name: torch.randn(3, requires_grad=True) for name in "abcd"} | {"e": [torch.randn(3, requires_grad=True)]}
    shared = prototype * 2  # not a leaf, and read twice
    target = {"a": shared, "b": torch.randn(3), "c": torch.randn(3), "d": torch.randn(3), "e": [shared]}
    given = {"input": {"scale": scale}, "sample_weight": {"c": weight}}
    if way == "backward":
        module.backward(output, target, **given)
    else:
        module(output, target, **given).backward()
    return [tensor.grad for tensor in (prototype, scale, weight, hidden, head.weight, head.bias, output["a"])]


@pytest.mark.parametrize(
    ("way", "backend"),
    [("backward", None), ("grad_in_forward", None), ("backward", "aot_eager"), ("call", "aot_eager")],
)
def test_targets_inputs_sample_weights_and_closures_that_require_grad_get_theirs(way, backend):
    torch._dynamo.reset()
    found = of_arguments(way, backend)
    assert all(gradient is not None for gradient in found)
    torch.testing.assert_close(found, of_arguments("call"))


def test_a_closure_over_parameters_is_refused_where_its_gradients_would_be_lost():
    head = nn.Linear(3, 3)
    module = PathLossModule({"a": lambda output, target: head(output).square().mean()}, grad_in_forward=True)
    output, target = {"a": torch.randn(3, requires_grad=True)}, {"a": torch.zeros(3)}
    module(output, target).backward()
    assert head.weight.grad is not None
    module.compile(backend="aot_eager")
    with pytest.raises(Exception, match="closes over parameters, which would get no gradient"):
        module(output, target)
