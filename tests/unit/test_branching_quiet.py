"""Copies hold still for windows, and keep to a bandwidth."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest

from forkpointd.branching import quiet as quiet_module
from forkpointd.branching.page_cache import PageCache
from forkpointd.branching.quiet import Bandwidth, Pace, Quiet

SECONDS = 10.0


def never() -> bool:
    return False


class HeldCopy:
    """A copy in a thread, and how far it came."""

    def __init__(self, quiet: Quiet, should_stop: Callable[[], bool] = never) -> None:
        self.asked = threading.Event()
        self.passed = threading.Event()
        self._quiet, self._should_stop = quiet, should_stop
        threading.Thread(target=self._run, daemon=True).start()

    def _run(self) -> None:
        def asked() -> bool:
            self.asked.set()
            return self._should_stop()

        self._quiet.wait(asked)
        self.passed.set()


def test_a_copy_goes_on_when_the_last_window_is_closed() -> None:
    quiet = Quiet()
    with quiet.window():
        with quiet.window():
            copy = HeldCopy(quiet)
            assert copy.asked.wait(SECONDS), "it holds still, and looks whether it is to stop"
        copy.asked.clear()
        assert copy.asked.wait(SECONDS), "one window is still open"
        assert not copy.passed.is_set()
    assert copy.passed.wait(SECONDS)
    assert quiet.held_seconds > 0


def test_a_held_copy_can_be_stopped() -> None:
    quiet, stop = Quiet(), threading.Event()
    with quiet.window():
        copy = HeldCopy(quiet, stop.is_set)
        assert copy.asked.wait(SECONDS)
        stop.set()
        assert copy.passed.wait(SECONDS)


def test_without_a_window_nothing_waits_and_an_error_in_a_window_ends_it() -> None:
    quiet = Quiet()
    quiet.wait(lambda: pytest.fail("it waited"))
    with pytest.raises(ZeroDivisionError), quiet.window():
        raise ZeroDivisionError
    quiet.wait(lambda: pytest.fail("it waited"))
    assert quiet.held_seconds == 0


class Clock:
    """Time that passes by being slept."""

    def __init__(self) -> None:
        self.now = 1_000.0

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        assert seconds > 0
        self.now += seconds


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(quiet_module, "time", made)
    return made


def test_bytes_take_their_time_and_a_rest_earns_no_burst(clock: Clock) -> None:
    bandwidth = Bandwidth(1_000)
    for _ in range(5):
        bandwidth.spend(400, never)
    assert clock.now == pytest.approx(1_002.0)
    clock.now += 3_600
    bandwidth.spend(400, never)
    assert clock.now == pytest.approx(4_602.4)


def test_two_copies_share_the_bandwidth(clock: Clock) -> None:
    bandwidth = Bandwidth(1_000)
    told: list[int] = []
    progress = Pace(never, Quiet(), bandwidth, PageCache(None)).paying(told.append)
    with ThreadPoolExecutor(2) as threads:
        for _ in threads.map(progress, [500] * 8):
            pass
    assert sum(told) == 4_000
    assert clock.now >= 1_004.0 - 1e-6


def test_who_waits_to_pay_can_be_stopped(clock: Clock) -> None:
    answers = iter([False, False, True])
    Bandwidth(1).spend(3_600, lambda: next(answers))
    assert clock.now < 1_001


def test_no_limit_is_no_wait(clock: Clock) -> None:
    Bandwidth(None).spend(1 << 60, lambda: pytest.fail("it waited"))
    assert clock.now == 1_000.0
