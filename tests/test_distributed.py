"""Two gloo processes under DistributedDataParallel: gradients equal those of one process with the whole batch."""

import pathlib
import subprocess
import sys

import pytest
import torch
from _ranks import data, gradients, model_and_criterion

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
