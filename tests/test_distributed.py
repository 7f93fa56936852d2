"""Two gloo processes under DistributedDataParallel: gradients equal those of one process with the whole batch."""

import math
import pathlib
import subprocess
import sys

import pytest
import torch
from _ranks import NORMALIZED, Detector, data, detections, gradients, model_and_criterion

RANKS = pathlib.Path(__file__).with_name("_ranks.py")


def run(tmp_path, case):
    file = tmp_path / "store"
    processes = [
        subprocess.Popen([sys.executable, str(RANKS), str(rank), str(file), case], stderr=subprocess.PIPE, text=True)
        for rank in range(2)
    ]
    errors = [process.communicate(timeout=120)[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], "\n".join(errors)
    return [torch.load(f"{file}.{rank}", weights_only=True) for rank in range(2)]


@pytest.mark.slow
@pytest.mark.parametrize(
    "case", ["call", "backward", "consume", "grad_in_forward", "compiled call", "compiled backward"]
)
def test_gradients_equal_the_single_process_ones_and_every_hook_fires(tmp_path, case):
    model, criterion = model_and_criterion()
    x, target = data(None)
    criterion(model(x), target).backward()
    expected = gradients(model)
    for found in run(tmp_path, case):
        assert found["hooks"] == sorted(expected)
        torch.testing.assert_close(found["gradients"], expected)


@pytest.mark.slow
@pytest.mark.parametrize("case", ["absent", "absent backward"])
def test_a_head_that_is_absent_on_one_rank_does_not_hang(tmp_path, case):
    model, criterion = model_and_criterion()
    # the mean over ranks of each rank's own loss: b counts on rank 0 alone
    for rank in range(2):
        x, target = data(rank)
        (criterion(model(x), {**target, "b": None} if rank else target) / 2).backward()
    expected = gradients(model)
    for found in run(tmp_path, case):
        assert found["hooks"] == sorted(expected)
        torch.testing.assert_close(found["gradients"], expected)


def full_batch(case):
    """Returns the loss of one process with all samples, written out, and the gradients."""
    (x, target), model = detections(case), Detector()
    output, has_box, has_token = model(x), target["has_box"], target["has_token"]
    box = (output["box"][has_box] - target["box"][has_box]).abs().sum() / max(1, has_box.sum().item())
    token = (output["token"][has_token] - target["token"][has_token]).square().sum() / has_token.sum()
    loss = box + 0.5 * token
    loss.backward()
    return loss.detach(), gradients(model)


@pytest.fixture(scope="module")
def normalized(tmp_path_factory):
    return run(tmp_path_factory.mktemp("normalized"), "normalized")


@pytest.mark.slow
@pytest.mark.parametrize("case", NORMALIZED)
def test_a_normalized_loss_and_its_gradients_are_those_of_one_process_with_the_whole_batch(normalized, case):
    loss, expected = full_batch(case)
    ranks = [found[case] for found in normalized]
    torch.testing.assert_close((ranks[0]["loss"] + ranks[1]["loss"]) / 2, loss, rtol=1e-6, atol=1e-6)
    for found in ranks:
        torch.testing.assert_close(found["gradients"], expected, rtol=1e-6, atol=1e-6)
    assert math.isnan(ranks[1]["log"]["terms/box"])  # it has no box
