"""Guard of every public method of a cache: one thread at a time, no autocast, no inference mode."""

import contextlib
import functools
import threading
from collections.abc import Callable
from typing import TypeVar, cast

import torch

Method = TypeVar("Method", bound=Callable)


class Guard:
    """Lets one thread work on a cache. No thread waits for a worker; a worker waits for a reader.

    `with guard:` is for work, `with guard.reading:` for reading. A thread may enter again while it is inside.
    """

    def __init__(self):
        self._changed = threading.Condition(threading.Lock())
        self._owner: int | None = None
        self._depth, self._works = 0, False
        self.reading = _Reading(self)

    def __enter__(self) -> None:
        self.enter(works=True)

    def __exit__(self, *exception) -> None:
        self.leave()

    def enter(self, works: bool) -> None:
        """Become the owner. A worker waits for a thread that reads.

        Raises `RuntimeError` if another thread works, or if this thread wants to read while another one
        reads.
        """
        thread = threading.get_ident()
        with self._changed:
            while self._owner not in (None, thread):
                if self._works or not works:
                    raise RuntimeError(
                        "this cache is in use by another thread: give each thread a cache of its own; to "
                        "look at a cache that works, try again later"
                    )
                self._changed.wait()
            if self._owner is None:
                self._owner, self._works = thread, works
            self._depth += 1

    def leave(self) -> None:
        """Undo one `enter`."""
        with self._changed:
            self._depth -= 1
            if not self._depth:
                self._owner = None
                self._changed.notify()

    def __deepcopy__(self, memo) -> "Guard":
        return Guard()

    def __reduce__(self):
        return Guard, ()


class _Reading:
    """The context manager of a thread that only reads."""

    def __init__(self, guard: Guard):
        self._guard = guard

    def __enter__(self) -> None:
        self._guard.enter(works=False)

    def __exit__(self, *exception) -> None:
        self._guard.leave()


def without_autocast() -> contextlib.AbstractContextManager:
    """A context without inference mode and without autocast.

    A tensor made in inference mode cannot be written outside of it, and the next call may come from outside.
    Autocast would round the products that give codes, and float16 products to bfloat16.
    """
    casting = [device for device in ("cpu", "cuda") if torch.is_autocast_enabled(device)]
    inference = torch.is_inference_mode_enabled()
    if not (casting or inference):
        return contextlib.nullcontext()
    modes = contextlib.ExitStack()
    if inference:
        modes.enter_context(torch.inference_mode(False))
        modes.enter_context(torch.no_grad())
    for device in casting:
        modes.enter_context(torch.autocast(device, enabled=False))
    return modes


def single_threaded(method: Method) -> Method:
    """Decorator of a method that works on a cache: one thread at a time, by the object's `guard`."""

    @functools.wraps(method)
    def inside(self, *args, **kwargs):
        with self.guard, without_autocast():
            return method(self, *args, **kwargs)

    return cast(Method, inside)


def reading(method: Method) -> Method:
    """Decorator of a method that reads a cache: a worker in another thread waits for its end."""

    @functools.wraps(method)
    def inside(self, *args, **kwargs):
        with self.guard.reading, without_autocast():
            return method(self, *args, **kwargs)

    return cast(Method, inside)
