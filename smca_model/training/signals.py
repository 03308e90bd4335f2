"""Stopping a run between two steps, when Ctrl-C or a scheduler asks for it."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import threading
import time
from collections.abc import Iterator
from typing import Any

logger = logging.getLogger(__name__)

MIN_SECONDS_BETWEEN_REQUESTS = 1.0  # a scheduler and torchrun may each pass on the same one


class Stopped(KeyboardInterrupt):
    """Training was stopped by a signal."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.status = 128 + number  # as shells report it


class StopSignals:
    """Handlers of SIGINT and SIGTERM: the first asks for a stop after the current step, a second one stops at once.

    The second must come `MIN_SECONDS_BETWEEN_REQUESTS` later.
    """

    def __init__(self) -> None:
        self.number = 0
        self.at_once = False
        self._first = 0.0
        self._pid = os.getpid()
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():
            self._before = {n: signal.signal(n, self._receive) for n in (signal.SIGINT, signal.SIGTERM)}
        return self

    @contextlib.contextmanager
    def stopping_at_once(self) -> Iterator[None]:
        """Stop at the first signal: for work that loses nothing, while the end of the step is far.

        Raises:
            Stopped: also where a signal came before, and nothing has stopped for it yet.
        """
        self.at_once = True
        try:
            if self.number:
                raise Stopped(self.number)
            yield
        finally:
            self.at_once = False

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _receive(self, number: int, frame: object) -> None:
        if os.getpid() != self._pid:
            return
        if self.at_once or (self.number and time.monotonic() - self._first >= MIN_SECONDS_BETWEEN_REQUESTS):
            raise Stopped(number)
        if not self.number:
            self.number, self._first = number, time.monotonic()
            logger.warning("%s: stopping after this step", signal.Signals(number).name)
