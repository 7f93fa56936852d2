"""Hypothesis profiles and one seed for every test."""

import pytest
import torch
from hypothesis import HealthCheck, settings

# The same examples on every machine; --hypothesis-profile=thorough looks for new ones.
settings.register_profile(
    "default", max_examples=500, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow]
)
settings.register_profile("thorough", max_examples=20_000, deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("default")


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)
