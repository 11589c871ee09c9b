"""What the whole test suite shares: a real model, a real text, and a bound on threads."""

import os
from pathlib import Path

import pytest
import torch

from fade_fast.hf import loading

WIKITEXT = Path(__file__).parents[2] / "shared/data/wikitext-2/test.txt"


@pytest.fixture(autouse=True)
def threads(request):
    """One thread for tiny tensors, whose threads would mostly wait for each other; two for the model."""
    torch.set_num_threads(2 if request.node.get_closest_marker("real_model") else 1)


def unavailable(reason: str):
    """Skip; but fail where a run that leaves tests out must not pass for a whole one."""
    if os.environ.get("FADE_REQUIRE_MODEL"):
        pytest.fail(reason)
    pytest.skip(reason)


@pytest.fixture(scope="session")
def smollm2():
    """SmolLM2-135M-Instruct in bfloat16 on the CPU, and its tokenizer."""
    try:
        return loading.load(device="cpu", dtype="bf16")
    except loading.LoadError as error:
        unavailable(str(error))


@pytest.fixture(scope="session")
def wikitext() -> str:
    """Text of WikiText-2's test split."""
    if not WIKITEXT.is_file():
        unavailable(f"no WikiText-2 test split at {WIKITEXT}")
    return WIKITEXT.read_text(encoding="utf-8")
