"""IMTLL against TorchJD's."""

import torch
from torchjd import scalarization

from torch_pathloss.weighting import IMTLL

ALL = torch.tensor([True, True])


def test_it_trains_as_torchjd_does():
    ours, theirs = IMTLL().bind(["a", "b"]), scalarization.IMTLL(2)
    optimizers = [torch.optim.Adam(module.parameters(), lr=0.1) for module in (ours, theirs)]
    for step in range(30):
        values = [torch.tensor([1.0 + step, 0.05], requires_grad=True) for _ in range(2)]
        totals = [ours(values[0], ALL).total, theirs(values[1])]
        torch.testing.assert_close(*totals)
        for total, optimizer in zip(totals, optimizers, strict=True):
            optimizer.zero_grad()
            total.backward()
            optimizer.step()
        torch.testing.assert_close(values[0].grad, values[1].grad)
    torch.testing.assert_close(ours.log_scale.data, theirs.log_scale.data)


def test_all_scaled_values_become_alike_whatever_the_weights_of_the_user():
    weighting = IMTLL().bind(["a", "b"])
    optimizer = torch.optim.SGD(weighting.parameters(), lr=0.05)
    values, weights = torch.tensor([8.0, 0.5]), torch.tensor([1.0, 3.0])
    for _ in range(500):
        optimizer.zero_grad()
        total, effective = weighting(values, ALL, weights)
        total.backward()
        optimizer.step()
    # at the optimum e^s v = 1
    torch.testing.assert_close(effective / weights * values, torch.ones(2))
