"""Traces of the demo's step by hand and with the container, and a table read from them."""

from __future__ import annotations

import dataclasses
import gzip
import json
import pathlib
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor

from torch_pathloss.demo._data import IGNORED, DigitTarget, load
from torch_pathloss.demo._model import Detector, iou, make_criterion
from torch_pathloss.demo._train import Settings, batches

WARM_UP = 2
_SYNCHRONISING = (
    "cudaStreamSynchronize",
    "cudaDeviceSynchronize",
    "cudaEventSynchronize",
    "cudaMemcpy",
    "aten::_local_scalar_dense",
)


@dataclasses.dataclass
class Counts:
    """What one step does, averaged over the steps of a trace; ``step_us`` is measured without tracing."""

    operations: float
    kernels: float
    graph_launches: float
    host_syncs: float
    device_us: float
    step_us: float


def by_hand(output: Any, target: DigitTarget) -> Tensor:
    """Returns what the demo's criterion gives, written out."""
    detection, shown = target["detection"], target["detection"]["confidence"]
    box = F.smooth_l1_loss(output["detection"]["bbox"], detection["bbox"], beta=0.1, reduction="none")
    total: Tensor = F.cross_entropy(
        output["classification"], target["classification"], ignore_index=IGNORED, label_smoothing=0.05
    )
    overlap = iou(output["detection"]["bbox"], detection["bbox"])
    total = total + ((1 - overlap) * shown).sum() / shown.sum()
    total = total + 5.0 * (box * shown[:, None]).sum() / (4 * shown.sum())
    total = total + F.binary_cross_entropy_with_logits(output["detection"]["confidence"], shown)
    maps = [F.binary_cross_entropy_with_logits(o, t) for o, t in zip(output["aux"], target["aux"], strict=True)]
    return total + 0.5 * torch.stack(maps).mean()


def variants(device: torch.device) -> dict[str, Callable[[], None]]:
    """Returns training steps of the demo by name; each has a model of its own."""
    settings = Settings(device=str(device))
    images, target = next(batches(load(0)[0], settings, epoch=1))

    def step(loss: Callable[[Any], Tensor | None]) -> Callable[[], None]:
        torch.manual_seed(0)
        model = Detector().to(device)
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)

        def run() -> None:
            optimizer.zero_grad()
            found = loss(model(images))
            if found is not None:
                found.backward()  # type: ignore[no-untyped-call]
            optimizer.step()

        return run

    eager, compiled, fused = (make_criterion().to(device) for _ in range(3))
    eager.annotate = True
    compiled.compile()
    fused.compile()

    def backward(output: Any) -> None:
        fused.backward(output, target)

    return {
        "by hand": step(lambda output: by_hand(output, target)),
        "eager": step(lambda output: eager(output, target)),
        "compiled": step(lambda output: compiled(output, target)),
        "criterion.backward": step(backward),
    }


def record(step: Callable[[], None], folder: pathlib.Path, steps: int) -> pathlib.Path:
    """Writes a trace that TensorBoard opens, and returns its file."""
    for old in folder.glob("*.pt.trace.json.gz"):
        old.unlink()
    activities = [torch.profiler.ProfilerActivity.CPU]
    if torch.cuda.is_available():
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(
        activities=activities,
        schedule=torch.profiler.schedule(wait=0, warmup=WARM_UP, active=steps),
        on_trace_ready=torch.profiler.tensorboard_trace_handler(str(folder), use_gzip=True),
    ) as profile:
        for _ in range(WARM_UP + steps):
            step()
            profile.step()
    return next(folder.glob("*.pt.trace.json.gz"))


def timed(step: Callable[[], None], device: torch.device, rounds: int = 20) -> float:
    """Returns the median microseconds of a step. Tracing itself costs more than the step where clocks are slow."""

    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize()

    times = []
    for _ in range(rounds):
        wait()
        start = time.perf_counter()
        step()
        wait()
        times.append(time.perf_counter() - start)
    return statistics.median(times) * 1e6


def read(trace: pathlib.Path, steps: int, step_us: float) -> Counts:
    """Counts what a trace holds."""
    with gzip.open(trace, "rt") as file:
        events = [event for event in json.load(file)["traceEvents"] if event.get("ph") == "X"]
    kernels = [event for event in events if event.get("cat") == "kernel"]
    return Counts(
        operations=sum(event.get("cat") == "cpu_op" for event in events) / steps,
        kernels=len(kernels) / steps,
        graph_launches=sum(event["name"] == "cudaGraphLaunch" for event in events) / steps,
        host_syncs=sum(event["name"] in _SYNCHRONISING for event in events) / steps,
        device_us=sum(event["dur"] for event in kernels) / steps,
        step_us=step_us,
    )


def run(out: pathlib.Path, device: str, steps: int) -> int:
    """Traces every variant, prints the table, and writes it as JSON."""
    console = Console()
    if not console.is_terminal:
        console = Console(width=110)
    table = Table(title=f"one step of the demo on {device}, from {steps} traced steps", title_justify="left")
    for heading in ("variant", "operations", "kernels", "graph launches", "host syncs", "device time", "step"):
        table.add_column(heading, justify="left" if heading == "variant" else "right")
    found: dict[str, Any] = {}
    for name, step in variants(torch.device(device)).items():
        trace = record(step, out / name.replace(" ", "_").replace(".", "_"), steps)
        counts = read(trace, steps, timed(step, torch.device(device)))
        found[name] = dataclasses.asdict(counts)
        table.add_row(
            name,
            f"{counts.operations:.0f}",
            f"{counts.kernels:.0f}",
            f"{counts.graph_launches:.0f}",
            f"{counts.host_syncs:.0f}",
            f"{counts.device_us:.0f} us",
            f"{counts.step_us:.0f} us",
        )
    (out / "profile.json").write_text(json.dumps(found, indent=2) + "\n")
    console.print(table)
    console.print(f"written to {out}/; look at it with: tensorboard --logdir {out}", highlight=False, soft_wrap=True)
    return 0
