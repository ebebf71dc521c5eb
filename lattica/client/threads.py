"""Handler threads of the sync client: quick handlers share one thread, slow ones get more.

Waking a thread costs more than a small handler, so requests that arrived together are run one after the other by one
thread. While requests wait, whoever feeds the pool calls `help_out` every millisecond, and another thread joins
each time that none has begun in between: handlers that take long spread over all threads within some milliseconds.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable
from typing import Final

HELP_AFTER: Final = 0.001
"""Seconds that requests wait before another thread joins: ten times what a small handler takes."""

Job = Callable[[], None]


class HandlerThreads:
    """At most `limit` daemon threads that run jobs in order. Jobs must not raise."""

    def __init__(self, limit: int, name: str) -> None:
        self._limit = limit
        self._name = name
        self._jobs: deque[Job] = deque()
        self._idle: list[threading.Lock] = []
        self._count = 0
        self._mutex = threading.Lock()
        self._closed = False
        self._begun = 0
        """Jobs begun, roughly: threads add to it without a lock. It only has to change."""
        self._begun_before = 0

    def submit(self, jobs: Iterable[Job]) -> None:
        """Run these jobs soon."""
        with self._mutex:
            self._jobs.extend(jobs)
            if self._idle or not self._count:
                self._add_thread()

    def waiting(self) -> bool:
        """Some job has not begun."""
        return bool(self._jobs)

    def help_out(self) -> None:
        """Let one more thread join, if jobs wait and none has begun since the last time."""
        with self._mutex:
            if self._jobs and self._begun == self._begun_before:
                self._add_thread()
            self._begun_before = self._begun

    def close(self) -> None:
        """Forget jobs that have not begun; threads end as their job does."""
        with self._mutex:
            self._closed = True
            self._jobs.clear()
            for parked in self._idle:
                parked.release()
            self._idle.clear()

    def _add_thread(self) -> None:
        if self._idle:
            self._idle.pop().release()
        elif self._count < self._limit and not self._closed:
            self._count += 1
            threading.Thread(target=self._work, name=f"{self._name}-{self._count}", daemon=True).start()

    def _work(self) -> None:
        try:
            self._run_jobs()
        except BaseException:
            with self._mutex:  # or so many bad jobs would leave no thread to run the good ones
                self._count -= 1
            raise

    def _run_jobs(self) -> None:
        parked = threading.Lock()
        parked.acquire()
        jobs = self._jobs
        while True:
            try:
                job = jobs.popleft()
            except IndexError:
                with self._mutex:
                    if self._closed:
                        return
                    if jobs:
                        continue
                    self._idle.append(parked)
                parked.acquire()
                continue
            self._begun += 1
            job()
            del job
