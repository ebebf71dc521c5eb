"""Checks the signatures of many operations beside the trio thread: in a thread, or, when many come, in processes.

A first sync brings a hundred thousand operations. Checking their signatures is most of the work, and threads cannot
share it with the taking in of what was checked (`verifier` says why). So when more than `PROCESSES_OVER` operations
wait, processes are started, as many as there are cores and at most `MAX_PROCESSES`; they check all that comes until
nothing came for `IDLE` seconds. Where no process can be started, threads do it.
"""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path

import trio

from lattica_protocols.replica.operation import SIGNED_PREFIX, Operation

log = logging.getLogger("lattica.replica")

PROCESSES_OVER = 2048
"""Operations waiting for their check: two full messages, 90 ms of one core. Starting a process takes as long."""
MAX_PROCESSES = 4
"""The thread that takes the operations in keeps up with two or three."""
IDLE = 5.0
"""Seconds without work after which the processes end: a sync that waits for the network goes on sooner."""
PROGRAM = Path(__file__).with_name("verifier.py")


class SignatureChecker:
    """Of one service. Processes are used while `run` runs."""

    def __init__(self) -> None:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        # A frozen program is its own `sys.executable`: it would be started again.
        usable = cores > 1 and bool(sys.executable) and not getattr(sys, "frozen", False)
        self.max_processes = min(cores, MAX_PROCESSES) if usable else 0
        self.checked_in_processes = 0
        """Operations so far."""
        self._waiting = 0
        self._running = False
        self._processes: list[_Verifier] = []
        self._idle: list[_Verifier] = []
        self._slots = trio.Semaphore(max(1, self.max_processes))
        self._worked = trio.Event()
        self._used_at = 0.0

    async def run(self) -> None:
        """End processes that are idle; all of them when cancelled."""
        self._running = True
        try:
            while True:
                if not self._processes or self._waiting:
                    self._worked = trio.Event()
                    await self._worked.wait()
                elif trio.current_time() >= self._used_at + IDLE:
                    self._end_all()
                else:
                    await trio.sleep_until(self._used_at + IDLE)
        finally:
            self._running = False
            self._end_all()

    def processes(self) -> int:
        """How many run now."""
        return len(self._processes)

    async def check(self, operations: Sequence[Operation], space: bytes) -> None:
        """Check all of them: those with a right signature are `verified` afterwards."""
        self._waiting += len(operations)
        try:
            if self._processes or (self._running and self.max_processes and self._waiting > PROCESSES_OVER):
                async with self._slots:
                    done = await self._check_in_process(operations, space)
                if done:
                    return
            await trio.to_thread.run_sync(_check_here, operations, space)
        finally:
            self._waiting -= len(operations)
            self._used_at = trio.current_time()
            self._worked.set()

    async def _check_in_process(self, operations: Sequence[Operation], space: bytes) -> bool:
        """The same in a process; False when there is none."""
        if not self.max_processes or not self._running:
            return False
        try:
            verifier = self._idle.pop() if self._idle else self._start()
        except OSError as error:
            self._give_up(str(error))
            return False
        check = partial(verifier.check, operations, space)
        done = await trio.to_thread.run_sync(check, abandon_on_cancel=True)
        if done:
            self.checked_in_processes += len(operations)
            self._idle.append(verifier)
        elif verifier in self._processes:
            self._processes.remove(verifier)
            self._give_up(f"a process ended with {verifier.end()}")
        return done

    def _start(self) -> _Verifier:
        verifier = _Verifier()
        self._processes.append(verifier)
        return verifier

    def _give_up(self, reason: str) -> None:
        log.warning("signature_processes_failed reason=%s", reason)
        self.max_processes = 0

    def _end_all(self) -> None:
        for verifier in self._processes:
            verifier.end()
        self._processes.clear()
        self._idle.clear()


class _Verifier:
    """One process."""

    def __init__(self) -> None:
        """Raises `OSError`."""
        self._process = subprocess.Popen(
            [sys.executable, "-P", str(PROGRAM)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )

    def check(self, operations: Sequence[Operation], space: bytes) -> bool:
        """Have them checked; False when the process is gone. Blocks."""
        prefix = SIGNED_PREFIX + space
        parts = [len(prefix).to_bytes(4, "big"), prefix]
        for op in operations:
            parts += (len(op.encoded).to_bytes(4, "big"), op.encoded)
        request = b"".join(parts)
        requests, answers = self._process.stdin, self._process.stdout
        assert requests is not None
        assert answers is not None
        try:
            requests.write(len(request).to_bytes(4, "big") + request)
            requests.flush()
            verdicts = answers.read(len(operations))
        except (OSError, ValueError):  # ValueError: closed by `end` meanwhile
            return False
        if len(verdicts) < len(operations):
            return False
        for op, verdict in zip(operations, verdicts, strict=True):
            op.verified = op.verified or verdict == 1
        return True

    def end(self) -> int:
        """End it; its exit status."""
        self._process.kill()
        status = self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            with suppress(BrokenPipeError):  # what it was to be asked
                pipe.close()
        return status


def _check_here(operations: Sequence[Operation], space: bytes) -> None:
    for op in operations:
        op.check_signature(space)
