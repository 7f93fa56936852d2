"""The container on a GPU: is it right, is it one CUDA graph, and how fast is it?

Needs torch and optree only, and under 8 minutes on one GPU. Prints tables, and writes JSON with date and device.

    python bench/cuda.py [--out FILE]
"""

from __future__ import annotations

import argparse
import datetime
import json
import pathlib
import statistics
import sys
import traceback
from collections.abc import Callable
from contextlib import contextmanager
from typing import Any

# Run as a script, this folder is on the path, and this file would be the package `cuda` that torch looks for.
sys.path[0] = str(pathlib.Path(__file__).parents[1])

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torch_pathloss import ArgumentError, Output, PathLossModule, Shared, Target, Term, _compile, known

DEVICE = "cuda"
SIZES = {
    "10 x (64, 32)": [(64, 32)] * 10,
    "10 x (1024, 256)": [(1024, 256)] * 10,
    "10 x (4096, 4096)": [(4096, 4096)] * 10,
}
MEMORY_BOUND, SMALL = "10 x (4096, 4096)", "10 x (64, 32)"

checks: dict[str, str] = {}


@contextmanager
def check(name: str) -> Any:
    """Runs a check on its own: a failure is recorded with its message, and the next goes on."""
    torch._dynamo.reset()
    try:
        yield
    except Exception as error:
        checks[name] = f"FAILED: {type(error).__name__}: {str(error)[:400]}"
        traceback.print_exc()
    else:
        checks[name] = "holds"
    print(f"{name}: {checks[name]}", flush=True)


def dice(probability: Tensor, target: Tensor) -> Tensor:
    return 1 - 2 * (probability * target).sum() / (probability.sum() + target.sum())


def every_kind() -> tuple[PathLossModule, Any, Any, dict[str, Any]]:
    """A subtree, labels, a shared computation, a pattern, a reduction with sample weights, masks, an absent term."""

    def root(output: Tensor, target: Tensor) -> Tensor:  # by no criterion of torch's: a selected row stands in
        return ((output - target).square() + 1).sqrt()

    probability = Shared(torch.sigmoid, Output("mask"))
    criterion = PathLossModule(
        {
            "label": nn.CrossEntropyLoss(),
            "head": lambda output, target: (output["a"] - target["a"]).abs().mean() + output["b"].mean(),
            "mask:dice": Term(dice, probability, Target("mask")),
            "mask:mse": Term(nn.MSELoss(), probability, Target("mask")),
            "aux.*": Term(nn.MSELoss(), match="mean"),
            "score": Term(nn.MSELoss(reduction="none"), reduction="weighted_mean"),
            "box": Term(nn.SmoothL1Loss(reduction="none"), where=known(Target("box")), reduction="mean"),
            "box:root": Term(root, where=known(Target("box")), reduction="sum", normalizer=Target("boxes")),
            "off": nn.MSELoss(),
        },
        weights={"label": 0.5},
    ).to(DEVICE)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, device=DEVICE, requires_grad=True)

    output = {
        "label": randn(64, 10),
        "head": {"a": randn(64, 4), "b": randn(64)},
        "mask": randn(8, 16, 16),
        "aux": [randn(64, 4), randn(64, 8)],
        "score": randn(64),
        "box": randn(64, 4),
        "off": randn(3),
    }
    target = {
        "label": torch.randint(10, (64,), device=DEVICE),
        "head": {"a": torch.randn(64, 4, device=DEVICE)},
        "mask": torch.rand(8, 16, 16, device=DEVICE),
        "aux": [torch.randn(64, 4, device=DEVICE), torch.randn(64, 8, device=DEVICE)],
        "score": torch.randn(64, device=DEVICE),
        "box": torch.where(torch.rand(64, 1, device=DEVICE) < 0.5, torch.randn(64, 4, device=DEVICE), torch.nan),
        "boxes": torch.full((1,), 32, device=DEVICE),
        "off": None,
    }
    return criterion, output, target, {"sample_weight": {"score": torch.rand(64, device=DEVICE)}}


def leaves(tree: Any) -> list[Tensor]:
    if isinstance(tree, Tensor):
        return [tree]
    if isinstance(tree, dict):
        tree = list(tree.values())
    return [leaf for child in tree for leaf in leaves(child)] if isinstance(tree, (list, tuple)) else []


def taken(output: Any) -> list[Tensor | None]:
    found = []
    for leaf in leaves(output):
        found.append(None if leaf.grad is None else leaf.grad.clone())
        leaf.grad = None
    return found


def same(ours: Any, theirs: Any) -> None:
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def correctness() -> None:
    ways: dict[str, dict[str, Any] | None] = {
        "eager": None,
        "compiled": {},
        "compiled, default options": {"options": {"combo_kernels": False}},
        "reduce-overhead": {"mode": "reduce-overhead"},
    }
    for name, options in ways.items():
        with check(f"correct, {name}"):
            criterion, output, target, keywords = every_kind()
            criterion(output, target, **keywords).backward()
            expected, logged = taken(output), criterion.last.log()
            if options is not None:
                criterion.compile(**options)
            for _ in range(4):  # warm up, record, replay
                torch.compiler.cudagraph_mark_step_begin()
                criterion(output, target, **keywords).backward()
                same(taken(output), expected)
                torch.compiler.cudagraph_mark_step_begin()
                total = criterion.backward(output, target, **keywords).clone()
                same(taken(output), expected)
                same(total.item(), logged["total"])
                same([v for v in criterion.last.log().values() if v == v], [v for v in logged.values() if v == v])


def graphs(step: Callable[[], Any]) -> int:
    """Returns how many CUDA graphs one step launches. Copies into their inputs stand beside them, uncounted."""
    for _ in range(5):
        step()
    torch.cuda.synchronize()
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        step()
        torch.cuda.synchronize()
    names = [event.name for event in profile.events()]
    return sum(name == "cudaGraphLaunch" for name in names)


def one_graph() -> None:
    with torch._inductor.config.patch({"triton.cudagraph_or_error": True}):
        with check("one cudaGraphLaunch for forward and one for backward"):
            criterion, output, target, keywords = every_kind()
            criterion.compile(mode="reduce-overhead")

            def forward() -> Tensor:
                torch.compiler.cudagraph_mark_step_begin()
                return criterion(output, target, **keywords)

            def both() -> None:
                forward().backward()
                taken(output)

            with torch.no_grad():
                count = graphs(forward)
            assert count == 1, f"forward without grad launches {count}"
            count = graphs(both)
            assert count == 2, f"forward and backward launch {count}"
        with check("one cudaGraphLaunch in all for criterion.backward"):
            criterion, output, target, keywords = every_kind()
            criterion.compile(mode="reduce-overhead")

            def fused() -> None:
                torch.compiler.cudagraph_mark_step_begin()
                criterion.backward(output, target, **keywords)
                taken(output)

            count = graphs(fused)
            assert count == 1, f"backward launches {count}"


def no_synchronisation() -> None:
    for name, options in {"eager": None, "compiled": {}, "reduce-overhead": {"mode": "reduce-overhead"}}.items():
        with check(f"no host synchronisation, {name}"):
            criterion, output, target, keywords = every_kind()
            if options is not None:
                criterion.compile(**options)
            for step in range(6):
                if step == 4:
                    torch.cuda.synchronize()
                    torch.cuda.set_sync_debug_mode("error")
                try:
                    torch.compiler.cudagraph_mark_step_begin()
                    criterion(output, target, **keywords).backward()
                    torch.compiler.cudagraph_mark_step_begin()
                    criterion.backward(output, target, **keywords)
                    criterion.weights["label"] = 0.25 * step
                    criterion.last.values  # noqa: B018  (reads a buffer on the device)
                finally:
                    if step == 5:
                        torch.cuda.set_sync_debug_mode("default")


def state() -> None:
    with check("weights changed between replays take effect, and last is right after later steps"):
        criterion = PathLossModule({"a": nn.MSELoss(), "b": nn.MSELoss()}).to(DEVICE)
        criterion.compile(mode="reduce-overhead")
        zeros = {name: torch.zeros(64, device=DEVICE) for name in "ab"}
        kept = []
        for step in range(8):
            torch.compiler.cudagraph_mark_step_begin()
            criterion.weights["b"] = float(step)
            output = {name: torch.full((64,), float(step), device=DEVICE, requires_grad=True) for name in "ab"}
            loss = criterion(output, zeros)
            assert loss.item() == step**2 * (1 + step), (step, loss.item())
            loss.backward()
            kept.append((criterion.last.total, criterion.last.log()))
        for step, (total, logged) in enumerate(kept):
            assert total.item() == step**2 * (1 + step)
            assert logged["weights/b"] == step
            assert logged["terms/a"] == step**2
    with check("a criterion on the CPU against outputs on the GPU raises"):
        criterion = PathLossModule({"a": nn.MSELoss()})
        criterion.compile(mode="reduce-overhead")
        tree = {"a": torch.zeros(2, device=DEVICE, requires_grad=True)}
        for way in (criterion, criterion.backward, criterion.value_and_grad):
            try:
                way(tree, {"a": torch.zeros(2, device=DEVICE)})
            except ArgumentError as error:
                message = str(error)
            else:
                message = "nothing was raised"
            assert "criterion.to('cuda:0')" in message, message


# Speed


def milliseconds(step: Callable[[], Any], calls: int) -> float:
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    for _ in range(calls):
        step()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / calls


def interleaved(variants: dict[str, Callable[[], Any]], calls: int, rounds: int = 9) -> dict[str, float]:
    for step in variants.values():
        for _ in range(5):
            step()
    torch.cuda.synchronize()
    samples: dict[str, list[float]] = {name: [] for name in variants}
    for _ in range(rounds):
        for name, step in variants.items():
            samples[name].append(milliseconds(step, calls))
    return {name: statistics.median(found) for name, found in samples.items()}


def speed_steps(shapes: list[tuple[int, ...]]) -> dict[str, Callable[[], Any]]:
    """Returns steps from outputs to gradients at them, by hand and with the container."""
    names = [f"head{i}" for i in range(len(shapes))]
    weights = {name: 0.5 + i / len(names) for i, name in enumerate(names)}
    output = {n: torch.randn(*s, device=DEVICE, requires_grad=True) for n, s in zip(names, shapes, strict=True)}
    target = {n: torch.randn(*s, device=DEVICE) for n, s in zip(names, shapes, strict=True)}

    def losses(output: Any, target: Any) -> Tensor:
        total: Any = 0.0
        for name in names:
            total = total + weights[name] * F.mse_loss(output[name], target[name])
        return total

    def ours(**compiled: Any) -> PathLossModule:
        criterion = PathLossModule({name: nn.MSELoss() for name in names}, weights=weights).to(DEVICE)
        if compiled.pop("compiled", True):
            criterion.compile(**compiled)
        return criterion

    def step(forward: Callable[[Any, Any], Tensor]) -> Callable[[], None]:
        def run() -> None:
            torch.compiler.cudagraph_mark_step_begin()
            for leaf in output.values():
                leaf.grad = None
            forward(output, target).backward()

        return run

    def fused(criterion: PathLossModule) -> Callable[[], None]:
        def run() -> None:
            torch.compiler.cudagraph_mark_step_begin()
            for leaf in output.values():
                leaf.grad = None
            criterion.backward(output, target)

        return run

    own, plain = _compile.options(), {"combo_kernels": False}
    overhead = {"mode": "reduce-overhead"}
    return {
        "by hand, eager": step(losses),
        "call, eager": step(ours(compiled=False)),
        "backward, eager": fused(ours(compiled=False)),
        "by hand, compiled": step(torch.compile(losses, fullgraph=True, options=plain)),
        "by hand, our options": step(torch.compile(losses, fullgraph=True, options=own)),
        "call, default options": step(ours(options=plain)),
        "call, our options": step(ours()),
        "backward, default options": fused(ours(options=plain)),
        "backward, our options": fused(ours()),
        "by hand, reduce-overhead": step(torch.compile(losses, fullgraph=True, **overhead)),
        "call, reduce-overhead, default options": step(ours(**overhead, options=plain)),
        "call, reduce-overhead, our options": step(ours(**overhead)),
        "backward, reduce-overhead, default options": fused(ours(**overhead, options=plain)),
        "backward, reduce-overhead, our options": fused(ours(**overhead)),
    }


def copy_bandwidth() -> float:
    """Returns bytes per second that a copy reads and writes."""
    source = torch.randn(2**28, device=DEVICE)
    destination = torch.empty_like(source)
    seconds = interleaved({"copy": lambda: destination.copy_(source)}, calls=20)["copy"] / 1e3
    return 2 * source.nbytes / seconds


def speed() -> dict[str, Any]:
    found: dict[str, Any] = {"copy bytes per second": copy_bandwidth()}
    for name, shapes in SIZES.items():
        torch._dynamo.reset()
        steps = speed_steps(shapes)
        calls = 10 if name == MEMORY_BOUND else 50
        times = interleaved(steps, calls)
        torch.cuda.empty_cache()
        memory = {}
        for variant in ("by hand, eager", "backward, eager", "by hand, compiled", "backward, default options"):
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            steps[variant]()
            torch.cuda.synchronize()
            memory[variant] = torch.cuda.max_memory_allocated() - before
        found[name] = {"milliseconds": times, "peak bytes above outputs": memory}
        print(f"\n{name}")
        for variant, time in times.items():
            print(f"  {variant:45s} {time * 1e3:10.1f} us  {time / times['by hand, compiled']:.2f} of compiled by hand")
        del steps
    return found


def targets(found: dict[str, Any]) -> dict[str, Any]:
    """Returns each target with what was measured."""

    def ratio(size: str, ours: str, theirs: str) -> float:
        times = found[size]["milliseconds"]
        return times[ours] / times[theirs]

    result: dict[str, Any] = {}
    for size in SIZES:
        ours = min(
            ("call, reduce-overhead, default options", "call, reduce-overhead, our options"),
            key=lambda variant, size=size: found[size]["milliseconds"][variant],
        )
        measured = ratio(size, ours, "by hand, reduce-overhead")
        result[f"call / by hand, reduce-overhead, {size} ({ours})"] = (measured, "at most 1.02", measured <= 1.02)
    best = min(
        v for k, v in found[MEMORY_BOUND]["milliseconds"].items() if k.startswith("backward") and "eager" not in k
    )
    measured = best / found[MEMORY_BOUND]["milliseconds"]["by hand, compiled"]
    result["best compiled backward / compiled by hand, memory-bound"] = (measured, "at most 0.70", measured <= 0.70)
    moved = 3 * sum(4 * a * b for a, b in SIZES[MEMORY_BOUND])
    share = moved / (best / 1e3) / found["copy bytes per second"]
    result["bandwidth of 3 passes over that of a copy"] = (share, "at least 0.80", share >= 0.80)
    small = min(v for k, v in found[SMALL]["milliseconds"].items() if k.startswith("backward, reduce-overhead"))
    measured = small / found[SMALL]["milliseconds"]["by hand, compiled"]
    result["backward with a CUDA graph / compiled by hand without, small"] = (
        measured,
        "at most 0.35",
        measured <= 0.35,
    )
    return result


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path(__file__).parent / "results" / "cuda.json")
    out = parser.parse_args().out
    if not torch.cuda.is_available():
        print("bench/cuda.py needs a GPU; there is none here.")
        return 0
    for part in (correctness, one_graph, no_synchronisation, state):
        part()
    result: dict[str, Any] = {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "device": torch.cuda.get_device_name(),
        "versions": {"torch": torch.__version__, "python": sys.version.split()[0]},
        "checks": checks,
    }
    with check("speed was measured"):
        result["speed"] = speed()
        result["targets"] = targets(result["speed"])
        print()
        for name, (measured, limit, holds) in result["targets"].items():
            print(f"{name}: {measured:.2f}, {limit}: {'holds' if holds else 'MISSED'}")
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(result, indent=2) + "\n")
    print(f"written to {out}")
    return 1 if any(text != "holds" for text in checks.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
