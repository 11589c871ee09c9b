"""`generate(cache_implementation="fade")`, and pipelines: the ways in that make no cache by hand."""

import pytest
import torch
from transformers import pipeline

import fade_fast
from fade_fast.hf import generate as hooks
from fade_fast.hf.models import CACHE_NAME
from fade_ref.config import FadeConfig

from ..models import SMALL, compressed_tokens, predictable, prompt, tiny_llama
from ..tokenizers import byte_tokenizer

FIELDS = dict(SMALL, middle_k_bits=8, middle_v_bits=8)
ALIKE = dict(do_sample=False, max_new_tokens=12, min_new_tokens=12)


@pytest.fixture
def model():
    return tiny_llama()


@pytest.fixture
def made(monkeypatch):
    """The caches that a hook made."""
    caches, real = [], hooks._asked
    monkeypatch.setattr(hooks, "_asked", lambda *args: caches.append(real(*args)) or caches[-1])
    return caches


@pytest.mark.parametrize("config", [FIELDS, FadeConfig(**FIELDS)], ids=("fields", "config"))
def test_the_same_text_as_with_a_cache_by_hand(model, made, config):
    fade_fast.attach(model)
    text = model.generate(**prompt(60), cache_implementation="fade", cache_config=config, **ALIKE)
    assert compressed_tokens(made[0]) > 30 and made[0].get_seq_length() == 71
    by_hand = fade_fast.create_cache(model, FadeConfig(**FIELDS))
    assert torch.equal(text, model.generate(**prompt(60), **{CACHE_NAME: by_hand}, **ALIKE))
    model.generate(**prompt(60), cache_implementation="fade", cache_config="int4", **ALIKE)
    assert len(made) == 2 and made[1].fade_config == FadeConfig.int4()  # each call has a cache of its own


def test_what_is_refused(model):
    inputs = prompt(20)
    with pytest.raises(ValueError, match="Invalid `cache_implementation`"):
        model.generate(**inputs, cache_implementation="fade", **ALIKE)
    fade_fast.attach(model)
    cache = fade_fast.create_cache(model, "int4")
    with pytest.raises(ValueError, match="makes a cache, and one is given"):
        model.generate(**inputs, cache_implementation="fade", **{CACHE_NAME: cache}, **ALIKE)
    with pytest.raises(ValueError, match="unknown preset"):
        model.generate(**inputs, cache_implementation="fade", cache_config="frugal", **ALIKE)
    model.generate(**inputs, cache_implementation="static", **ALIKE)  # transformers' own go on working
    fade_fast.detach(model)
    with pytest.raises(ValueError, match="Invalid `cache_implementation`"):
        model.generate(**inputs, cache_implementation="fade", **ALIKE)


@pytest.mark.parametrize("batch", [1, 2])
def test_a_pipeline(model, made, batch):
    """A pipeline hands both keywords to `generate()`, and makes a cache for each batch of texts."""
    fade_fast.attach(model)
    predictable(model)  # so that 8 bits change no token
    write = pipeline("text-generation", model=model, tokenizer=byte_tokenizer())
    texts = ["A text of some length, which is compressed. " * 2, "Another text, shorter. " * 3]
    options = dict(batch_size=batch, return_full_text=False, **ALIKE)
    found = write(texts, cache_implementation="fade", cache_config=FIELDS, **options)
    assert len(made) == 2 // batch and all(compressed_tokens(cache) > 30 for cache in made)
    fade_fast.detach(model)
    expected = write(texts, **options)
    assert found == expected
    with pytest.raises(ValueError, match="Invalid `cache_implementation`"):
        write(texts[0], cache_implementation="fade")
