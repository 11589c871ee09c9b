"""Records calls as CUDA graphs."""

import functools
from collections.abc import Callable

import torch

LEAST_FREE = 32  # a capture gives cached memory back if less than this part of a GPU's memory is free


def record(call: Callable, pool: tuple[int, int] | None = None, **arguments):
    """Capture a call. Returns its CUDA graph, which has not run yet, and the output of the call.

    `pool` is memory to share with graphs that never run at the same time, or None.

    `torch.cuda.graph` waits for the GPU and gives all cached memory back, which the next steps would have to
    ask for again. Here the GPU goes on, and memory is given back only where little is left.
    """
    free, total = torch.cuda.mem_get_info()
    if free < total // LEAST_FREE:
        torch.cuda.empty_cache()
    graph, stream = torch.cuda.CUDAGraph(), _stream(torch.cuda.current_device())
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        # Other threads may continue to use the GPU.
        options = dict(capture_error_mode="thread_local") | ({} if pool is None else dict(pool=pool))
        graph.capture_begin(**options)
        try:
            output = call(**arguments)
        finally:
            graph.capture_end()
    return graph, output


@functools.cache
def _stream(device: int) -> torch.cuda.Stream:
    """The stream on which graphs of a device are captured."""
    return torch.cuda.Stream(device)
