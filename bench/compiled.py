"""What the container costs compiled, on the CPU: a step, the time to compile, and loss with gradients in one graph.

By hand is the same chain of ``total + weight * loss``, compiled with the options of `criterion.compile()` too, and
beside it with Inductor's default options. The outputs are leaves: what is measured ends at their gradients.

    python -m bench.compiled
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from bench._timing import interleaved, save, table, verdict
from torch_pathloss import PathLossModule, _compile

STEPS = {"10 terms of 256x64": ([(256, 64)] * 10, 1.10), "4 terms of 4096x512": ([(4096, 512)] * 4, 1.03)}
BACKWARD_LIMIT = 1.0
COMPILE_LIMIT = 1.3


def make(shapes: list[tuple[int, ...]]) -> tuple[Callable[[Any, Any], Tensor], PathLossModule, Any, Any]:
    """Returns losses by hand, the container, an output and its target."""
    names = [f"head{i}" for i in range(len(shapes))]
    weights = {name: 0.5 + i / len(names) for i, name in enumerate(names)}
    criteria = {name: nn.MSELoss() for name in names}
    criterion = PathLossModule({name: nn.MSELoss() for name in names}, weights=weights)
    output = {name: torch.randn(*shape, requires_grad=True) for name, shape in zip(names, shapes, strict=True)}
    target = {name: torch.randn(*shape) for name, shape in zip(names, shapes, strict=True)}

    def by_hand(output: Any, target: Any) -> Tensor:
        total: Any = 0.0
        for name, module in criteria.items():
            total = total + weights[name] * module(output[name], target[name])
        return total

    return by_hand, criterion, output, target


def clear(output: Any) -> None:
    for leaf in output.values():
        leaf.grad = None


def steps() -> list[dict[str, Any]]:
    """Forward and backward of compiled criteria, gradients at the outputs as the result."""
    rows = []
    for name, (shapes, limit) in STEPS.items():
        torch._dynamo.reset()
        hand, criterion, output, target = make(shapes)
        criterion.compile()

        def step(function: Any, output: Any = output, target: Any = target) -> Callable[[], None]:
            def run() -> None:
                clear(output)
                function(output, target).backward()

            return run

        def backward(criterion: Any = criterion, output: Any = output, target: Any = target) -> None:
            clear(output)
            criterion.backward(output, target)

        variants = {
            "by hand": step(torch.compile(hand, fullgraph=True, options=_compile.options())),
            "by hand, default options": step(torch.compile(make(shapes)[0], fullgraph=True)),
            "call": step(criterion),
            "backward": backward,
        }
        times = interleaved(variants, calls=20, rounds=41)
        limits = {"call": limit, "backward": BACKWARD_LIMIT if name.startswith("4 ") else None}
        rows.append({"case": name, "limits": limits, **times})
    return rows


def compile_times() -> list[dict[str, Any]]:
    """Seconds from nothing to the end of the first forward and backward, with every cache off and the same options."""
    rows = []
    compile_once("by hand", 2)  # Inductor's imports and precompiled headers
    for count, rounds in ((10, 3), (100, 2)):
        times: dict[str, list[float]] = {"by hand": [], "call": []}
        for _ in range(rounds):
            for name, found in times.items():
                found.append(compile_once(name, count))
        medians = {name: statistics.median(found) for name, found in times.items()}
        rows.append({"case": f"{count} terms of 64x16", "limits": {"call": COMPILE_LIMIT}, **medians})
    return rows


def compile_once(name: str, count: int) -> float:
    torch._dynamo.reset()
    hand, criterion, output, target = make([(64, 16)] * count)
    function: Any = criterion
    if name == "by hand":
        function = torch.compile(hand, fullgraph=True, options=_compile.options())
    else:
        criterion.compile()
    start = time.perf_counter()
    function(output, target).backward()
    return time.perf_counter() - start


def main() -> None:
    torch._inductor.config.force_disable_caches = True
    stepped = steps()
    head = ["compiled, forward + backward", "by hand", "default options", "call / by hand", "backward / by hand"]
    rows = []
    for row in stepped:
        ratios = {way: row[way] / row["by hand"] for way in row if way not in ("case", "limits")}
        rows.append(
            [
                row["case"],
                f"{row['by hand'] * 1e6:.0f} us",
                f"{ratios['by hand, default options']:.2f}",
                verdict(ratios["call"], row["limits"]["call"]),
                verdict(ratios["backward"], row["limits"]["backward"]),
            ]
        )
    print(table(head, rows))
    print()
    compiled = compile_times()
    head = ["time to compile", "by hand", "PathLossModule", "ratio"]
    print(
        table(
            head,
            [
                [
                    r["case"],
                    f"{r['by hand']:.1f} s",
                    f"{r['call']:.1f} s",
                    verdict(r["call"] / r["by hand"], COMPILE_LIMIT),
                ]
                for r in compiled
            ],
        )
    )
    print(f"written to {save('compiled', {'steps': stepped, 'compile times': compiled})}")


if __name__ == "__main__":
    main()
