"""For all tests."""

import signal

import pytest

# A shell's background job ignores Ctrl-C, and so would the runs that tests start and stop.
signal.signal(signal.SIGINT, signal.default_int_handler)


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
