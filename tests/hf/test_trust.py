"""One thread at a time; and a step that fails, for want of memory or otherwise, leaves the cache usable."""

import copy
import threading

import pytest
import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

import fade_fast
from fade_fast.cache import budget_store, buffers, dense, layer, store
from fade_fast.formats import base
from fade_fast.formats.base import Format
from fade_fast.hf.models import CACHE_NAME
from fade_fast.kernels import rotated
from fade_ref.config import FadeConfig

from ..marks import slow_but
from ..models import compressed_tokens, generate, new_cache, prompt, teacher_forced, tiny_llama

SMALL = dict(recent_window=8, block_size=4)
CONFIGS = {
    "int4": FadeConfig(**SMALL),
    "evict": FadeConfig(**SMALL, int4_budget=10),
    "two tiers": FadeConfig(**SMALL, int4_budget=10, int2_budget=6, positions="original"),
    "knorm": FadeConfig(**SMALL, int4_budget=10, int2_budget=None, eviction_policy="knorm"),
}


class Memory:
    """Runs out at the n-th time that one of some functions is called, and once only."""

    def __init__(self, monkeypatch, places, n):
        self.calls, self.n, self.failed = 0, n, False
        for owner, name in places:
            monkeypatch.setattr(owner, name, self.wrap(getattr(owner, name)))

    def wrap(self, function):
        def limited(*args, **kwargs):
            self.calls += 1
            if self.calls == self.n and not self.failed:
                self.failed = True
                raise torch.OutOfMemoryError("out of memory, as a test has it")
            return function(*args, **kwargs)

        return limited


#: Rows as they come, and with padding.
PADS = [pytest.param((0, 0), id="whole", marks=pytest.mark.slow), pytest.param((0, 9), id="padded")]
#: Where a demotion and what surrounds it ask for memory.
PLACES = [
    (base.Field, "empty"),
    (rotated, "encode_both"),
    (buffers.Buffers, "reserve"),
    (buffers.Buffers, "removal"),
    (Format, "key_means"),
    (budget_store, "take"),
    (dense, "rotate"),
    (budget_store.BudgetStore, "_renumber"),
    (store.StoredTier, "make_room"),
]


@pytest.mark.slow
@pytest.mark.parametrize("pads", PADS)
@pytest.mark.parametrize("name", slow_but(CONFIGS, "two tiers"))
def test_running_out_of_memory_at_any_point_of_a_step(name, pads, monkeypatch):
    """A step that fails changes nothing: repeated, it gives the bits of a cache that never failed."""
    model, inputs = tiny_llama(), prompt(40, batch=2, pads=pads)
    mask, ids = inputs["attention_mask"], inputs["input_ids"]

    def step(cache, column):
        with torch.no_grad():
            return model(
                input_ids=ids[:, column : column + 1],
                attention_mask=mask[:, : column + 1],
                position_ids=(mask.cumsum(-1) - 1)[:, column : column + 1].clamp_min(0),
                **{CACHE_NAME: cache},
            ).logits

    start = new_cache(model, CONFIGS[name])
    teacher_forced(model, start, {k: x[:, :24] for k, x in inputs.items()}, [24])
    smooth = copy.deepcopy(start)
    expected = [step(smooth, c) for c in range(24, 36)]
    assert compressed_tokens(smooth) > 0
    failures = 0
    for n in range(1, 200, 4):
        cache = copy.deepcopy(start)
        with monkeypatch.context() as patch:
            memory = Memory(patch, PLACES, n)
            for column, logits in zip(range(24, 36), expected):
                try:
                    found = step(cache, column)
                except torch.OutOfMemoryError:
                    assert cache.token_positions.length == column
                    assert {x.length for x in cache.tiered} == {column}
                    found = step(cache, column)
                assert torch.equal(found, logits), (n, column)
            failures += memory.failed
        if not memory.failed:
            break
        assert cache.memory() == smooth.memory()
        for ours, theirs in zip(cache.tiered, smooth.tiered):
            for a, b in zip(ours.decode_all(), theirs.decode_all()):
                assert torch.equal(a, b), (n, a.shape, b.shape, (a - b).abs().amax((0, 1, 3)))
    assert failures >= 5


@pytest.mark.parametrize("failing", range(2))
def test_running_out_of_memory_while_buffers_grow(failing, monkeypatch):
    """Where nothing is compressed yet: the uncompressed buffers of either layer cannot grow."""
    model, ids, failures = tiny_llama(), prompt(60)["input_ids"], []
    caches = [fade_fast.create_cache(model, FadeConfig(recent_window=200, block_size=4)) for _ in range(2)]
    for cache in caches:
        teacher_forced(model, cache, prompt(20), [20])
    reserve = buffers.Buffers.reserve

    def step(cache, column):
        with torch.no_grad():
            return model(input_ids=ids[:, column : column + 1], **{CACHE_NAME: cache}).logits

    def limited(self, capacity):
        if self is caches[0].tiered[failing].dense and capacity > self.capacity and not failures:
            failures.append(capacity)
            raise torch.OutOfMemoryError("out of memory, as a test has it")
        reserve(self, capacity)

    monkeypatch.setattr(buffers.Buffers, "reserve", limited)
    for column in range(20, 60):
        try:
            found = step(caches[0], column)
        except torch.OutOfMemoryError:
            assert {x.length for x in caches[0].tiered} == {x.dense.count for x in caches[0].tiered}
            found = step(caches[0], column)
        assert torch.equal(found, step(caches[1], column))
    assert failures


@pytest.mark.slow
@pytest.mark.parametrize("name", CONFIGS)
def test_running_out_of_memory_in_a_prompt_leaves_the_cache_empty(name, monkeypatch):
    model, inputs = tiny_llama(), prompt(50)
    expected = generate(model, new_cache(model, CONFIGS[name]), inputs, new=20)
    failures = 0
    for n in range(1, 60, 4):
        cache = new_cache(model, CONFIGS[name])
        with monkeypatch.context() as patch:
            memory = Memory(patch, PLACES, n)
            try:
                generate(model, cache, inputs, new=1)
            except torch.OutOfMemoryError:
                assert cache.get_seq_length() == 0 and not any(x.is_initialized for x in cache.tiered)
        failures += memory.failed
        cache.reset()
        assert torch.equal(generate(model, cache, inputs, new=20), expected)
        if not memory.failed:
            break
    assert failures >= 2


def test_a_long_step_that_failed_halfway_is_remembered(monkeypatch):
    """After it the layers differ; nothing goes on with that but reset()."""
    model = tiny_llama()
    cache = fade_fast.create_cache(model, CONFIGS["int4"])
    ids = prompt(90)["input_ids"]
    teacher_forced(model, cache, prompt(40), [40])
    demote, calls = layer.KVLayer._demote, []

    def fail(self, *args):
        calls.append(self)
        if self is cache.tiered[1]:
            raise torch.OutOfMemoryError("out of memory, as a test has it")
        demote(self, *args)

    with monkeypatch.context() as patch, pytest.raises(torch.OutOfMemoryError), torch.no_grad():
        patch.setattr(layer.KVLayer, "_demote", fail)
        model(input_ids=ids[:, 40:80], **{CACHE_NAME: cache})
    assert len(calls) == 2
    for attempt in (
        lambda: model(input_ids=ids[:, 80:81], **{CACHE_NAME: cache}),
        lambda: cache.crop(-1),
        lambda: cache.reorder_cache(torch.tensor([0])),
        lambda: cache.state_dict(),
    ):
        with pytest.raises(RuntimeError, match="a step has not ended: the first layer has seen 80"):
            attempt()
    cache.reset()
    again = generate(model, cache, prompt(40), new=10)
    assert torch.equal(
        again, generate(model, fade_fast.create_cache(model, CONFIGS["int4"]), prompt(40), new=10)
    )


def test_another_thread_is_refused():
    """Whatever it tries while a step is under way; and its attempts leave no trace."""
    model, inputs = tiny_llama(), prompt(40)
    expected = generate(model, fade_fast.create_cache(model, CONFIGS["evict"]), inputs, new=10)
    cache, refused = fade_fast.create_cache(model, CONFIGS["evict"]), []
    attempts = [
        lambda: model(input_ids=torch.ones(1, 1, dtype=torch.long), **{CACHE_NAME: cache}),
        cache.reset,
        cache.memory,
        lambda: cache.crop(0),
        lambda: cache.reorder_cache(torch.tensor([0])),
        lambda: cache.batch_select_indices(torch.tensor([0])),
        lambda: cache.save("nowhere"),
        cache.state_dict,
        cache.snapshot,
    ]

    def intrude():
        for attempt in attempts:
            try:
                attempt()
            except RuntimeError as error:
                refused.append(str(error))

    def listener(event):
        if not refused:
            thread = threading.Thread(target=intrude)
            thread.start()
            thread.join()

    with cache.listen(listener):
        assert torch.equal(generate(model, cache, inputs, new=10), expected)
    assert len(refused) == len(attempts)
    assert all("in use by another thread" in said for said in refused)
    text = torch.cat((inputs["input_ids"], expected, torch.ones(1, 10, dtype=torch.long)), dim=1)
    generate(model, cache, dict(input_ids=text, attention_mask=torch.ones_like(text)), new=2)


def test_between_the_layers_of_a_step():
    """Another thread that comes between two layers of a step finds it under way."""
    model, said = tiny_llama(), []
    cache = fade_fast.create_cache(model, CONFIGS["int4"])
    generate(model, cache, prompt(20), new=2)

    def intrude():
        try:
            model(input_ids=torch.ones(1, 1, dtype=torch.long), **{CACHE_NAME: cache})
        except RuntimeError as error:
            said.append(str(error))

    def between(*args):
        hook.remove()
        thread = threading.Thread(target=intrude)
        thread.start()
        thread.join()

    hook = model.model.layers[0].register_forward_hook(between)
    with torch.no_grad():
        model(input_ids=torch.ones(1, 1, dtype=torch.long), **{CACHE_NAME: cache})
    assert (
        len(said) == 1 and "a step has not ended: the first layer has seen 22 tokens, the last 21" in said[0]
    )
    assert cache.get_seq_length() == 22 and {x.length for x in cache.tiered} == {22}


def test_caches_of_two_threads_do_not_mind_each_other():
    model, found = tiny_llama(), {}
    inputs = [prompt(40, seed=seed) for seed in range(2)]
    expected = [generate(model, fade_fast.create_cache(model, "safe"), x, new=10) for x in inputs]

    def run(i):
        found[i] = generate(model, fade_fast.create_cache(model, "safe"), inputs[i], new=10)

    threads = [threading.Thread(target=run, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(found[i], expected[i]) for i in range(2))


def test_rows_that_are_not_there():
    model = tiny_llama()
    cache = fade_fast.create_cache(model, CONFIGS["int4"])
    cache.reorder_cache(torch.tensor([5]))  # an empty cache has no rows yet
    generate(model, cache, prompt(20, batch=2), new=2)
    before = [x.clone() for x in cache.tiered[0].decode_all()]
    for index in ([0, 2], [-1, 0], [0], [0, 1, 1], []):
        with pytest.raises(ValueError, match="rows .*: a tensor of 2 numbers from 0 to 1 is allowed"):
            cache.reorder_cache(torch.tensor(index, dtype=torch.long))
    for index in (torch.tensor([2]), torch.tensor([[0]]), torch.tensor([0.0]), [0]):
        with pytest.raises(ValueError, match="rows .*: a tensor of numbers from 0 to 1 is allowed"):
            cache.batch_select_indices(index)
    for repeats in (0, -1, 1.5, True):
        with pytest.raises(ValueError, match="repeats=.*: an integer of at least 1"):
            cache.batch_repeat_interleave(repeats)
    assert all(torch.equal(a, b) for a, b in zip(before, cache.tiered[0].decode_all()))
    cache.batch_repeat_interleave(2)
    assert cache.token_positions.batch == 4


def hybrid():
    """A sliding layer, which transformers keeps, before a full one, which is tiered."""
    config = Qwen2Config(
        vocab_size=256, hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, layer_types=["sliding_attention", "full_attention"], use_sliding_window=True,
        sliding_window=24, initializer_range=0.2,
    )  # fmt: skip
    torch.manual_seed(0)
    return Qwen2ForCausalLM(config).eval()


@pytest.mark.parametrize("length", [16, 40])
def test_layers_of_transformers_take_the_step_back_too_or_it_is_refused(length, monkeypatch):
    """Within its window the sliding layer forgets the step that failed; beyond it, it cannot."""
    model, ids = hybrid(), prompt(60)["input_ids"]
    caches = [fade_fast.create_cache(model, CONFIGS["int4"]) for _ in range(2)]
    for cache in caches:
        generate(model, cache, dict(input_ids=ids[:, :length]), new=1)

    def step(cache):
        with torch.no_grad():
            return model(input_ids=ids[:, length : length + 1], **{CACHE_NAME: cache}).logits

    def fail(*args, **kwargs):
        raise torch.OutOfMemoryError("out of memory, as a test has it")

    with monkeypatch.context() as patch, pytest.raises(torch.OutOfMemoryError):
        patch.setattr(layer.KVLayer, "append", fail)
        step(caches[0])
    if length < 24:
        assert torch.equal(step(caches[0]), step(caches[1]))
        assert caches[0].get_seq_length(0) == caches[0].get_seq_length(1) == length + 1
    else:
        with pytest.raises(RuntimeError, match="a step has not ended"):
            step(caches[0])
        caches[0].reset()
        generate(model, caches[0], dict(input_ids=ids), new=2)
