"""Captures that fail leave the device as it was. Without a GPU, only the calls of PyTorch are checked."""

import contextlib
import types

import pytest
import torch

from fade_fast.compile import record as module
from fade_fast.compile.record import record

gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")


class Driver:
    """What a CUDA graph of PyTorch does, in order. `breaks` says whether an operation is not allowed, and
    `gone` is a pool whose graphs no longer exist.
    """

    def __init__(self, monkeypatch, breaks, gone=None):
        self.breaks, self.calls, self.generator_captured, self.pools = breaks, [], False, []
        driver = self

        class Graph:
            def __init__(self):
                self.begun = self.ended = False

            def capture_begin(self, pool=None, capture_error_mode=None):
                assert capture_error_mode == "thread_local"
                driver.generator_captured = True
                if pool is not None and pool == gone:
                    raise RuntimeError("use_count > 0")
                self.begun = True
                driver.pools += [] if pool is None else [pool]
                self.broken = driver.breaks and pool is not None

            def capture_end(self):
                if not self.begun or self.broken:
                    self.begun = False
                    raise RuntimeError("operation not permitted when stream is capturing")
                driver.generator_captured, self.begun, self.ended = False, False, True

            def pool(self):
                if not self.ended:
                    raise RuntimeError("no preceding successful capture")
                return 0, 1

        stream = types.SimpleNamespace(wait_stream=lambda other: None)
        fakes = dict(
            mem_get_info=lambda: (8, 8), current_device=lambda: 0, current_stream=lambda: stream,
            graph_pool_handle=lambda: (0, 7), stream=lambda s: contextlib.nullcontext(), CUDAGraph=Graph,
        )  # fmt: skip
        for name, fake in fakes.items():
            monkeypatch.setattr(torch.cuda, name, fake)
        monkeypatch.setattr(module, "_stream", lambda device: stream)
        for name in ("_cuda_endAllocateToPool", "_cuda_releasePool"):
            told = lambda device, pool, name=name: self._told(name, pool, gone)  # noqa: E731
            monkeypatch.setattr(torch._C, name, told, raising=False)

    def _told(self, name, pool, gone):
        if pool == gone:
            raise RuntimeError("not currently recording")
        self.calls.append((name, pool))


def test_a_capture_that_ends_needs_no_repair(monkeypatch):
    driver = Driver(monkeypatch, breaks=False)
    graph, output = record(lambda x: x + 1, x=2)
    assert output == 3 and graph.ended and not driver.calls and not driver.generator_captured
    assert driver.pools == [(0, 7)]
    record(lambda: None, (3, 0))
    assert driver.pools == [(0, 7), (3, 0)]


@pytest.mark.parametrize("breaks", (False, True), ids=("Python code", "an operation"))
def test_a_capture_that_fails_is_ended(monkeypatch, breaks):
    """Whatever failed, the error is that of the call, and the generator may draw again."""
    driver = Driver(monkeypatch, breaks)

    def call():
        raise ValueError("not this way")

    with pytest.raises(ValueError, match="not this way"):
        record(call)
    ends = [("_cuda_endAllocateToPool", (0, 7)), ("_cuda_releasePool", (0, 7))]
    assert not driver.generator_captured and driver.calls == (ends if breaks else [])


def test_an_operation_that_is_not_allowed_is_told(monkeypatch):
    driver = Driver(monkeypatch, breaks=True)
    with pytest.raises(RuntimeError, match="not permitted"):
        record(lambda: None)
    assert not driver.generator_captured and len(driver.calls) == 2


def test_memory_that_is_gone_is_not_shared(monkeypatch):
    """The capture has memory of its own, and nothing of the pool is touched, which other code may own."""
    driver = Driver(monkeypatch, breaks=False, gone=(3, 0))
    graph, output = record(lambda: 5, (3, 0))
    assert output == 5 and graph.ended and driver.pools == [(0, 7)]
    assert not driver.generator_captured and not driver.calls


@gpu
def test_a_gpu_captures_where_memory_is_gone():
    x = torch.arange(8.0, device="cuda")
    pool = record(lambda: x * 2)[0].pool()
    graph, found = record(lambda: x * 3 + torch.rand(8, device="cuda"), pool)
    assert torch.rand(1000, device="cuda").mean() > 0.3
    graph.replay()
    torch.cuda.empty_cache()
    assert (found - x * 3).min() >= 0 and found.max() < 22


@gpu
@pytest.mark.parametrize("shared", (False, True), ids=("own memory", "shared memory"))
def test_a_gpu_works_on_after_a_capture_that_failed(shared):
    x = torch.arange(8.0, device="cuda")
    other = record(lambda: x * 2)[0]
    pool = other.pool() if shared else None
    with pytest.raises(RuntimeError, match="captur"):
        record(lambda: x.sum().item(), pool)
    torch.manual_seed(3)
    drawn = torch.rand(1000, device="cuda")
    torch.manual_seed(3)
    assert torch.equal(drawn, torch.rand(1000, device="cuda")) and 0.3 < drawn.mean() < 0.7
    graph, found = record(lambda: x + torch.rand(8, device="cuda"), pool)
    graph.replay()
    first = found.clone()
    graph.replay()
    assert not torch.equal(first, found) and ((found - x) < 1).all()
    before = torch.cuda.memory_reserved()
    for _ in range(50):
        with pytest.raises(RuntimeError):
            record(lambda: torch.zeros(1 << 20, device="cuda").sum().item())
    torch.cuda.empty_cache()
    assert torch.cuda.memory_reserved() <= before + (1 << 23)
