"""A run is asked to stop, and does so where nothing is lost."""

from __future__ import annotations

import os
import signal
import threading

import pytest

from smca_model.training import signals
from smca_model.training.signals import Stopped, StopSignals


def test_a_second_signal_stops_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(signals, "MIN_SECONDS_BETWEEN_REQUESTS", 0.0)
    with StopSignals() as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.number == signal.SIGTERM
        with pytest.raises(Stopped):
            os.kill(os.getpid(), signal.SIGINT)


def test_a_request_that_comes_twice_is_one() -> None:
    with StopSignals() as stop:
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGTERM)
        assert stop.number == signal.SIGTERM


def test_during_an_evaluation_the_first_signal_stops() -> None:
    with StopSignals() as stop, pytest.raises(Stopped), stop.stopping_at_once():
        os.kill(os.getpid(), signal.SIGINT)


def test_a_signal_from_before_stops_what_stops_at_once_before_it_begins() -> None:
    began = False
    with StopSignals() as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        with pytest.raises(Stopped, match="SIGTERM") as raised, stop.stopping_at_once():
            began = True
    assert not began
    assert raised.value.status == 128 + signal.SIGTERM
    assert not stop.at_once


def test_outside_the_main_thread_signals_are_left_alone() -> None:
    before, seen = signal.getsignal(signal.SIGINT), []

    def enter() -> None:
        with StopSignals():
            seen.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    assert seen == [before]
