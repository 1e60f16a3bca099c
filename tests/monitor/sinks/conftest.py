"""A server for each test that asks for one."""

import pytest
from tests.monitor.sinks.cases import Server


@pytest.fixture
def server():
    server = Server()
    yield server
    server.close()
