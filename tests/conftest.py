"""What all tests share: a fixed seed, and property tests that are the same in every run."""

import pytest
import torch
from hypothesis import settings

settings.register_profile("equipoise", deadline=None, max_examples=50, derandomize=True)
settings.load_profile("equipoise")


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)
