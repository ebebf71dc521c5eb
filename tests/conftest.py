"""Fixtures for all rings. Tests of the runtime are plain functions that call `trio.run` through `run`."""

from __future__ import annotations

import functools
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
import trio
import trio.testing


def _run(main: Callable[..., Awaitable[Any]], *args: Any, seconds: float = 30.0, clock: Any = None) -> Any:
    async def bounded() -> Any:
        with trio.fail_after(seconds):
            return await main(*args)

    return trio.run(bounded, clock=clock)


@pytest.fixture
def run() -> Callable[..., Any]:
    """`run(async_function, *args, seconds=30)` under trio, on the wall clock, with a bound."""
    return _run


@pytest.fixture
def run_mocked() -> Callable[..., Any]:
    """The same under a mock clock that jumps to the next deadline when nothing else can run."""

    @functools.wraps(_run)
    def runner(main: Callable[..., Awaitable[Any]], *args: Any, seconds: float = 3600.0) -> Any:
        return _run(main, *args, seconds=seconds, clock=trio.testing.MockClock(autojump_threshold=0))

    return runner


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--rewrite-races", action="store_true", help="write tests/vectors/replica-races.txt anew")
