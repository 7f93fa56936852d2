"""Weights by name, and what the latest forward recorded."""

import pytest
import torch
from torch import nn

from torch_pathloss import PathLossModule, Term


def criterion(**weights):
    return PathLossModule({"a.b": nn.L1Loss(), "a.c:x": nn.L1Loss(), "d.0": nn.L1Loss()}, weights=weights or None)


def data(a=1.0, c=2.0, d=3.0):
    output = {"a": {"b": torch.full((2,), a), "c": torch.full((2,), c)}, "d": [torch.full((2,), d)]}
    return output, {"a": {"b": torch.zeros(2), "c": torch.zeros(2)}, "d": [torch.zeros(2)]}


def test_weights_are_one_float32_buffer_of_the_state_dict():
    module = criterion(**{"a.b": 0.5})
    assert module.state_dict()["weights.value"].tolist() == [0.5, 1.0, 1.0]
    assert module.state_dict()["weights.value"].dtype is torch.float32


def test_a_weight_is_written_in_place_by_any_spelling():
    module = criterion()
    buffer = module.weights.value
    for name, position in (("a.b", 0), ('["a"].b', 0), (("a", "b"), 0), ("a.c:x", 1), ("d[0]", 2), (("d", 0), 2)):
        module.weights[name] = 7.0
        assert buffer.tolist()[position] == 7.0
        assert module.weights[name].item() == 7.0
        module.weights[name] = torch.tensor(1.0)
    assert module.weights.value is buffer
    module.weights["a.b"] = 4.0
    assert module(*data()).item() == 4 + 2 + 3


def test_weights_come_from_the_term_or_from_the_mapping():
    module = PathLossModule({"a": Term(nn.L1Loss(), weight=torch.tensor(2.0)), "b": nn.L1Loss()}, weights={"b": 3})
    assert {name: weight.item() for name, weight in module.weights.items()} == {"a": 2.0, "b": 3.0}
    assert list(module.weights) == list(module.weights.keys()) == ["a", "b"]
    assert len(module.weights) == 2
    assert repr(module.weights) == "Weights({'a': 2, 'b': 3})"


def test_weights_are_given_by_any_spelling_and_nesting():
    for weights in (
        {"a.b": 2.0, "a.c:x": 3.0, "d.0": 4.0},
        {("a", "b"): 2.0, '["a"].c:x': 3.0, ("d", 0): 4.0},
        {"a": {"b": 2.0, "c:x": 3.0}, "d": [4.0]},
        {"a": {("b",): 2.0, "c": {":x": 3.0}}, "d": {0: 4.0}},
    ):
        losses = {"a.b": nn.L1Loss(), "a.c:x": nn.L1Loss(), "d.0": nn.L1Loss()}
        assert PathLossModule(losses, weights=weights).weights.value.tolist() == [2.0, 3.0, 4.0]


def test_log_has_the_same_keys_before_and_after_the_first_step_and_with_one_term():
    module = criterion(**{"a.b": 0.5})
    keys = [
        "train/total",
        *(f"train/{row}/{name}" for row in ("terms", "weights") for name in ("a.b", "a.c:x", "d.0")),
    ]
    assert list(module.last.log("train/")) == keys
    module(*data())
    assert module.last.log("train/") == dict(zip(keys, [5.5, 1.0, 2.0, 3.0, 0.5, 1.0, 1.0], strict=True))
    single = PathLossModule({"x": nn.L1Loss()})
    single({"x": torch.ones(2)}, {"x": torch.zeros(2)})
    assert single.last.log() == {"total": 1.0, "terms/x": 1.0, "weights/x": 1.0}


def test_last_holds_the_weights_that_were_used_not_those_set_since():
    module = criterion()
    module(*data())
    module.weights["a.b"] = 9.0
    assert module.last.weights["a.b"].item() == 1.0


def test_what_is_kept_of_last_does_not_change_with_later_steps():
    module = criterion()
    module(*data(a=1.0))
    kept = module.last.total, module.last.values["a.b"]
    module(*data(a=5.0))
    assert [tensor.item() for tensor in kept] == [6.0, 1.0]
    assert module.last.values["a.b"].item() == 5.0


def test_last_is_detached_and_not_saved():
    module = criterion()
    output, target = data()
    output["d"][0].requires_grad_()
    module(output, target)
    assert not module.last.total.requires_grad
    assert "last" not in " ".join(module.state_dict())


def test_a_moved_criterion_records_into_the_moved_buffer():
    module = criterion()
    module(*data())
    module.double()
    module(*data(a=4.0))
    assert module.last.values["a.b"].item() == 4.0
    assert module.last.log()["terms/a.b"] == 4.0


def test_log_copies_to_the_host_once():
    module = criterion()
    module(*data())
    copies = []

    class Count(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            copies.append(str(function))
            return function(*args, **(kwargs or {}))

    with Count():
        module.last.log()
    assert len([name for name in copies if "_local_scalar_dense" in name or "_to_copy" in name]) <= 1


@pytest.mark.parametrize("name", ["a", "a.b:x", "a.b.", "", ("a", 0)])
def test_a_name_that_no_term_has_raises(name):
    with pytest.raises(KeyError):
        criterion().weights[name]


def test_a_checkpoint_gives_each_weight_to_its_term_whatever_the_order():
    saved = PathLossModule({"mask": nn.MSELoss(), "box": nn.L1Loss()}, weights={"box": 5.0}).state_dict()
    other = PathLossModule({"box": nn.L1Loss(), "mask": nn.MSELoss()})
    other.load_state_dict(saved)
    assert {name: weight.item() for name, weight in other.weights.items()} == {"box": 5.0, "mask": 1.0}


def test_a_checkpoint_of_other_terms_is_refused_and_changes_nothing():
    saved = PathLossModule({"mask": nn.MSELoss(), "box": nn.L1Loss()}, weights={"box": 5.0}).state_dict()
    for losses in ({"box": nn.L1Loss(), "msk": nn.MSELoss()}, {"box": nn.L1Loss()}):
        other = PathLossModule(losses)
        with pytest.raises(RuntimeError, match=r"The weights were saved for other terms: the checkpoint lacks"):
            other.load_state_dict(saved)
        assert other.weights.value.tolist() == [1.0] * len(losses)


def test_update_sets_several_weights_or_none():
    module = criterion()
    module.weights.update({"a.b": 2.0, ("d", 0): torch.tensor(3.0)})
    assert [weight.item() for weight in module.weights.values()] == [2.0, 1.0, 3.0]
    with pytest.raises(KeyError):
        module.weights.update({"a.b": 9.0, "nowhere": 1.0})
    with pytest.raises(ValueError, match="a weight must be finite"):
        module.weights.update({"a.b": 9.0, "d.0": float("nan")})
    assert [weight.item() for weight in module.weights.values()] == [2.0, 1.0, 3.0]
