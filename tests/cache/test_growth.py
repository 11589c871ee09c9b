"""Caches that grow hold little more than caches made for their length, in few numbers of slots."""

import contextlib
import math
from unittest import mock

import pytest
import torch

import fade_fast
from fade_fast.cache import buffers, growth, layer, select_store
from fade_fast.hf.models import CACHE_NAME
from fade_fast.kernels import packed
from fade_fast.measure import memory
from fade_ref.config import FadeConfig

from ..models import generate, prompt, tiny_llama

CONFIGS = {
    "lossless": FadeConfig.lossless(),
    "int4": FadeConfig.int4(),
    "int2": FadeConfig(middle_k_bits=2, middle_v_bits=2),
    "k8v16": FadeConfig(middle_k_bits=8, middle_v_bits=16),
    "recall": FadeConfig.preset("recall"),
    "balanced": FadeConfig.balanced(),
}


@contextlib.contextmanager
def as_on_a_gpu():
    """Buffers get the sizes that they have on a GPU; kernels run as on a CPU."""
    with contextlib.ExitStack() as stack:
        for module in (buffers, layer, select_store):
            stack.enter_context(mock.patch.object(module, "use_compiled", lambda x: True))
        yield


def test_slots_are_few_and_little_more_than_needed():
    for heads in (1, 8, 64, 300):
        found = {}
        for needed in range(64, 70_000, 64):
            slots = growth.slots(heads, needed, 0)
            least = packed.whole(heads, needed)
            assert slots >= needed and slots % packed.chunk_of(heads, slots, 1) == 0
            assert packed.longest(heads, slots + packed.spare(slots)) >= needed
            if needed >= 3900:
                assert slots <= 1.13 * max(least, needed + growth.BLOCK)
            found.setdefault(int(math.log2(needed)), set()).add(slots)
        assert max(map(len, found.values())) <= 10


def test_a_known_length_is_made_at_once_as_far_as_a_buffer_would_grow_anyway():
    for needed, held, expected in ((512, 0, 900), (4096, 0, 4500), (4096, 4096, 7000)):
        slots = growth.slots(8, needed, held, expected)
        assert expected <= slots <= 1.13 * expected + 128
    assert growth.slots(8, 512, 0, 100_000) <= 1.13 * (512 + growth.HEADROOM)
    assert growth.slots(8, 4096, 4000, 100_000) <= 1.13 * 2 * 4096
    # Never more than all tokens would take without compression, unless they need it themselves.
    assert growth.slots(8, 1024, 1000, 100_000, most=1500) <= 1500
    assert growth.slots(8, 1024, 1000, 100_000, most=900) == packed.whole(8, 1024)


def ratios(name: str, length: int, step: int | None = None) -> tuple[float, float]:
    """Bytes of a cache that grew, relative to one made for its length, and to one without compression."""
    model = tiny_llama(heads=8, group=1, head_dim=128, layers=1, dtype=torch.bfloat16)
    held = []
    with as_on_a_gpu():
        for made_for in (length, None):
            cache = fade_fast.create_cache(model, CONFIGS[name], max_length=made_for)
            memory.fill(model, cache, length, step=step)
            found = cache.memory()
            held.append(found.allocated + found.host)
            assert sum(n for tier, n in found.tokens.items() if tier not in ("FP16", "EVICTED")) > 300
    # The tables of the rotation would count for all layers of a model together.
    tables = sum(x.untyped_storage().nbytes() for x in cache.tiered[0].format.tensors())
    return held[1] / held[0], (held[1] - tables) / found.dense


@pytest.mark.parametrize("name", ["int4", "lossless"])
def test_bytes_of_a_cache_that_grows(name):
    """4300 tokens are a little more than a round number of slots, which is the worst length."""
    assert ratios(name, 4300)[0] < 1.15
    assert ratios(name, 1024)[1] < 1


@pytest.mark.slow
@pytest.mark.parametrize("step", [None, 192], ids=["at once", "in steps"])
@pytest.mark.parametrize("name", CONFIGS)
def test_bytes_at_many_lengths(name, step):
    for length in (1024, 2048, 4096, 4300, 8192, 8600, 16384):
        more, of_dense = ratios(name, length, step)
        assert length < 4096 or more < 1.15, (length, more)
        assert of_dense < 1, (length, of_dense)


def capacities(run) -> list[int]:
    """Sizes of all buffers of codes that `run()` makes."""
    made, reserve = [], buffers.Buffers.reserve

    def reserved(self, capacity):
        if "key_codes" in self and capacity > self.capacity:
            made.append(capacity)
        reserve(self, capacity)

    with as_on_a_gpu(), mock.patch.object(buffers.Buffers, "reserve", reserved):
        run()
    return made


@pytest.mark.slow
def test_generate_says_how_long_a_text_will_be():
    """So one buffer is made for it: nothing is compiled for another number of slots."""
    model, inputs = tiny_llama(layers=1), prompt(200)
    config = FadeConfig(recent_window=16, block_size=8)
    cache = fade_fast.create_cache(model, config)
    made = capacities(lambda: generate(model, cache, inputs, new=150))
    assert len(made) == 1 and cache.memory().tokens["INT4"] > 300
    assert cache.token_positions.expected is None  # it is over
    alike = fade_fast.create_cache(model, config, max_length=350)
    text = generate(model, alike, inputs, new=150)
    assert cache.memory().allocated <= 1.15 * alike.memory().allocated + 2 * 64 * 2 * 2 * 128
    # A length that is given as max_length is known, too; new tokens of a longer text count from all of it.
    longer = dict(input_ids=torch.cat((inputs["input_ids"], text), 1))
    longer["attention_mask"] = torch.ones_like(longer["input_ids"])
    again = fade_fast.create_cache(model, config)
    assert len(capacities(lambda: model.generate(**longer, cache=again, max_length=600, min_length=600))) == 1
    # Without generate() the buffer grows by an eighth at a time.
    plain = fade_fast.create_cache(model, config)

    def loop():
        with torch.no_grad():
            for part in torch.cat((longer["input_ids"], text, text), 1).split(50, dim=1):
                model(part, **{CACHE_NAME: plain})

    assert 1 < len(capacities(loop)) <= 8


def test_a_cache_without_compression_makes_what_is_known_or_little():
    model = tiny_llama(layers=1)
    for expected, most in ((None, 128 + 16), (900, 900)):
        cache = fade_fast.create_cache(model, FadeConfig(recent_window=None))
        with torch.no_grad():
            model(prompt(400)["input_ids"], **{CACHE_NAME: cache})
        cache.token_positions.expected = expected
        kv = cache.tiered[0]
        before = kv.dense.capacity
        kv.prepare(1 + before - kv.dense.count)
        assert before < kv.dense.capacity <= (before + most if expected is None else most)
