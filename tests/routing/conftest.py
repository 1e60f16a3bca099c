"""What the routing tests share: a way to see a layer's decision. The routers themselves are in cases.py."""

import pytest
from tests.seen import forward_and_see


@pytest.fixture
def routed_by():
    """(output, what observers saw) of one forward of a layer."""
    return forward_and_see
