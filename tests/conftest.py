"""Fixtures of the whole test suite: a real model, a real text, a limit on threads, kernels as on a GPU."""

import functools
import os
from pathlib import Path

import pytest
import torch
from torch._dynamo.utils import counters

from fade_fast.cache import layer, select_store
from fade_fast.compile import compiled as compiling
from fade_fast.hf import loading
from fade_fast.kernels import (
    decode,
    dense,
    matched,
    pages,
    rotated,
    select,
    summaries,
)
from fade_fast.policies import scores
from fade_fast.policies import select as residency
from fade_fast.vllm import prefill, single

WIKITEXT = Path(__file__).parents[2] / "shared/data/wikitext-2/test.txt"


@pytest.fixture(autouse=True)
def threads(request):
    """One thread for tiny tensors, where threads would mostly wait for each other.

    The real model gets two, unless several test processes share the cores.
    """
    alone = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1")) < 2
    torch.set_num_threads(2 if alone and request.node.get_closest_marker("real_model") else 1)


def unavailable(reason: str):
    """Skip the test. With `FADE_REQUIRE_MODEL` the test fails, since such a run must be complete."""
    if os.environ.get("FADE_REQUIRE_MODEL"):
        pytest.fail(reason)
    pytest.skip(reason)


@pytest.fixture(scope="session")
def smollm2():
    """SmolLM2-135M-Instruct in bfloat16 on the CPU, with its tokenizer."""
    try:
        return loading.load(device="cpu", dtype="bf16")
    except loading.LoadError as error:
        unavailable(str(error))


@pytest.fixture(scope="session")
def wikitext() -> str:
    """The text of the test split of WikiText-2."""
    if not WIKITEXT.is_file():
        unavailable(f"no WikiText-2 test split at {WIKITEXT}")
    return WIKITEXT.read_text(encoding="utf-8")


#: The compiled versions of all kernels.
KERNELS = (
    decode._compiled,
    dense._compiled,
    dense._compiled_store,
    *matched._compiled.values(),
    rotated._compiled,
    scores._compiled,
    select._compiled,
    summaries._compiled,
    pages._compiled,
    residency._compiled_choose,
    residency._compiled_touch,
    select_store._compiled,
    select_store._compiled_count,
    *prefill._compiled.values(),
    *single._compiled.values(),
)


@pytest.fixture
def compiled_on():
    """A function that sets the device types on which kernels run compiled."""

    def allow(*types: str) -> None:
        compiling.COMPILED_ON.clear()
        compiling.COMPILED_ON.update(types)

    held = set(compiling.COMPILED_ON)
    yield allow
    allow(*held)


@pytest.fixture
def kernel_compiler(monkeypatch):
    """A function that replaces the compiler of kernels. It leaves calls of torch.compile with a backend."""
    real = torch.compile

    def replace(compiler) -> None:
        monkeypatch.setattr(
            torch, "compile", lambda f, **options: (real if "backend" in options else compiler)(f, **options)
        )
        for kernel in KERNELS:
            kernel.graphs.clear()

    yield replace
    for kernel in KERNELS:
        kernel.graphs.clear()


@pytest.fixture
def traced_kernels(kernel_compiler):
    """The compiler of kernels traces them as on CUDA, but generates no code. All graphs are new."""
    trace = functools.partial(torch.compile, backend="aot_eager", fullgraph=True)
    kernel_compiler(lambda f, **options: trace(f))
    torch._dynamo.reset()
    counters.clear()


@pytest.fixture
def uncompiled_kernels(kernel_compiler, compiled_on):
    """Kernels on the CPU get the shapes that they get on a GPU, but are not compiled."""
    kernel_compiler(lambda f, **options: f)
    compiled_on("cpu")


@pytest.fixture
def short_flash_prefixes(monkeypatch):
    """Captured steps leave uncompressed tokens to FlashAttention from 64 tokens on, in units of 256."""
    monkeypatch.setattr(layer, "MIN_FLASH_PREFIX", 64)
    monkeypatch.setattr(dense, "TAIL", 256)
