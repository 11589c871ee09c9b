"""What makes the first compilations of a process shorter. Results and kernels do not depend on this."""

import contextlib
import gc
import threading
from collections.abc import Iterator

import torch

_lock = threading.Lock()  # protects the two below
_compiling = 0  # number of contexts in which garbage is not collected
_resumes = False  # whether garbage was collected before the first of them


def start_workers(device: torch.device | None) -> None:
    """Start the processes in which Inductor compiles kernels for a GPU, and return at once.

    They need seconds to start. Until they are ready, Inductor compiles kernels one after another in this
    process. Inductor itself starts them at the first compilation. Nothing happens if they run already,
    without Triton, or for another `device`.
    """
    if device is None or device.type != "cuda":
        return
    from torch._inductor.async_compile import maybe_warm_pool

    maybe_warm_pool()


@contextlib.contextmanager
def without_collection() -> Iterator[None]:
    """While something compiles: no search for garbage, which would visit all objects of the process.

    A compilation makes many objects, nearly all of which are in use until it ends. Then they are visited
    once. Left to Python, that happens twice, and the second time within a decode step hundreds of tokens
    later.
    """
    global _compiling, _resumes
    with _lock:
        if not _compiling:
            _resumes = gc.isenabled()
            gc.disable()
        _compiling += 1
    try:
        with torch._dynamo.config.patch(run_gc_after_compile=False):
            yield
    finally:
        with _lock:
            _compiling -= 1
            ends = not _compiling and _resumes
            if ends:
                gc.enable()
        if ends:  # without the lock, because finalizers may run anything
            gc.collect(1)  # what is in use counts as old from now on
