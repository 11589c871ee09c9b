"""A cache is for one thread at a time: whoever comes while another is inside is told so."""

import functools
import threading


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


def guarded(method):
    """A method that only one thread at a time may be in, by the `guard` of its object."""

    @functools.wraps(method)
    def inside(self, *args, **kwargs):
        with self.guard:
            return method(self, *args, **kwargs)

    return inside
