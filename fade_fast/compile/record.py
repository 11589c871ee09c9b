"""Records calls as CUDA graphs."""

import contextlib
import functools
import warnings
from collections.abc import Callable

import torch

LEAST_FREE = 32  # a capture gives cached memory back if less than this part of a GPU's memory is free


def record(call: Callable, pool: tuple[int, int] | None = None, **arguments):
    """Capture a call. Returns its CUDA graph, which has not run yet, and the output of the call.

    `pool` is memory to share with graphs that never run at the same time, or None. If PyTorch does not share
    it, the graph has memory of its own: after a capture in it that failed, or if its graphs are gone.

    `torch.cuda.graph` waits for the GPU and gives all cached memory back, which the next steps would have to
    ask for again. Here the GPU goes on, and memory is given back only where little is left.

    Raises what the call raises, and `RuntimeError` if a capture does not allow one of its operations. The
    device can be used as before.
    """
    free, total = torch.cuda.mem_get_info()
    if free < total // LEAST_FREE:
        torch.cuda.empty_cache()
    stream = _stream(torch.cuda.current_device())
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        graph, pool = _begin(pool)
        try:
            output = call(**arguments)
            graph.capture_end()
        except BaseException:
            _give_up(graph, pool)
            raise
    return graph, output


def _begin(pool: tuple[int, int] | None) -> tuple[torch.cuda.CUDAGraph, tuple[int, int]]:
    """Begin a capture, in `pool` if PyTorch shares it. Returns the graph and its pool."""
    how = dict(capture_error_mode="thread_local")  # other threads may continue to use the GPU
    if pool is not None:
        graph = torch.cuda.CUDAGraph()
        try:
            graph.capture_begin(pool=pool, **how)
            return graph, pool
        except RuntimeError:
            _give_up(graph, pool)
    graph, pool = torch.cuda.CUDAGraph(), torch.cuda.graph_pool_handle()
    graph.capture_begin(pool=pool, **how)
    return graph, pool


def _give_up(graph: torch.cuda.CUDAGraph, pool: tuple[int, int]) -> None:
    """End a capture that failed, on its stream, and put right what PyTorch then leaves undone.

    If an operation was not allowed, `capture_end` raises its error first. The default generator still counts
    as captured, and draws no number outside of a capture. The allocator still asks the graph about each
    allocation, also after the graph was freed. A capture that could not begin leaves the same behind. A
    capture of nothing puts the generator right.
    """
    with contextlib.suppress(RuntimeError):
        graph.capture_end()
    with contextlib.suppress(RuntimeError):
        graph.pool()
        return  # a capture that ended has one: the error was none of its operations
    device = torch.cuda.current_device()
    with contextlib.suppress(RuntimeError):  # the allocator does not ask this graph, and does not count it
        torch._C._cuda_endAllocateToPool(device, pool)
        torch._C._cuda_releasePool(device, pool)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of an empty graph
        nothing = torch.cuda.CUDAGraph()
        nothing.capture_begin(capture_error_mode="thread_local")
        nothing.capture_end()


@functools.cache
def _stream(device: int) -> torch.cuda.Stream:
    """The stream on which graphs of a device are captured."""
    return torch.cuda.Stream(device)
