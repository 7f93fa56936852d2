"""Writes `libmtl.json`: the weights by which LibMTL 1.1.5 multiplies gradients, for weightings that it has too.

Run in a throwaway environment, since the package asks for torchvision and builds of torch for CUDA:

    python -m venv /tmp/libmtl
    /tmp/libmtl/bin/pip install numpy torch==2.13.0 --index-url https://download.pytorch.org/whl/cpu
    /tmp/libmtl/bin/pip install --no-deps LibMTL==1.1.5
    /tmp/libmtl/bin/python tests/weighting/vectors/make_libmtl.py
"""

import importlib
import importlib.util
import json
import sys
import types
from pathlib import Path

import numpy as np
import torch


def stub_packages() -> None:
    """Lets single modules be imported without the packages' own imports, which need torchvision."""
    root = Path(importlib.util.find_spec("LibMTL").origin).parent
    for name, path in (("LibMTL", root), ("LibMTL.weighting", root / "weighting")):
        package = types.ModuleType(name)
        package.__path__ = [str(path)]
        sys.modules[name] = package


def make(name: str, count: int):
    weighting = getattr(importlib.import_module(f"LibMTL.weighting.{name}"), name)()
    weighting.task_num, weighting.device = count, torch.device("cpu")
    weighting.init_param()
    return weighting


def gradient(weighting, losses: list[float], **options: object) -> list[float]:
    """Returns the derivative of what LibMTL calls `backward` on by each loss: its weight."""
    leaf = torch.tensor(losses, dtype=torch.float64, requires_grad=True)
    weighting.backward(leaf, **options)
    return leaf.grad.tolist()


def main() -> None:
    stub_packages()
    generator = np.random.default_rng(0)
    epochs = np.round(generator.uniform(0.5, 2.0, (6, 3)) * [1.0, 30.0, 0.1], 4)
    dwa = make("DWA", 3)
    dwa.train_loss_buffer = epochs.T
    weights = []
    for dwa.epoch in range(len(epochs)):
        weights.append(gradient(dwa, [1.0, 1.0, 1.0], T=2.0))
    found = {"DWA": {"temperature": 2.0, "means of epochs": epochs.tolist(), "weights": weights}}

    uw, scale = make("UW", 3), [-0.5, 0.25, 1.0]
    uw.loss_scale.data = torch.tensor(scale, dtype=torch.float64)
    losses = epochs[0].tolist()
    found["UW"] = {"log_variance": scale, "losses": losses, "weights": gradient(uw, losses)}
    found["UW"]["gradient of log_variance"] = uw.loss_scale.grad.tolist()
    found["GLS"] = {"losses": losses, "weights": gradient(make("GLS", 3), losses)}
    Path(__file__).with_name("libmtl.json").write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
