"""For all tests."""

import signal

import pytest


@pytest.fixture(autouse=True)
def restored_signals():
    """A run that is stopped leaves its handlers behind, which is no matter where the process ends."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)
