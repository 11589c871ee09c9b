"""Fixtures of the whole test suite: a real model, a real text, and a limit on threads."""

import os
from pathlib import Path

import pytest
import torch

from fade_fast.hf import loading

WIKITEXT = Path(__file__).parents[2] / "shared/data/wikitext-2/test.txt"


@pytest.fixture(autouse=True)
def threads(request):
    """One thread for tiny tensors, where threads would mostly wait for each other. Two for the real model."""
    torch.set_num_threads(2 if request.node.get_closest_marker("real_model") else 1)


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
