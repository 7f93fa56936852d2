"""The container: construction, calls, overlaps, absent terms, dtypes, the module protocol."""

import copy
import io
import pickle
from collections import namedtuple

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from torch_pathloss import Output, PathLossModule, PathSyntaxError, Shared, Target, Term
from torch_pathloss.schedules import linear

STATE = ["weights.value", "weights.step", "weights._extra_state"]


def randn(*shape, dtype=torch.float32):
    return torch.randn(*shape, dtype=dtype, requires_grad=True)


def detection_loss(output, target):
    return ((output["bbox"] - target["bbox"]).abs().sum(1) * target["confidence"]).mean()


def seed_criterion():
    return PathLossModule(
        {
            "classification": nn.CrossEntropyLoss(),
            "detection": detection_loss,
            "detection.bbox": nn.SmoothL1Loss(),
            "detection.confidence": nn.BCEWithLogitsLoss(),
        },
        weights={"detection.bbox": 5.0},
    )


def seed_data(batch=4):
    output = {"classification": randn(batch, 10), "detection": {"bbox": randn(batch, 4), "confidence": randn(batch)}}
    target = {
        "classification": torch.randint(10, (batch,)),
        "detection": {"bbox": torch.randn(batch, 4), "confidence": torch.rand(batch)},
    }
    return output, target


def seed_by_hand(output, target):
    o, t = output["detection"], target["detection"]
    return (
        F.cross_entropy(output["classification"], target["classification"])
        + detection_loss(o, t)
        + 5.0 * F.smooth_l1_loss(o["bbox"], t["bbox"])
        + F.binary_cross_entropy_with_logits(o["confidence"], t["confidence"])
    )


def leaves(output):
    return [output["classification"], output["detection"]["bbox"], output["detection"]["confidence"]]


def test_the_seed_example_equals_its_losses_by_hand():
    output, target = seed_data()
    loss, by_hand = seed_criterion()(output, target), seed_by_hand(output, target)
    torch.testing.assert_close(loss, by_hand)
    assert loss.ndim == 0
    for ours, theirs in zip(
        torch.autograd.grad(loss, leaves(output)), torch.autograd.grad(by_hand, leaves(output)), strict=True
    ):
        torch.testing.assert_close(ours, theirs)


def test_a_nested_structure_mirrors_the_output():
    Pair = namedtuple("Pair", "left right")
    x = [randn(3) for _ in range(6)]
    output = {"a": [x[0], x[1]], "b": Pair(x[2], (x[3],)), "c": {"d": {"e": x[4]}}, "f": x[5]}
    target = {
        "a": [torch.zeros(3)] * 2,
        "b": Pair(torch.zeros(3), (torch.zeros(3),)),
        "c": {"d": {"e": torch.zeros(3)}},
    }
    criterion = PathLossModule(
        {"a": [nn.MSELoss(), None], "b": Pair(nn.MSELoss(), (nn.MSELoss(),)), "c.d": {"e": nn.MSELoss()}, "f": None},
        weights={"a": [2.0], "c": {"d.e": 3.0}},
    )
    assert list(criterion.weights) == ["a.0", "b.left", "b.right.0", "c.d.e"]
    by_hand = 2 * (x[0] ** 2).mean() + (x[2] ** 2).mean() + (x[3] ** 2).mean() + 3 * (x[4] ** 2).mean()
    torch.testing.assert_close(criterion(output, target), by_hand)


def test_module_containers_are_nested_structures_too():
    losses = nn.ModuleDict({"a": nn.ModuleList([nn.MSELoss()]), "b": nn.L1Loss()})
    assert list(PathLossModule(losses).weights) == ["a.0", "b"]


def test_one_bare_criterion_is_the_root_term():
    x, y = randn(3), torch.randn(3)
    criterion = PathLossModule(nn.MSELoss())
    torch.testing.assert_close(criterion(x, y), F.mse_loss(x, y))
    assert list(criterion.weights) == [""]
    assert [name for name, _ in criterion.named_children()] == ["/", "weights", "last"]


def test_labels_put_several_criteria_on_one_node():
    x, y = randn(3), torch.rand(3)
    criterion = PathLossModule({"mask:mse": nn.MSELoss(), "mask": {":l1": nn.L1Loss()}}, weights={"mask:l1": 2.0})
    torch.testing.assert_close(criterion({"mask": x}, {"mask": y}), F.mse_loss(x, y) + 2 * F.l1_loss(x, y))
    assert "/mask:mse" in dict(criterion.named_children())


def test_a_label_does_not_belong_to_a_path():
    with pytest.raises(PathSyntaxError) as caught:
        Output("mask:dice")
    assert str(caught.value) == (
        "Cannot parse the path 'mask:dice': it ends in the label 'dice'. "
        "A label belongs to the name of a term; a path to a node has none."
    )


def test_the_user_s_mappings_are_neither_changed_nor_kept():
    losses, weights = {"a": nn.MSELoss(), "b": {"c": nn.L1Loss()}}, {"a": 2.0}
    criterion = PathLossModule(losses, weights=weights)
    assert list(losses) == ["a", "b"]
    assert list(losses["b"]) == ["c"]
    losses["d"], weights["a"] = nn.MSELoss(), 3.0
    assert list(criterion.weights) == ["a", "b.c"]
    assert criterion.weights["a"].item() == 2.0


def test_extra_keys_in_the_target_do_no_harm():
    x = randn(2)
    criterion = PathLossModule({"a": nn.MSELoss()})
    torch.testing.assert_close(criterion({"a": x}, {"a": torch.zeros(2), "b": "?"}), (x**2).mean())


def test_terms_gives_the_unweighted_values_in_declared_order():
    output, target = seed_data()
    criterion = seed_criterion()
    values = criterion.terms(output, target)
    assert list(values) == ["classification", "detection", "detection.bbox", "detection.confidence"]
    expected = F.smooth_l1_loss(output["detection"]["bbox"], target["detection"]["bbox"])
    torch.testing.assert_close(values["detection.bbox"], expected)
    total = sum(values[name] * weight for name, weight in criterion.weights.items())
    torch.testing.assert_close(total, criterion(output, target))
    total.backward()
    assert all(leaf.grad is not None for leaf in leaves(output))


def test_terms_does_not_write_last():
    criterion = PathLossModule(nn.MSELoss())
    criterion.terms(torch.zeros(1), torch.ones(1))
    assert criterion.last.total.isnan()


# Absent terms


@pytest.mark.parametrize("where", ["output", "target", "subtree of the target"])
def test_a_none_makes_its_term_absent(where):
    criterion = PathLossModule({"a": nn.MSELoss(), "b.c": nn.MSELoss()}, weights={"b.c": 3.0})
    a, c = randn(2), randn(2)
    output, target = {"a": a, "b": {"c": c}}, {"a": torch.zeros(2), "b": {"c": torch.zeros(2)}}
    if where == "output":
        output["b"]["c"] = None
    elif where == "target":
        target["b"]["c"] = None
    else:
        target["b"] = None
    loss = criterion(output, target)
    torch.testing.assert_close(loss, (a**2).mean())
    assert {name: bool(p) for name, p in criterion.last.present.items()} == {"a": True, "b.c": False}
    assert torch.tensor(criterion.last.log()["terms/b.c"]).isnan()
    assert criterion.last.log()["weights/b.c"] == 3.0
    assert criterion.terms(output, target)["b.c"].item() == 0


def test_an_absent_term_gives_its_output_leaves_a_zero_gradient():
    criterion = PathLossModule({"a": nn.MSELoss(), "b": lambda o, t: o["x"].sum() + o["y"].sum()})
    a, x, y = randn(2), randn(3), torch.tensor(float("inf"), requires_grad=True)
    integer, constant = torch.tensor([1]), torch.zeros(2)
    output = {"a": a, "b": {"x": x, "y": y, "integer": integer, "constant": constant}}
    criterion(output, {"a": torch.zeros(2), "b": None}).backward()
    assert x.grad.tolist() == [0, 0, 0]
    assert y.grad.item() == 0


@pytest.mark.parametrize("empty", [[], (), {}, None], ids=repr)
def test_a_pattern_without_matches_is_absent(empty):
    criterion = PathLossModule({"a": nn.MSELoss(), "aux.*": nn.MSELoss()})
    a = randn(2)
    loss = criterion({"a": a, "aux": empty}, {"a": torch.zeros(2), "aux": empty})
    torch.testing.assert_close(loss, (a**2).mean())
    assert not criterion.last.present["aux.*"]


def test_a_match_that_is_absent_is_left_out_of_sum_and_mean():
    x = [randn(2), randn(2), randn(2)]
    target = [torch.zeros(2), None, torch.zeros(2)]
    by_hand = (x[0] ** 2).mean() + (x[2] ** 2).mean()
    for match, divisor in (("sum", 1), ("mean", 2)):
        criterion = PathLossModule({"aux.*": Term(nn.MSELoss(), match=match)})
        loss = criterion({"aux": x}, {"aux": target})
        torch.testing.assert_close(loss, by_hand / divisor)
    loss.backward()
    assert x[1].grad.tolist() == [0, 0]


def test_a_shared_computation_over_an_absent_node_makes_its_terms_absent():
    shared = Shared(torch.sigmoid, Output("x"))
    criterion = PathLossModule({"x": Term(nn.MSELoss(), shared, Target("x")), "y": nn.MSELoss()})
    y = randn(2)
    loss = criterion({"x": None, "y": y}, {"x": torch.zeros(2), "y": torch.zeros(2)})
    torch.testing.assert_close(loss, (y**2).mean())


def test_a_shared_computation_may_return_none():
    criterion = PathLossModule(
        {"x": Term(lambda x, nothing: x.sum(), Output("x"), Shared(lambda x: None, Output("x")))}
    )
    assert criterion({"x": torch.ones(2)}).item() == 2
    assert criterion.last.present["x"]


def test_all_terms_absent_is_zero():
    criterion = PathLossModule({"a": nn.MSELoss()})
    a = randn(2)
    loss = criterion({"a": a}, {"a": None})
    loss.backward()
    assert loss.item() == 0
    assert a.grad.tolist() == [0, 0]


def test_a_node_of_the_input_that_is_none_is_passed_on():
    from torch_pathloss import Input

    seen = []
    criterion = PathLossModule({"x": Term(lambda x, m: (seen.append(m), x.sum())[1], Output("x"), Input("mask"))})
    criterion({"x": torch.ones(2)}, input={"mask": None})
    assert seen == [None]


# Dtypes


def test_double_precision_stays_double():
    output, target = seed_data()
    output, target = torch.utils._pytree.tree_map(
        lambda x: x.detach().double().requires_grad_() if x.is_floating_point() else x, (output, target)
    )
    criterion = seed_criterion()
    loss = criterion(output, target)
    assert loss.dtype is torch.float64
    torch.testing.assert_close(loss, seed_by_hand(output, target))  # 5.0 is exact in float32


@pytest.mark.parametrize("terms", [1, 3])
def test_bfloat16_values_are_summed_and_recorded_in_float32(terms):
    criterion = PathLossModule({f"x{i}": nn.MSELoss() for i in range(terms)}, weights={"x0": 0.3})
    output = {f"x{i}": randn(64, dtype=torch.bfloat16) for i in range(terms)}
    target = {name: torch.zeros(64, dtype=torch.bfloat16) for name in output}
    loss = criterion(output, target)
    values = [F.mse_loss(output[name], target[name]).float() for name in output]
    assert loss.dtype is criterion.last.total.dtype is criterion.last.values["x0"].dtype is torch.float32
    torch.testing.assert_close(loss, 0.3 * values[0] + sum(values[1:]))
    loss.backward()
    assert output["x0"].grad.dtype is torch.bfloat16


def test_values_of_several_dtypes_are_promoted():
    criterion = PathLossModule({"a": nn.MSELoss(), "b": nn.MSELoss()})
    output = {"a": randn(4), "b": randn(4, dtype=torch.float64)}
    target = {"a": torch.zeros(4), "b": torch.zeros(4, dtype=torch.float64)}
    loss = criterion(output, target)
    assert loss.dtype is torch.float64
    torch.testing.assert_close(loss, (output["a"] ** 2).mean() + (output["b"] ** 2).mean())


def test_under_autocast_the_total_is_float32():
    linear = nn.Linear(4, 3)
    criterion = PathLossModule({"a": nn.CrossEntropyLoss(), "b": nn.MSELoss()}, weights={"a": 0.3})
    x, y = torch.randn(5, 4), torch.tensor([0, 1, 2, 0, 1])
    with torch.autocast("cpu", torch.bfloat16):
        out = linear(x)
        assert out.dtype is torch.bfloat16
        loss = criterion({"a": out, "b": out}, {"a": y, "b": torch.zeros(5, 3)})
        by_hand = 0.3 * F.cross_entropy(out, y) + F.mse_loss(out, torch.zeros(5, 3))
    assert loss.dtype is torch.float32
    torch.testing.assert_close(loss, by_hand)
    loss.backward()
    assert linear.weight.grad.dtype is torch.float32


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_casting_the_module_casts_criteria_but_never_rounds_weights(dtype):
    criterion = PathLossModule({"x": nn.CrossEntropyLoss(weight=torch.ones(3))}, weights={"x": 0.3}).to(dtype)
    assert criterion.get_submodule("/x").weight.dtype is dtype
    assert criterion.weights["x"].item() == torch.tensor(0.3).item()
    criterion({"x": torch.zeros(2, 3, dtype=dtype)}, {"x": torch.tensor([0, 1])})
    assert criterion.last.total.dtype.itemsize >= 4
    assert criterion.last.log()["total"] == pytest.approx(0.3 * torch.tensor(3.0).log().item(), rel=1e-2)


def test_the_default_dtype_does_not_round_what_is_recorded():
    torch.set_default_dtype(torch.bfloat16)
    try:
        criterion = PathLossModule({"a": nn.MSELoss(), "b": nn.MSELoss()}, weights={"a": 0.1})
        output = {name: torch.full((2,), 0.7, dtype=torch.float32) for name in "ab"}
        total = criterion(output, {"a": torch.zeros(2, dtype=torch.float32), "b": None})
        assert criterion({"a": None, "b": None}, {"a": None, "b": None}).dtype is torch.float32
        criterion(output, {"a": torch.zeros(2, dtype=torch.float32), "b": None})
    finally:
        torch.set_default_dtype(torch.float32)
    assert total.dtype is torch.float32
    assert criterion.last.log()["weights/a"] == torch.tensor(0.1).item()
    assert criterion.last.log()["terms/a"] == F.mse_loss(output["a"], torch.zeros(2)).item()


# The module protocol


def test_criteria_are_children_under_readable_names():
    mse = nn.MSELoss()
    criterion = PathLossModule({"a.b": mse, "c": F.l1_loss})
    assert criterion.get_submodule("/a/b") is mse
    assert [name for name, _ in criterion.named_children()] == ["/a/b", "/c", "weights", "last"]


def test_train_and_hooks_reach_the_children():
    class Mode(nn.Module):
        def forward(self, input, target):
            return (input - target).sum() * (2.0 if self.training else 1.0)

    criterion = PathLossModule({"x": Mode()})
    calls = []
    criterion.get_submodule("/x").register_forward_hook(lambda *_: calls.append(1))
    tree, zeros = {"x": torch.ones(1)}, {"x": torch.zeros(1)}
    assert criterion(tree, zeros).item() == 2
    assert criterion.eval()(tree, zeros).item() == 1
    assert len(calls) == 2


def test_one_module_under_two_paths_is_one_module():
    class Scale(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.ones(()))

        def forward(self, input, target):
            return self.scale * (input - target).sum()

    shared = Scale()
    criterion = PathLossModule({"a": shared, "b": shared})
    assert len(list(criterion.parameters())) == 1
    criterion({"a": torch.ones(1), "b": torch.ones(2)}, {"a": torch.zeros(1), "b": torch.zeros(2)}).backward()
    assert shared.scale.grad.item() == 3
    twin = copy.deepcopy(criterion)
    assert twin.get_submodule("/a") is twin.get_submodule("/b")


def round_trips():
    def save(criterion):
        file = io.BytesIO()
        torch.save(criterion.state_dict(), file)
        file.seek(0)
        fresh = PathLossModule({"a": nn.CrossEntropyLoss(weight=torch.ones(3)), "b": nn.L1Loss()})
        fresh.load_state_dict(torch.load(file, weights_only=True))
        return fresh

    return {"deepcopy": copy.deepcopy, "pickle": lambda c: pickle.loads(pickle.dumps(c)), "state_dict": save}


@pytest.mark.parametrize("way", ["deepcopy", "pickle", "state_dict"])
def test_a_copy_computes_the_same_and_stands_on_its_own(way):
    criterion = PathLossModule(
        {"a": nn.CrossEntropyLoss(weight=torch.tensor([1.0, 2.0, 5.0])), "b": nn.L1Loss()}, weights={"b": 0.7}
    )
    output, target = (
        {"a": torch.randn(4, 3), "b": torch.randn(4)},
        {"a": torch.tensor([0, 1, 2, 1]), "b": torch.zeros(4)},
    )
    expected = criterion(output, target)
    twin = round_trips()[way](criterion)
    assert twin(output, target) == expected
    assert twin.last.log() == criterion.last.log()
    twin.weights["b"] = 100.0
    twin(output, target)
    assert criterion(output, target) == expected
    assert criterion.last.log() != twin.last.log()


def test_an_empty_twin_can_be_loaded_from_a_state_dict():
    criterion = PathLossModule({"a": nn.MSELoss()}, weights={"a": 0.7})
    assert list(criterion.state_dict()) == STATE
    assert criterion.state_dict()["weights.value"].dtype is torch.float32


def test_a_module_on_the_meta_device_computes_shapes():
    criterion = PathLossModule({"a": nn.MSELoss(), "b": nn.L1Loss()}).to("meta")
    tree = {"a": torch.zeros(2, device="meta"), "b": torch.zeros(2, device="meta")}
    assert criterion(tree, tree).shape == ()


@pytest.mark.parametrize("materialize", ["to_empty", "reset_parameters"])
def test_a_module_that_leaves_the_meta_device_has_its_weights(materialize):
    with torch.device("meta"):
        criterion = PathLossModule({"a": nn.MSELoss(), "b": nn.L1Loss()}, weights={"a": 0.3, "b": linear(4, 2, 1)})
    assert criterion.weights.value.is_meta
    if materialize == "to_empty":
        criterion.to_empty(device="cpu")
    else:  # as FullyShardedDataParallel does
        for module in criterion.modules():
            if any(tensor.is_meta for tensor in module.buffers(recurse=False)):
                module.to_empty(device="cpu", recurse=False)
                module.reset_parameters()
    assert torch.equal(criterion.weights.value, torch.tensor([0.3, 4.0]))
    assert criterion.last.total.isnan()
    assert not any(criterion.last.present.values())
    ones, zeros = ({"a": x, "b": x} for x in (torch.ones(2), torch.zeros(2)))
    for weight in (4.0, 2.0):
        torch.testing.assert_close(criterion(ones, zeros), torch.tensor(0.3 + weight))
        assert criterion.last.log()["terms/b"] == 1
        criterion.step()


def test_without_grad_and_in_inference_mode_it_computes_the_same():
    output, target = seed_data()
    criterion = seed_criterion()
    expected = criterion(output, target).detach()
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            torch.testing.assert_close(criterion(output, target), expected)


def test_under_vmap_and_grad_of_torch_func_it_computes_the_same():
    criterion = PathLossModule({"a": nn.MSELoss(), "b": nn.L1Loss()}, weights={"b": 2.0})
    a, b = torch.randn(3), torch.randn(3)

    def loss(a, b):
        return criterion({"a": a, "b": b}, {"a": torch.zeros(3), "b": torch.zeros(3)})

    ours = torch.func.grad(loss, argnums=(0, 1))(a, b)
    torch.testing.assert_close(ours, (2 * a / 3, 2 * b.sign() / 3))
    assert criterion.last.total == loss(a, b)
    rows = torch.func.vmap(loss)(torch.stack([a, b]), torch.stack([b, a]))
    torch.testing.assert_close(rows, torch.stack([loss(a, b), loss(b, a)]))
