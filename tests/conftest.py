"""What all tests share: a fixed seed, property tests that are the same in every run, one thread where it matters."""

import signal

import pytest
import torch
from hypothesis import settings

settings.register_profile("equipoise", deadline=None, max_examples=50, derandomize=True)
settings.load_profile("equipoise")

# What a shell starts in its background ignores Ctrl-C, and so does all that it starts in turn. Some tests send it.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture
def one_thread():
    """torch computes in one thread."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
