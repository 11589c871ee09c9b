"""The cache object: memory, bad input, reordering, cropping, reuse, attaching."""

import copy
import warnings

import pytest
import torch
from transformers import FalconConfig, FalconForCausalLM, T5Config, T5ForConditionalGeneration

import fade_fast
from fade_fast.cache.buffers import copy_all, take_rows
from fade_fast.cache.positions import PAD
from fade_fast.hf.attention import NAME
from fade_fast.hf.models import CACHE_NAME
from fade_fast.kernels import packed, rotated
from fade_fast.policies import plan
from fade_ref.config import POLICIES, FadeConfig

from ..marks import slow_but
from ..models import (
    EVICTING,
    OFF,
    SAFE,
    SMALL,
    compressed_tokens,
    dense,
    generate,
    prompt,
    teacher_forced,
    tiny_llama,
)


def storages(cache) -> int:
    """Bytes of every distinct tensor storage reachable from a cache, found without its help."""
    found, todo, known = {}, [cache], set()
    while todo:
        x = todo.pop()
        if id(x) in known or isinstance(x, (str, bytes, int, float, torch.nn.Module, type)):
            continue
        known.add(id(x))
        if isinstance(x, torch.Tensor):
            found[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        elif isinstance(x, dict):
            todo += x.values()
        elif isinstance(x, (list, tuple, set)):
            todo += x
        elif hasattr(x, "__dict__") and type(x).__module__.startswith(("fade", "transformers.cache")):
            todo += [part for name, part in vars(x).items() if name != "seen"]  # ids on the host
    return sum(found.values())


@pytest.mark.parametrize("config", [OFF, SAFE, EVICTING], ids=["off", "safe", "evicting"])
@pytest.mark.parametrize("max_length", slow_but([None, 400], None))
def test_memory_reports_what_is_allocated(config, max_length):
    model = tiny_llama(layers=3)
    cache = fade_fast.create_cache(model, config, max_length=max_length)
    assert cache.memory().allocated == storages(cache)
    for turn in (300, 1, 1, 40):
        teacher_forced_step(model, cache, turn)
        memory = cache.memory()
        assert memory.allocated == storages(cache)
        assert memory.dense == cache.get_seq_length() * 3 * 2 * 2 * 64 * 4
        assert memory.packed <= memory.allocated
        assert sum(memory.tokens.values()) == cache.get_seq_length()
    assert config is OFF or memory.ratio > 2


def teacher_forced_step(model, cache, count):
    ids = torch.randint(1, 256, (1, count), generator=torch.Generator().manual_seed(count))
    with torch.no_grad():
        return model(ids, **{CACHE_NAME: cache}, use_cache=True).logits


@pytest.mark.slow
@pytest.mark.parametrize("bits, least", [(8, 1.8), (4, 3.3), (3, 4.1), (2, 5.5)])
def test_ratio_at_8192_tokens_of_head_dim_64_in_bfloat16(bits, least):
    """The shape of SmolLM2's cache, by the storages that live after generate()."""
    model = tiny_llama(heads=3, group=3, layers=6 if bits == 4 else 2, dtype=torch.bfloat16)
    cache = fade_fast.create_cache(model, FadeConfig(middle_k_bits=bits, middle_v_bits=bits))
    generate(model, cache, prompt(8192 - 64), new=64)
    memory = cache.memory()
    assert memory.allocated == storages(cache) and compressed_tokens(cache) > 7900
    assert memory.dense / storages(cache) >= least


@pytest.mark.slow
def test_room_for_max_length_is_made_at_once():
    model = tiny_llama()
    cache = fade_fast.create_cache(model, SAFE, max_length=300)
    teacher_forced_step(model, cache, 20)
    before = [x.data_ptr() for layer in cache.tiered for x in layer.tensors()]
    for _ in range(280):
        teacher_forced_step(model, cache, 1)
    assert before == [x.data_ptr() for layer in cache.tiered for x in layer.tensors()]


@pytest.mark.parametrize("config", slow_but([OFF, SAFE, EVICTING], EVICTING), ids=["off", "safe", "evicting"])
def test_reorder_select_and_repeat_equal_the_same_rows(config):
    """Rows moved in a filled cache, packed tiers included, go on as they would have elsewhere."""
    model, inputs = tiny_llama(dtype=torch.float64), prompt(70, batch=3, pads=(0, 5, 12))
    more = torch.randint(1, 256, (3, 4))
    for name, index in (
        ("reorder_cache", [2, 0, 0]),
        ("batch_select_indices", [1, 2]),
        ("repeat", [0, 0, 1, 1, 2, 2]),
    ):
        index = torch.tensor(index)
        here, there = (fade_fast.create_cache(model, config) for _ in range(2))
        teacher_forced(model, here, inputs, [60] + [1] * 10)
        rows = {name: x[index] for name, x in inputs.items()}
        teacher_forced(model, there, rows, [60] + [1] * 10)
        here.batch_repeat_interleave(2) if name == "repeat" else getattr(here, name)(index)
        mask = torch.cat((rows["attention_mask"], torch.ones(len(index), 4, dtype=torch.int64)), dim=1)
        position = (mask.cumsum(-1) - 1)[:, -4:]
        step = dict(input_ids=more[index], attention_mask=mask, position_ids=position, use_cache=True)
        with torch.no_grad():
            ours = model(**step, **{CACHE_NAME: here}).logits
            theirs = model(**step, **{CACHE_NAME: there}).logits
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)
        assert config is OFF or compressed_tokens(here) > 0


@pytest.mark.parametrize("config", slow_but([OFF, SAFE, EVICTING], EVICTING), ids=["off", "safe", "evicting"])
def test_crop_leaves_no_trace(config):
    model, inputs = tiny_llama(dtype=torch.float64), prompt(90)
    cropped, plain = (fade_fast.create_cache(model, config) for _ in range(2))
    for cache in (cropped, plain):
        teacher_forced(model, cache, inputs, [60])
    for _ in range(10):
        teacher_forced_step(model, cropped, 7)
        cropped.crop(-5)
        cropped.crop(0)
        teacher_forced_step(model, plain, 7)
        for layer in plain.tiered:  # by hand: the newest five tokens never were
            layer.dense.count -= 5
            layer.length -= 5
        plain.token_positions.crop(5)
        assert cropped.get_seq_length() == plain.get_seq_length()
        torch.testing.assert_close(
            teacher_forced_step(model, cropped, 1), teacher_forced_step(model, plain, 1), rtol=0, atol=0
        )
    assert config is OFF or compressed_tokens(cropped) > 0
    length = cropped.get_seq_length()
    with pytest.raises(ValueError, match="crop"):
        cropped.crop(3)
    if config is not OFF:
        with pytest.raises(ValueError, match="uncompressed"):
            cropped.crop(-length)
    assert cropped.get_seq_length() == length


def test_reset_takes_another_batch_and_dtype():
    model, cache = tiny_llama(), None
    cache = fade_fast.create_cache(model, SAFE)
    first = generate(model, cache, prompt(60))
    cache.reset()
    assert cache.get_seq_length() == 0
    assert torch.equal(generate(model, cache, prompt(60)), first)
    cache.reset()
    generate(model.to(torch.bfloat16), cache, prompt(60, batch=3))
    assert compressed_tokens(cache) > 0


def test_deepcopy_is_independent():
    model, inputs = tiny_llama(), prompt(60)
    cache = fade_fast.create_cache(model, EVICTING)
    teacher_forced(model, cache, inputs, [60])
    other = copy.deepcopy(cache)
    a = [teacher_forced_step(model, cache, 1) for _ in range(20)]
    b = [teacher_forced_step(model, other, 1) for _ in range(20)]
    assert all(torch.equal(x, y) for x, y in zip(a, b))


def test_two_caches_alternate_on_one_model():
    model = tiny_llama()
    alone = [generate(model, fade_fast.create_cache(model, SAFE), prompt(60, seed=s), new=20) for s in (1, 2)]
    caches = [fade_fast.create_cache(model, SAFE) for _ in range(2)]
    ids = [prompt(60, seed=s)["input_ids"] for s in (1, 2)]
    found = [[], []]
    with torch.no_grad():
        for _ in range(20):
            for i, cache in enumerate(caches):
                ids[i] = model(ids[i], **{CACHE_NAME: cache}, use_cache=True).logits[:, -1:].argmax(-1)
                found[i].append(ids[i])
    for i in range(2):
        assert torch.equal(torch.cat(found[i], dim=1), alone[i])


def test_detach_restores_and_plain_caches_work_attached():
    model, inputs = tiny_llama(), prompt(40)
    previous, expected = model.config._attn_implementation, generate(model, dense(model), inputs)
    fade_fast.create_cache(model)
    fade_fast.create_cache(model)  # attaching twice is attaching once
    assert model.config._attn_implementation == NAME
    assert torch.equal(generate(model, dense(model), inputs), expected)
    fade_fast.detach(model)
    fade_fast.detach(model)
    assert model.config._attn_implementation == previous
    assert torch.equal(generate(model, dense(model), inputs), expected)


@pytest.mark.parametrize("at_once", [1, 5000, 10**9])
def test_means_do_not_depend_on_how_many_are_taken_at_once(at_once, monkeypatch):
    draw = torch.Generator().manual_seed(0)
    keys = torch.randn(2, 3, 41, 16, 8, generator=draw).bfloat16()
    position = torch.where(torch.rand(2, 1, 41, 16, generator=draw) < 0.3, PAD, 5)
    position[0, 0, 3] = PAD
    monkeypatch.setattr(rotated, "ELEMENTS_SUMMED", at_once)
    real = position != PAD
    exact = keys.double().masked_fill(~real[..., None], 0).sum(-2) / real.sum(-1, keepdim=True).clamp_min(1)
    assert torch.equal(rotated.key_mean(keys, real), exact.half())
    assert torch.equal(rotated.key_mean(keys, None), keys.double().mean(-2).half())
    assert rotated.key_mean(keys[:, :, :0], None).shape == (2, 3, 0, 8)


def test_more_rows_have_room_for_longer_chunks(uncompiled_kernels, monkeypatch):
    """On CUDA chunks grow with the batch; the slots read may then not end before the tokens do."""
    chunk_of = lambda heads, n, *more, **options: 16 if heads * n < 500 else 128  # noqa: E731
    monkeypatch.setattr(packed, "chunk_of", chunk_of)
    model = tiny_llama(dtype=torch.float16)
    cache = fade_fast.create_cache(model, SAFE, max_length=100)
    teacher_forced_step(model, cache, 96)
    tiers = [layer.middle.tiers[0] for layer in cache.tiered]
    assert all(64 < tier.records.count <= tier.num_read < tier.records.capacity < 128 for tier in tiers)
    cache.batch_repeat_interleave(5)
    assert all(tier.records.count <= tier.num_read == 128 < tier.records.capacity for tier in tiers)
    with torch.no_grad():
        logits = model(torch.ones(5, 1, dtype=torch.long), **{CACHE_NAME: cache}).logits
    assert logits.isfinite().all() and torch.equal(logits, logits[:1].expand_as(logits))


@pytest.mark.parametrize("window, held, new, most", [(64, 131, 9, 148), (1 << 15, 5000, 9, 5100)])
def test_room_for_a_draft_is_made_with_the_first(window, held, new, most, compiled_on):
    """On CUDA, where addresses should last; a window longer than the text is not made room for at once."""
    compiled_on("cpu")
    model = tiny_llama(dtype=torch.float16)
    layer = fade_fast.create_cache(model, FadeConfig(recent_window=window), verify=False).tiered[0]
    x, capacities = torch.zeros(1, 2, held, 64, dtype=torch.float16), []
    for part in (x[:, :, :100], x[:, :, 100:], x[:, :, :new]):
        layer.token_positions.extend(layer.length, None, 1, part.shape[2], x.device)
        layer.append(part, part)
        capacities.append(layer.dense.capacity)
    assert held <= capacities[1] < held + new <= capacities[2] <= most


@pytest.mark.parametrize("bits", slow_but([8, 4, 2], 4))
def test_padded_rows_are_the_same_after_detach(bits):
    """The model's own attention then reads every token where it came, and the sinks uncompressed."""
    model = tiny_llama(dtype=torch.float64)
    config = FadeConfig(n_sink=6, recent_window=8, block_size=4, middle_k_bits=bits, middle_v_bits=bits)
    inputs = prompt(60, batch=4, pads=(0, 3, 11, 40))
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    position = (mask.cumsum(-1) - 1).clamp_min(0)
    cache, outputs = fade_fast.create_cache(model, config), []
    with torch.no_grad():
        model(input_ids=ids[:, :58], attention_mask=mask[:, :58], **{CACHE_NAME: cache})
        assert compressed_tokens(cache) > 0
        for held in (copy.deepcopy(cache), cache):
            inputs = dict(input_ids=ids[:, 58:], attention_mask=mask, position_ids=position[:, 58:])
            outputs.append(model(**inputs, **{CACHE_NAME: held}).logits)
            fade_fast.detach(model)
    torch.testing.assert_close(*outputs, rtol=1e-9, atol=1e-9)


def test_random_state_is_left_alone():
    model = tiny_llama()
    torch.manual_seed(5)
    before = torch.get_rng_state()
    generate(model, fade_fast.create_cache(model, EVICTING), prompt(60))
    assert torch.equal(before, torch.get_rng_state())


def test_a_model_that_does_not_dispatch_attention_reads_dense_tensors():
    torch.manual_seed(0)
    config = FalconConfig(
        vocab_size=256, hidden_size=128, num_hidden_layers=2, num_attention_heads=2,
        alibi=False, multi_query=False,
        new_decoder_architecture=False, initializer_range=0.2, pad_token_id=0,
    )  # fmt: skip
    model, inputs = FalconForCausalLM(config).eval(), prompt(50)
    expected = generate(model, dense(model), inputs)
    with pytest.warns(UserWarning, match="does not dispatch"):
        cache = fade_fast.create_cache(model, OFF)
    assert torch.equal(generate(model, cache, inputs), expected)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        cache = fade_fast.create_cache(model, SAFE)
    generate(model, cache, inputs)
    assert compressed_tokens(cache) > 0


class TestBadInput:
    """Each is refused with a clear error, and the cache is as it was."""

    def filled(self, config=SAFE):
        model = tiny_llama()
        cache = fade_fast.create_cache(model, config)
        teacher_forced_step(model, cache, 50)
        return model, cache

    @pytest.mark.parametrize(
        "bad",
        [
            dict(n_sink=-1), dict(recent_window=-5), dict(block_size=0), dict(int4_budget=-1),
            dict(int4_budget=1.5), dict(int2_budget=8), dict(int4_budget=None, int2_budget=None),
            dict(recent_window=None, int4_budget=4), dict(eviction_policy="lru"),
            dict(middle_k_bits=5), dict(middle_v_bits="4"), dict(middle_k_bits=True),
            dict(quant_backend="zip"), dict(quant_backend="channel", int4_budget=64),
            dict(quant_backend="product"), dict(quant_backend="product", loss_bound=0.1),
            dict(positions="rotated"), dict(plan_scope="rows"), dict(n_sink=True),
        ],
        ids=str,
    )  # fmt: skip
    def test_configurations(self, bad):
        with pytest.raises(ValueError, match=str(next(iter(bad)))):
            FadeConfig(**bad)

    def test_product_quantization_is_a_baseline(self):
        """The message has the reason and what to take instead, and this is a configuration."""
        with pytest.raises(ValueError, match="baseline of the benchmarks only, because .* lose less") as told:
            FadeConfig(quant_backend="product")
        instead = dict(quant_backend="matched", middle_k_bits=2, middle_v_bits=2)
        assert str(told.value).endswith(": use " + ", ".join(f"{k}={v!r}" for k, v in instead.items()))
        assert FadeConfig(**instead).compresses
        with pytest.raises(TypeError, match="no argument 'codebooks'; its arguments are model, config"):
            fade_fast.create_cache(tiny_llama(), codebooks="books.safetensors")

    def test_presets_and_types(self):
        model = tiny_llama()
        with pytest.raises(ValueError, match="lossless, safe, int4, recall, balanced, aggressive"):
            fade_fast.create_cache(model, "sfe")
        with pytest.raises(TypeError, match="config"):
            fade_fast.create_cache(model, dict(n_sink=4))
        with pytest.raises(TypeError, match="PreTrainedModel"):
            fade_fast.create_cache(torch.nn.Linear(2, 2))
        with pytest.raises(TypeError):
            FadeConfig(windw=3)
        for bad in (0, -3, 2.0, True):
            with pytest.raises(ValueError, match="max_length"):
                fade_fast.create_cache(model, max_length=bad)
        for policy in set(POLICIES) - set(plan.SUPPORTED):
            with pytest.raises(ValueError, match="eviction_policy"):
                fade_fast.create_cache(model, FadeConfig(int4_budget=64, eviction_policy=policy))
        heads = dict(int4_budget=64, plan_scope="head")
        for more, what in (
            (dict(eviction_policy="adaptive"), "different numbers"),
            (dict(int2_budget=8), "different positions"),
        ):
            with pytest.raises(ValueError, match=what):
                fade_fast.create_cache(model, FadeConfig(**heads, **more))
        assert model.config._attn_implementation != NAME, "a refusal attaches nothing"

    def test_encoder_decoder_models(self):
        config = T5Config(vocab_size=32, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
        with pytest.raises(ValueError, match="encoder-decoder"):
            fade_fast.create_cache(T5ForConditionalGeneration(config))

    @pytest.mark.parametrize(
        "shape",
        [(2, 2, 1, 64), (1, 3, 1, 64), (1, 2, 1, 32), (1, 2, 0, 64), (2, 1, 64)],
        ids=["batch", "heads", "head_dim", "empty", "dimensions"],
    )
    def test_shapes(self, shape):
        _, cache = self.filled()
        before = [x.clone() for x in cache.tiered[0].tensors()]
        with pytest.raises(ValueError):
            cache.update(torch.zeros(shape), torch.zeros(shape), 0)
        assert cache.get_seq_length() == 50
        assert all(torch.equal(a, b) for a, b in zip(before, cache.tiered[0].tensors()))

    def test_keys_and_values_that_disagree(self):
        _, cache = self.filled()
        k = torch.zeros(1, 2, 1, 64)
        for v in (k[..., :32], k.half(), torch.zeros(1, 2, 2, 64)):
            with pytest.raises(ValueError, match="one"):
                cache.update(k, v, 0)
        with pytest.raises(ValueError, match="dtype"):
            cache.update(k.half(), k.half(), 0)
        with pytest.raises(ValueError, match="floating"):
            cache.update(k.long(), k.long(), 0)

    def test_a_second_batch_size(self):
        model, cache = self.filled()
        with pytest.raises(ValueError, match="batch"):
            model(torch.ones(2, 1, dtype=torch.int64), **{CACHE_NAME: cache}, use_cache=True)
        assert cache.get_seq_length() == 50

    def test_another_model(self):
        model, cache = self.filled()
        other = tiny_llama(seed=1)
        fade_fast.attach(other)
        before = [x.clone() for x in cache.tiered[0].tensors()]
        with pytest.raises(ValueError, match="another model"):
            teacher_forced_step(other, cache, 1)
        assert cache.get_seq_length() == 50
        assert all(torch.equal(a, b) for a, b in zip(before, cache.tiered[0].tensors()))

    def test_use_cache_false(self):
        model, cache = self.filled()
        with pytest.raises(ValueError, match="use_cache"):
            generate(model, cache, prompt(60), use_cache=False)

    def test_widths_that_do_not_fill_bytes(self):
        model = tiny_llama(head_dim=36)
        cache = fade_fast.create_cache(model, FadeConfig(middle_k_bits=3))
        with pytest.raises(ValueError, match="whole bytes"):
            teacher_forced_step(model, cache, 4)
        assert cache.get_seq_length() == 0

    def test_models_that_cannot_be_renumbered(self):
        from transformers import GPT2Config, GPT2LMHeadModel

        model = GPT2LMHeadModel(
            GPT2Config(vocab_size=256, n_embd=128, n_layer=2, n_head=2, n_positions=256)
        ).eval()
        with pytest.raises(ValueError, match="cannot be renumbered"):
            fade_fast.create_cache(model, EVICTING)
        kept = FadeConfig(**SMALL, int4_budget=24, positions="original")
        cache = fade_fast.create_cache(model, kept)
        generate(model, cache, prompt(60))
        assert compressed_tokens(cache) > 0


@pytest.mark.parametrize("policy", ["position", "h2o"])
def test_calls_that_record_gradients_store_the_same(policy):
    """Somebody calls the model without `no_grad`: what is stored is data, and holds no graph."""
    model, ids = tiny_llama().requires_grad_(True), prompt(60)["input_ids"]
    config = FadeConfig(recent_window=8, block_size=4, int4_budget=16, eviction_policy=policy)
    outs = []
    for context in (torch.enable_grad, torch.no_grad):
        cache = fade_fast.create_cache(model, config)
        with context():
            for part in (ids[:, :30], ids[:, 30:50], *ids[:, 50:].split(1, dim=1)):
                outs.append(model(input_ids=part, **{CACHE_NAME: cache}).logits)
        assert compressed_tokens(cache) > 0
        assert not any(x.requires_grad for layer in cache.tiered for x in layer.tensors())
    half = len(outs) // 2
    assert all(torch.equal(x, y) for x, y in zip(outs[:half], outs[half:]))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.bool, torch.float16, torch.float32, torch.float64])
def test_rows_are_taken_whatever_they_hold(dtype):
    """In words or not, in place or not."""
    torch.manual_seed(0)
    for shape in ((3,), (3, 5), (3, 8), (3, 2, 7, 16), (3, 2, 0, 16), (3, 2, 1, 3)):
        whole = torch.randint(0, 2, (4, *shape[1:]), generator=torch.Generator().manual_seed(1)).to(dtype)
        last = torch.stack([whole, whole], -1)[1:]
        for x in (whole[:3].clone(), whole[1:], last[..., 0]):  # elsewhere in memory, and not contiguous
            for index in ([2, 0, 0], [1], [0, 1, 2, 2, 1]):
                index = torch.tensor(index)
                expected, here = x.index_select(0, index), x.data_ptr()
                found = take_rows(x, index)
                assert torch.equal(found, expected) and found.dtype == dtype
                assert (found is x and x.data_ptr() == here) == (len(index) == 3)
            pending, x = [], x.clone()
            assert take_rows(x, torch.tensor([2, 0, 0]), pending) is x and len(pending) == 1
            pending.append((torch.zeros(2, dtype=torch.int32), torch.tensor([3, 4], dtype=torch.int32)))
            expected = x[[2, 0, 0]]
            copy_all(pending)
            assert torch.equal(x, expected) and pending[1][0].tolist() == [3, 4]
