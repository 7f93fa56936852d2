"""``python -m torch_pathloss``: the demo; ``python -m torch_pathloss profile``: traces of its step."""

from __future__ import annotations

import argparse
import importlib.util
import pathlib
import sys

DEMO = ("sklearn", "rich", "matplotlib", "tensorboard")
EXTRAS = {**dict.fromkeys(DEMO, "demo"), "lightning": "lightning", "torch_tb_profiler": "profile"}


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m torch_pathloss",
        description="Trains a small detector on real handwritten digits with one criterion, "
        "and writes curves, predictions, metrics and TensorBoard events.",
        epilog="`python -m torch_pathloss profile` traces a step of it instead; see its --help.",
    )
    parser.add_argument("--epochs", type=_positive, default=16, help="default: 16")
    parser.add_argument("--seed", type=int, default=0, help="of data and weights; default: 0")
    parser.add_argument("--device", default="cpu", help="such as cpu or cuda; default: cpu")
    parser.add_argument("--compile", action="store_true", help="compile model and criterion")
    parser.add_argument("--engine", choices=("raw", "lightning"), default="raw", help="default: raw")
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("runs/demo"), help="default: runs/demo")
    parser.add_argument("--digits", type=_positive, help="train on the first so many digits only")
    return parser


def profile_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m torch_pathloss profile",
        description="Traces the demo's step by hand, eager, compiled and with criterion.backward, for TensorBoard, "
        "and prints a table read from the traces.",
    )
    parser.add_argument("--steps", type=_positive, default=3, help="traced steps; default: 3")
    parser.add_argument("--device", default="cpu", help="such as cpu or cuda; default: cpu")
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("runs/profile"), help="default: runs/profile")
    return parser


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, not {number}")
    return number


def missing_extras(needed: tuple[str, ...]) -> str | None:
    """Returns what to install, or `None` if everything is there."""
    missing = [name for name in needed if importlib.util.find_spec(name) is None]
    if not missing:
        return None
    extras = sorted({EXTRAS[name] for name in missing})
    return f"{', '.join(missing)} not found. Run: pip install 'torch-pathloss[{','.join(extras)}]'"


def unusable(device: str, out: pathlib.Path) -> str | None:
    """Returns what is wrong with a device or a folder, or `None`."""
    import torch

    try:
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        return f"The device {device!r} cannot be used: {str(error).splitlines()[0]}"
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        return f"Cannot write to --out {out}: {error.strerror}"
    return None


def main(arguments: list[str] | None = None) -> int:
    """Runs the command line. Returns the exit status: 130 after Ctrl-C, as a shell expects."""
    try:
        return _main(arguments)
    except KeyboardInterrupt:  # before the training began or after it ended; in between it is `run` that ends cleanly
        print("Interrupted.", file=sys.stderr)
        return 130


def _main(arguments: list[str] | None) -> int:
    arguments = sys.argv[1:] if arguments is None else arguments
    is_profile = arguments[:1] == ["profile"]
    options = profile_parser().parse_args(arguments[1:]) if is_profile else parser().parse_args(arguments)
    more = ("torch_tb_profiler",) if is_profile else ("lightning",) if options.engine == "lightning" else ()
    if problem := missing_extras((*DEMO, *more)) or unusable(options.device, options.out):
        print(problem, file=sys.stderr)
        return 1
    if is_profile:
        from torch_pathloss.demo._profile import run as run_profile

        return run_profile(**vars(options))
    from torch_pathloss.demo._run import run
    from torch_pathloss.demo._train import Settings

    return run(Settings(**vars(options)))


if __name__ == "__main__":
    sys.exit(main())
