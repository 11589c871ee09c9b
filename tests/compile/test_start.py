"""What makes the first compilations of a process shorter, and leaves no trace."""

import gc
import threading

import pytest
import torch
from torch._inductor import async_compile

from fade_fast.compile import start
from fade_fast.compile.compiled import Compiled
from fade_fast.hf import create, widths

from ..models import tiny_llama


@pytest.fixture
def collects():
    assert gc.isenabled()
    yield
    gc.enable()


def test_no_garbage_is_collected_in_the_context(collects):
    with start.without_collection():
        with start.without_collection():
            assert not gc.isenabled()
        assert not gc.isenabled() and not torch._dynamo.config.run_gc_after_compile
    assert gc.isenabled()


def test_what_was_made_in_the_context_is_old_at_its_end(collects):
    """So no later step waits while Python visits it again."""
    with start.without_collection():
        made = [[]]
    assert any(x is made for x in gc.get_objects(generation=2))


def test_an_error_ends_the_context(collects):
    with pytest.raises(KeyError), start.without_collection():
        raise KeyError
    assert gc.isenabled()


def test_who_collects_no_garbage_goes_on_so(collects):
    gc.disable()
    with start.without_collection():
        pass
    assert not gc.isenabled()


def test_the_last_of_several_threads_ends_it(collects):
    entered, leave = threading.Event(), threading.Event()

    def other():
        with start.without_collection():
            entered.set()
            leave.wait(10)

    thread = threading.Thread(target=other)
    with start.without_collection():
        thread.start()
        assert entered.wait(10)
    assert not gc.isenabled()
    leave.set()
    thread.join()
    assert gc.isenabled()


@pytest.mark.parametrize("remembers", [True, False])
def test_a_function_is_compiled_without_collection(collects, monkeypatch, remembers):
    seen = []

    def backend(graph, inputs, **options):
        seen.append((gc.isenabled(), torch._dynamo.config.fake_tensor_cache_enabled))
        return graph.forward

    made = torch.compile
    monkeypatch.setattr(torch, "compile", lambda f, fullgraph, options: made(f, backend=backend))
    function = Compiled(lambda sizes, x: x + len(sizes), remembers=remembers)
    assert torch.equal(function([], dict, torch.ones(3)), torch.ones(3))
    assert seen == [(False, remembers)] and gc.isenabled()
    assert torch._dynamo.config.fake_tensor_cache_enabled


def test_workers_start_for_a_gpu_alone(monkeypatch):
    calls = []
    monkeypatch.setattr(async_compile, "maybe_warm_pool", lambda: calls.append(1))
    for device in (None, torch.device("cpu"), torch.device("meta")):
        start.start_workers(device)
    assert not calls
    start.start_workers(torch.device("cuda", 1))
    assert calls


def test_a_cache_starts_the_workers_first(monkeypatch):
    model, calls, settled = tiny_llama(layers=1), [], widths.settled
    monkeypatch.setattr(create, "start_workers", calls.append)
    monkeypatch.setattr(create, "settled", lambda *args: calls.append("settled") or settled(*args))
    create.create_cache(model, "balanced", verify=False)
    assert calls == [torch.device("cpu"), "settled"]
    with pytest.raises(TypeError, match="config"):
        create.create_cache(model, 1)
