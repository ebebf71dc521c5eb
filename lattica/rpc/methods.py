"""What an object offers to callers, and how each of its methods is run.

| written as | runs |
|---|---|
| `async def` | as a task |
| `async def` with `yield` | as a task; each value is an item of a stream |
| `def` | in a worker thread |
| `def` with `yield` | in worker threads, one step at a time; each value is an item of a stream |
| `def` with `@nonblocking` | at once, in the event loop: for what takes microseconds |

With `@client_streaming` the first argument is an asynchronous iterator over the items that the caller sends
(not for methods that run in threads). Without it a caller who streams is taken at his word when an argument is
missing otherwise. Arrays in a result or an item are sent from where they are: yield and return fresh ones,
not a buffer that is written again. Names with a leading underscore are never offered, and a name is looked up
in this table only: nothing that a caller sends becomes an attribute access.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any, TypeVar

from lattica.errors import RemoteError
from lattica.rpc.status import message_of
from lattica_protocols.limits import RPC_MAX_VALUE

F = TypeVar("F", bound=Callable[..., Any])


def nonblocking(function: F) -> F:
    """Run this plain `def` in the event loop itself: it must neither wait nor compute for long."""
    function.__lattica_nonblocking__ = True  # type: ignore[attr-defined]
    return function


def client_streaming(function: F) -> F:
    """The first argument of this asynchronous method is an iterator over the items that the caller sends."""
    function.__lattica_client_streaming__ = True  # type: ignore[attr-defined]
    return function


class Style(Enum):
    """How a method is run."""

    TASK = "task"
    TASK_STREAM = "task stream"
    THREAD = "thread"
    THREAD_STREAM = "thread stream"
    INLINE = "inline"


@dataclass(frozen=True, slots=True)
class Method:
    """One method that callers can reach."""

    function: Callable[..., Any]
    style: Style
    takes_stream: bool
    """CLIENT_STREAM: the caller sends items."""

    gives_stream: bool
    """SERVER_STREAM: the method yields."""

    max_value: int = RPC_MAX_VALUE
    """Bytes of msgpack that an argument or an item may have; see `decode_value_untrusted`."""

    def fits_with_stream(self, reader: object, args: list[Any], kwargs: dict[str, Any]) -> bool:
        """Without `@client_streaming`: whether an argument is missing that the stream of items can be."""
        asynchronous = self.style in (Style.TASK, Style.TASK_STREAM)
        return asynchronous and not self.accepts(args, kwargs) and self.accepts([reader, *args], kwargs)

    def accepts(self, args: list[Any], kwargs: dict[str, Any]) -> bool:
        """Whether the arguments fit the signature."""
        return self.misfit(args, kwargs) is None

    def misfit(self, args: list[Any], kwargs: dict[str, Any]) -> str | None:
        """Why the arguments do not fit the signature, in the caller's terms: what the function is called here and what
        comes before the caller's first argument is nobody's business. Slow: asked only after a TypeError."""
        try:
            signature = inspect.signature(self.function)
        except ValueError:  # a built-in without a signature
            return None
        try:
            signature.bind(*args, **kwargs)
        except TypeError as error:
            names = [f"*{name}" if p.kind is p.VAR_POSITIONAL else name for name, p in signature.parameters.items()]
            return f"{error}; the arguments are ({', '.join(names)})"
        return None


def run_in_thread(function: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
    """Run a plain method in a thread. What is no `Exception` (`KeyboardInterrupt`, the `CancelledError` of a loop that
    the method ran) becomes a `RemoteError`: in the loop that waits for the thread it would mean something else."""
    try:
        return function(*args, **kwargs)
    except Exception:  # the caller's answer, as it is
        raise
    except BaseException as error:  # would end the loop, or cancel what waits in it
        raise RemoteError(message_of(error), type(error).__name__) from error


def methods_of(service: object, max_value: int = RPC_MAX_VALUE) -> dict[str, Method]:
    """The methods of an object, or of a mapping from name to function; `max_value` for each of them.

    Raises `ValueError` when there is none, or when a decorator does not fit the function.
    """
    if isinstance(service, Mapping):
        found = {str(name): function for name, function in service.items()}
    else:
        found = {name: getattr(service, name) for name in _public_functions(type(service))}
    methods = {name: _method(name, function, max_value) for name, function in found.items() if not name.startswith("_")}
    if not methods:
        raise ValueError(f"{service!r} has no public methods to offer")
    return methods


def _public_functions(cls: type) -> list[str]:
    kinds = (staticmethod, classmethod)
    names = []
    for name in dir(cls):
        if not name.startswith("_"):
            attribute = inspect.getattr_static(cls, name)
            if isinstance(attribute, kinds) or inspect.isroutine(attribute):
                names.append(name)
    return names


def _method(name: str, function: Callable[..., Any], max_value: int) -> Method:
    if not callable(function):
        raise ValueError(f"{name} cannot be called: it is a {type(function).__name__}")
    inline = getattr(function, "__lattica_nonblocking__", False)
    takes_stream = getattr(function, "__lattica_client_streaming__", False)
    plain = _unwrapped(function)
    if inspect.isasyncgenfunction(plain):
        style = Style.TASK_STREAM
    elif inspect.iscoroutinefunction(plain):
        style = Style.TASK
    elif inspect.isgeneratorfunction(plain):
        style = Style.THREAD_STREAM
    else:
        style = Style.INLINE if inline else Style.THREAD
    if inline and style is not Style.INLINE:
        raise ValueError(f"{name} is marked nonblocking, which is for a plain def")
    if takes_stream and style not in (Style.TASK, Style.TASK_STREAM):
        raise ValueError(f"{name} is marked client_streaming, which is for async methods")
    gives_stream = style in (Style.TASK_STREAM, Style.THREAD_STREAM)
    return Method(function, style, takes_stream, gives_stream, max_value)


def _unwrapped(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function behind an object with `__call__`."""
    if inspect.isroutine(function):
        return function
    call: Callable[..., Any] = getattr(function, "func", None) or type(function).__call__
    return call
