"""One CUDA graph, and how many launches it holds: counted from the code that Inductor generates, without a GPU."""

import importlib.util
import json
import pathlib
import shutil
import subprocess
import sys

import pytest
import torch

HERE = pathlib.Path(__file__).parent / "cuda_codegen"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not torch.__version__.startswith("2.13"), reason="the rig patches torch 2.13"),
    pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU bench/cuda.py counts what is launched"),
    pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="the rig needs triton"),
    pytest.mark.skipif(shutil.which("g++") is None, reason="the rig compiles a shim with g++"),
]


@pytest.fixture(scope="module")
def counted():
    run = subprocess.run([sys.executable, str(HERE / "cases.py")], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout)


def launches(counted, name):
    return counted[name]["launches"]


def test_every_graph_is_one_cuda_graph(counted):
    assert [name for name, found in counted.items() if not all(found["one CUDA graph"])] == []


SIZES = ["same small", "different small", "same large", "different large"]


@pytest.mark.parametrize("options", ["default", "own"])
@pytest.mark.parametrize("size", SIZES)
def test_a_call_launches_one_kernel_more_than_by_hand_and_its_backward_none(counted, size, options):
    forward, backward = launches(counted, f"by hand, {size}, {options}")
    ours, our_backward = launches(counted, f"call, {size}, {options}")
    assert ours <= forward + 1  # the one that writes `last`
    assert our_backward <= backward


@pytest.mark.parametrize(
    ("size", "default", "own"),
    [("same small", 2, 2), ("different small", 11, 4), ("same large", 12, 4), ("different large", 27, 5)],
)
def test_loss_and_gradients_of_ten_mse_terms_need_few_launches(counted, size, default, own):
    (with_default,) = launches(counted, f"value_and_grad, {size}, default")
    (with_own,) = launches(counted, f"value_and_grad, {size}, own")
    assert with_default <= default < sum(launches(counted, f"by hand, {size}, default"))
    assert with_own <= own


def test_loss_and_gradients_of_ten_mixed_criteria_need_at_most_eight_launches(counted):
    (own,) = launches(counted, "value_and_grad, mixed, own")
    assert own <= 8


@pytest.mark.parametrize(("weighting", "more"), [("EMANormalized", 1), ("Uncertainty", 1), ("GradNorm", 2)])
def test_a_weighting_needs_a_launch_or_two_more_with_the_options_of_compile(counted, weighting, more):
    forward, backward = launches(counted, "call, same small, own")
    ours, our_backward = launches(counted, f"call, {weighting}, own")
    assert ours <= forward + more
    assert our_backward <= backward


def test_a_weight_changed_in_place_inside_the_graph_stays_in_it(counted):
    forward, _ = launches(counted, "changed weight")
    assert forward <= launches(counted, "call, same small, default")[0] + 1


@pytest.mark.parametrize(("options", "forward", "backward"), [("default", 22, 10), ("own", 4, 1)])
def test_ten_terms_with_masks_of_their_own_need_few_launches(counted, options, forward, backward):
    """By default two a term, its mask and its loss, and two for the total and `last`."""
    found = launches(counted, f"call, ten conditions, {options}")
    assert found[0] <= forward
    assert found[1] <= backward
