"""The real model: memory after generate(), perplexity read back compressed, equality with the twin."""

import math

import pytest
import torch

import fade_fast
from fade_ref.config import FadeConfig

from ..models import compressed_tokens, dense, generate, teacher_forced, twin_logits
from .test_cache import storages

pytestmark = [pytest.mark.real_model, pytest.mark.slow]


@pytest.fixture(scope="module")
def text(smollm2, wikitext):
    """The first 2048 tokens of WikiText-2's test split."""
    model, tokenizer = smollm2
    ids = tokenizer(wikitext[:20_000], return_tensors="pt").input_ids[:, :2048]
    assert ids.shape[1] == 2048
    return dict(input_ids=ids, attention_mask=torch.ones_like(ids))


def test_memory_and_tokens_after_generate(smollm2, text):
    """2048 prompt tokens and 64 new ones: allocated bytes on the live storages against DynamicCache."""
    model, _ = smollm2
    plain = dense(model)
    expected = generate(model, plain, text, new=64)
    dense_bytes = sum(
        x.untyped_storage().nbytes() for layer in plain.layers for x in (layer.keys, layer.values)
    )
    for config, least in (("safe", 2.9), ("balanced", 6.0)):
        cache = fade_fast.create_cache(model, config)
        generate(model, cache, text, new=64)
        memory, moments = cache.memory(), 0
        if cache.calibration is not None:  # of which the tables are made; on the host, for all caches
            moments = sum(x.nbytes for x in cache.calibration.tensors().values())
        assert memory.allocated == storages(cache) - moments
        assert memory.dense == dense_bytes
        assert dense_bytes / (storages(cache) - moments - memory.tables) >= least, config
        assert memory.tokens["INT4"] > 0
    cache = fade_fast.create_cache(model, FadeConfig(recent_window=4096))
    assert torch.equal(generate(model, cache, text, new=64), expected)
    assert compressed_tokens(cache) == 0


def perplexity(logits, ids):
    loss = torch.nn.functional.cross_entropy(logits[0, :-1].float(), ids[0, 1:])
    return math.exp(loss.item())


def test_perplexity_through_the_safe_cache(smollm2, text):
    """All but the sinks, the recent tokens and the chunk itself are read back as INT4."""
    model, _ = smollm2
    chunks, text = [64] * 16, {name: x[:, :1024] for name, x in text.items()}
    exact = perplexity(teacher_forced(model, dense(model), text, chunks), text["input_ids"])
    cache = fade_fast.create_cache(model, "safe")
    compressed = perplexity(teacher_forced(model, cache, text, chunks), text["input_ids"])
    assert cache.memory().tokens["INT4"] >= 1024 - 4 - 128
    assert 0.985 <= compressed / exact <= 1.015
    print(f"perplexity {exact:.4f} exact, {compressed:.4f} safe, ratio {compressed / exact:.4f}")


def test_logits_equal_the_dense_twin_in_float64(smollm2, text):
    """Teacher-forced logits through `safe` equal those over the same codes, dequantised."""
    model, _ = smollm2
    model, chunks = model.double(), [200, 100] + [1] * 8
    try:
        inputs = {name: x[:, : sum(chunks)] for name, x in text.items()}
        cache = fade_fast.create_cache(model, "safe")
        ours = teacher_forced(model, cache, inputs, chunks)
        assert compressed_tokens(cache) > 100
        twin = twin_logits(model, FadeConfig.safe(), inputs, chunks)
        assert (ours - twin).norm() / twin.norm() < 1e-5
    finally:
        model.bfloat16()
