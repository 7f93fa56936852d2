"""LibMTL 1.1.5's weights, where it has the same rule; `vectors/make_libmtl.py` made them."""

import json
from pathlib import Path

import torch

from torch_pathloss.weighting import DynamicWeightAverage, GeometricMean, Uncertainty

VECTORS = json.loads((Path(__file__).with_name("vectors") / "libmtl.json").read_text())
NAMES, SEEN = ("a", "b", "c"), torch.tensor([True, True, True])


def test_dynamic_weight_average_by_epoch():
    case = VECTORS["DWA"]
    weighting = DynamicWeightAverage(temperature=case["temperature"]).bind(NAMES)
    for means, expected in zip(case["means of epochs"], case["weights"], strict=True):
        for share in (0.5, 1.5):  # two steps, whose mean is that of the epoch
            found = weighting(share * torch.tensor(means), SEEN).weights
        torch.testing.assert_close(found, torch.tensor(expected), rtol=1e-5, atol=0)
        weighting.end_epoch()


def test_uncertainty():
    case = VECTORS["UW"]
    start = dict(zip(NAMES, case["log_variance"], strict=True))
    weighting = Uncertainty(log_variance=start).bind(NAMES)
    total, found = weighting(torch.tensor(case["losses"]), SEEN)
    torch.testing.assert_close(found, torch.tensor(case["weights"]))
    total.backward()
    torch.testing.assert_close(weighting.log_variance.grad, torch.tensor(case["gradient of log_variance"]))


def test_geometric_mean():
    case = VECTORS["GLS"]
    found = GeometricMean().bind(NAMES)(torch.tensor(case["losses"]), SEEN).weights
    torch.testing.assert_close(found, torch.tensor(case["weights"]))
