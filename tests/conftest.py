"""For all tests."""

import signal

import pytest


@pytest.fixture(autouse=True)
def handlers_are_as_before():
    """Whatever a test did to a run, the run has put the signals' handlers back."""
    numbers = signal.SIGINT, signal.SIGTERM, signal.SIGHUP
    before = [signal.getsignal(number) for number in numbers]
    yield
    after = [signal.getsignal(number) for number in numbers]
    for number, handler in zip(numbers, before, strict=True):
        signal.signal(number, handler)  # so that only this test fails
    assert after == before
