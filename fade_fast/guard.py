"""What every way into a cache passes: for one thread at a time, and out of modes that would change it."""

import contextlib
import functools
import threading

import torch


class Guard:
    """Let one thread in, again and again; others get a `RuntimeError`, and nothing is waited for."""

    def __init__(self):
        self._lock = threading.RLock()

    def __enter__(self) -> None:
        if not self._lock.acquire(blocking=False):
            raise RuntimeError("this cache is in use by another thread: give each thread a cache of its own")

    def __exit__(self, *exception) -> None:
        self._lock.release()

    def __deepcopy__(self, memo) -> "Guard":
        return Guard()

    def __reduce__(self):
        return Guard, ()


def plainly() -> contextlib.AbstractContextManager:
    """Where a cache works: without inference mode, and without autocast.

    A tensor made in inference mode could not be written to outside of it, and the next call may come from
    there. Autocast would round the products that codes come from, and float16 ones to bfloat16.
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


def guarded(method):
    """A method that only one thread at a time may be in, by the `guard` of its object, and works plainly."""

    @functools.wraps(method)
    def inside(self, *args, **kwargs):
        with self.guard, plainly():
            return method(self, *args, **kwargs)

    return inside
