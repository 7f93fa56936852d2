"""What the container costs compiled, on the CPU: a step, the time to compile, and loss with gradients in one graph.

By hand is the same chain of ``total + weight * loss``, compiled with the same options.

    python -m bench.compiled
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from bench._timing import interleaved, save, table
from torch_pathloss import PathLossModule

STEPS = {"10 terms of 256x64": ([(256, 64)] * 10, 1.10), "4 terms of 4096x512": ([(4096, 512)] * 4, 1.03)}
BACKWARD_LIMIT = 1.0
COMPILE_LIMIT = 1.3


def make(shapes: list[tuple[int, ...]]) -> tuple[Callable[[Any, Any], Tensor], PathLossModule, Any, Any]:
    """Returns losses by hand, the container, and an output behind one operation of a model, with its target."""
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
        compiled = torch.compile(hand, fullgraph=True)
        criterion.compile()

        def by_hand(compiled: Any = compiled, output: Any = output, target: Any = target) -> None:
            clear(output)
            compiled(output, target).backward()

        def call(criterion: Any = criterion, output: Any = output, target: Any = target) -> None:
            clear(output)
            criterion(output, target).backward()

        def backward(criterion: Any = criterion, output: Any = output, target: Any = target) -> None:
            clear(output)
            criterion.backward(output, target)

        variants = {"by hand": by_hand, "call": call, "backward": backward}
        rows.append({"case": name, "limit": limit, **interleaved(variants, calls=20, rounds=41)})
    return rows


def compile_times() -> list[dict[str, Any]]:
    """Seconds from nothing to the end of the first forward and backward, with every cache off."""
    rows = []
    for count, rounds in ((10, 3), (100, 2)):
        times: dict[str, list[float]] = {"by hand": [], "call": []}
        for _ in range(rounds):
            for name, found in times.items():
                torch._dynamo.reset()
                hand, criterion, output, target = make([(64, 16)] * count)
                function = torch.compile(hand if name == "by hand" else criterion, fullgraph=True)
                start = time.perf_counter()
                function(output, target).backward()
                found.append(time.perf_counter() - start)
        rows.append({"case": f"{count} terms of 64x16", **{k: statistics.median(v) for k, v in times.items()}})
    return rows


def verdict(ratio: float, limit: float) -> str:
    return f"{ratio:.2f}, limit {limit:.2f} {'holds' if ratio <= limit else 'MISSED'}"


def main() -> None:
    torch._inductor.config.force_disable_caches = True
    stepped = steps()
    head = ["compiled, forward + backward", "by hand", "call", "call / by hand", "backward", "backward / by hand"]
    rows = []
    for row in stepped:
        fused = row["backward"] / row["by hand"]
        rows.append(
            [
                row["case"],
                f"{row['by hand'] * 1e6:.0f} us",
                f"{row['call'] * 1e6:.0f} us",
                verdict(row["call"] / row["by hand"], row["limit"]),
                f"{row['backward'] * 1e6:.0f} us",
                verdict(fused, BACKWARD_LIMIT) if row["case"].startswith("4 ") else f"{fused:.2f}",
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
