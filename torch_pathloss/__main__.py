"""``python -m torch_pathloss``: the demo."""

from __future__ import annotations

import argparse
import importlib.util
import pathlib
import sys

EXTRAS = {"sklearn": "demo", "rich": "demo", "matplotlib": "demo", "tensorboard": "demo", "lightning": "lightning"}


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m torch_pathloss",
        description="Trains a small detector on real handwritten digits with one criterion, "
        "and writes curves, predictions, metrics and TensorBoard events.",
    )
    parser.add_argument("--epochs", type=_positive, default=16, help="default: 16")
    parser.add_argument("--seed", type=int, default=0, help="of data and weights; default: 0")
    parser.add_argument("--device", default="cpu", help="such as cpu or cuda; default: cpu")
    parser.add_argument("--compile", action="store_true", help="compile model and criterion")
    parser.add_argument("--engine", choices=("raw", "lightning"), default="raw", help="default: raw")
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("runs/demo"), help="default: runs/demo")
    parser.add_argument("--digits", type=_positive, help="train on the first so many digits only")
    return parser


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, not {number}")
    return number


def missing_extra(engine: str) -> str | None:
    """Returns what to install, or `None` if everything is there."""
    needed = [name for name, extra in EXTRAS.items() if extra == "demo" or engine == extra]
    missing = [name for name in needed if importlib.util.find_spec(name) is None]
    if not missing:
        return None
    extras = sorted({EXTRAS[name] for name in missing})
    return f"{', '.join(missing)} not found. Run: pip install 'torch-pathloss[{','.join(extras)}]'"


def main(arguments: list[str] | None = None) -> int:
    options = parser().parse_args(arguments)
    if problem := missing_extra(options.engine):
        print(problem, file=sys.stderr)
        return 1
    import torch

    try:
        torch.zeros(1, device=options.device)
    except (RuntimeError, AssertionError) as error:
        print(f"The device {options.device!r} cannot be used: {str(error).splitlines()[0]}", file=sys.stderr)
        return 1
    try:
        options.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        print(f"Cannot write to --out {options.out}: {error.strerror}", file=sys.stderr)
        return 1
    from torch_pathloss.demo._run import run
    from torch_pathloss.demo._train import Settings

    return run(Settings(**vars(options)))


if __name__ == "__main__":
    sys.exit(main())
