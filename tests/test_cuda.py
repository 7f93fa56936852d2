"""What needs a GPU, as bench/cuda.py checks it; without one, the same code runs on the CPU where it can."""

import pathlib
import subprocess
import sys

import pytest
import torch

ROOT = pathlib.Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from bench import cuda as bench  # noqa: E402

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU on this machine")


@pytest.fixture(autouse=True)
def fresh_checks(monkeypatch):
    monkeypatch.setattr(bench, "checks", {})
    yield
    torch._dynamo.reset()


def assert_all_hold():
    assert bench.checks
    assert {name: text for name, text in bench.checks.items() if text != "holds"} == {}


@pytest.mark.cuda
@needs_gpu
@pytest.mark.parametrize("part", ["correctness", "one_graph", "no_synchronisation", "state"])
def test_on_a_gpu(part):
    getattr(bench, part)()
    assert_all_hold()


@pytest.mark.cuda
@needs_gpu
def test_speed_is_measured_on_a_gpu(monkeypatch):
    monkeypatch.setattr(bench, "SIZES", {bench.SMALL: bench.SIZES[bench.SMALL], bench.MEMORY_BOUND: [(256, 256)] * 10})
    assert bench.targets(bench.speed())


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU, on which all of it runs")
def test_the_gpu_s_correctness_checks_run_on_the_cpu(monkeypatch):
    monkeypatch.setattr(bench, "DEVICE", "cpu")
    bench.correctness()
    assert_all_hold()


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU, on which all of it runs")
def test_the_gpu_s_steps_run_on_the_cpu_and_agree(monkeypatch):
    monkeypatch.setattr(bench, "DEVICE", "cpu")
    torch._dynamo.reset()
    steps = bench.speed_steps([(8, 4), (6, 2)])
    assert len(steps) == 14
    for step in steps.values():
        step()


def test_without_a_gpu_the_benchmark_says_so():
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    run = subprocess.run([sys.executable, str(ROOT / "bench" / "cuda.py")], capture_output=True, text=True, check=True)
    assert run.stdout == "bench/cuda.py needs a GPU; there is none here.\n"
