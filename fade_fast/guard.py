"""What every way into a cache passes: for one thread at a time, and out of inference mode."""

import contextlib
import functools
import threading

import torch


class Guard:
    """Let one thread in, again and again; others get a `RuntimeError`, and nothing is waited for.

    Inside, inference mode is off, and gradients with it: a tensor made in that mode could not be written to
    outside of it, and the next call may come from there.
    """

    def __init__(self):
        self._lock, self._modes = threading.RLock(), []

    def __enter__(self) -> None:
        if not self._lock.acquire(blocking=False):
            raise RuntimeError("this cache is in use by another thread: give each thread a cache of its own")
        modes = contextlib.ExitStack()
        if torch.is_inference_mode_enabled():
            modes.enter_context(torch.inference_mode(False))
            modes.enter_context(torch.no_grad())
        self._modes.append(modes)

    def __exit__(self, *exception) -> None:
        self._modes.pop().close()
        self._lock.release()

    def __deepcopy__(self, memo) -> "Guard":
        return Guard()

    def __reduce__(self):
        return Guard, ()


def guarded(method):
    """A method that only one thread at a time may be in, by the `guard` of its object."""

    @functools.wraps(method)
    def inside(self, *args, **kwargs):
        with self.guard:
            return method(self, *args, **kwargs)

    return inside
