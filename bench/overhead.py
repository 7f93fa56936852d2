"""What the container costs in eager mode: forward and backward against the same losses written out by hand.

MSE on 64x16, one per term. By hand is a chain of ``total + weight * loss`` over the same modules.
Keras 3's CompileLoss on its torch backend stands beside them, where keras is installed.

    python -m bench.overhead
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from bench._timing import interleaved, save, table, verdict
from torch_pathloss import PathLossModule

LIMITS = {1: 1.15, 10: 0.90, 100: 0.80}
GROWTH_LIMIT = 1.3
COUNTS = (1, 10, 100, 1000)

Variant = Callable[[], torch.Tensor]


def variants(count: int) -> dict[str, Variant]:
    """Returns forward passes that give the same total."""
    names = [f"head{i}" for i in range(count)]
    weights = {name: 0.5 + i / count for i, name in enumerate(names)}
    output = {name: torch.randn(64, 16, requires_grad=True) for name in names}
    target = {name: torch.randn(64, 16) for name in names}
    criteria = {name: nn.MSELoss() for name in names}
    criterion = PathLossModule({name: nn.MSELoss() for name in names}, weights=weights)

    def by_hand() -> torch.Tensor:
        total: Any = 0.0
        for name, module in criteria.items():
            total = total + weights[name] * module(output[name], target[name])
        return total

    found: dict[str, Variant] = {"by hand": by_hand, "PathLossModule": lambda: criterion(output, target)}
    if count <= 100 and (keras := keras_variant(weights, output, target)):
        found["Keras CompileLoss"] = keras
    expected = by_hand()
    for variant in found.values():
        torch.testing.assert_close(variant(), expected)
    return found


def keras_variant(weights: dict[str, float], output: Any, target: Any) -> Variant | None:
    os.environ.setdefault("KERAS_BACKEND", "torch")
    try:
        from keras.src.trainers.compile_utils import CompileLoss
    except ImportError:
        return None
    import keras

    losses = {name: keras.losses.MeanSquaredError() for name in weights}
    compiled = CompileLoss(losses, loss_weights=weights)
    return lambda: compiled(target, output)


def with_backward(forward: Variant) -> Callable[[], None]:
    def step() -> None:
        forward().backward()

    return step


def main() -> None:
    torch.set_num_threads(1)
    results: list[dict[str, Any]] = []
    for count in COUNTS:
        calls = max(2, 2000 // count)
        forwards = variants(count)
        keras = forwards.pop("Keras CompileLoss", None)
        row: dict[str, Any] = {"terms": count}
        row["forward"] = interleaved(forwards, calls=calls, rounds=21)
        row["step"] = interleaved({k: with_backward(f) for k, f in forwards.items()}, calls=calls, rounds=21)
        if keras is not None:  # a tenth of the calls, since it is slow; beside the others once more
            both = {"by hand": forwards["by hand"], "Keras CompileLoss": keras}
            for kind, pair in (("forward", both), ("step", {k: with_backward(f) for k, f in both.items()})):
                timed = interleaved(pair, calls=max(1, calls // 10), rounds=11)
                row[kind]["Keras CompileLoss"] = row[kind]["by hand"] * timed["Keras CompileLoss"] / timed["by hand"]
        results.append(row)
    report(results)


def report(results: list[dict[str, Any]]) -> None:
    head = ["forward + backward", "by hand", "ours", "ratio", "Keras ratio", "forward ratio", "Keras forward"]
    rows = []
    for row in results:
        step, forward = row["step"], row["forward"]
        row["limit"] = LIMITS.get(row["terms"])
        row["ratio"] = step["PathLossModule"] / step["by hand"]
        rows.append(
            [
                f"{row['terms']} terms",
                f"{step['by hand'] * 1e6:.1f} us",
                f"{step['PathLossModule'] * 1e6:.1f} us",
                verdict(row["ratio"], row["limit"]),
                keras_ratio(step),
                f"{forward['PathLossModule'] / forward['by hand']:.2f}",
                keras_ratio(forward),
            ]
        )
    per_term = {row["terms"]: row["step"]["PathLossModule"] / row["terms"] for row in results}
    growth = per_term[1000] / per_term[10]
    print(table(head, rows))
    print(f"time per term at 1000 terms over that at 10: {verdict(growth, GROWTH_LIMIT)}")
    found = {"rows": results, "growth": growth, "growth limit": GROWTH_LIMIT}
    print(f"written to {save('overhead', found)}")


def keras_ratio(times: dict[str, float]) -> str:
    keras = times.get("Keras CompileLoss")
    return "" if keras is None else f"{keras / times['by hand']:.1f}"


if __name__ == "__main__":
    main()
