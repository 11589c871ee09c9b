"""generate() through a tiered cache, on tiny random models."""

import itertools

import pytest
import torch

import fade_fast
from fade_fast.formats.rotated import unpack_record
from fade_fast.hf.models import CACHE_NAME
from fade_ref.config import FadeConfig

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
    show_survivors,
    teacher_forced,
    tiny_llama,
    twin_logits,
)


@pytest.mark.parametrize(
    "group, head_dim", slow_but(itertools.product([1, 3, 4, 7], [64, 80, 96, 128, 256]), (1, 80), (4, 64))
)
def test_without_compression_tokens_equal_dynamic_cache(group, head_dim):
    model, inputs = tiny_llama(heads=1, group=group, head_dim=head_dim), prompt(50)
    expected = generate(model, dense(model), inputs)
    for config in (OFF, FadeConfig(recent_window=500)):
        cache = fade_fast.create_cache(model, config)
        assert torch.equal(generate(model, cache, inputs), expected)
        assert compressed_tokens(cache) == 0 and cache.get_seq_length() == 50 + 40 - 1


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_dtypes(dtype):
    model, inputs = tiny_llama(dtype=dtype), prompt(50, batch=2)
    assert torch.equal(
        generate(model, fade_fast.create_cache(model, OFF), inputs), generate(model, dense(model), inputs)
    )
    for config in (SAFE, EVICTING):
        cache = fade_fast.create_cache(model, config)
        generate(model, cache, inputs)
        assert compressed_tokens(cache) > 0
        assert cache.tiered[0].dense["key"].dtype == dtype


@pytest.mark.parametrize(
    "mode",
    slow_but(
        ["sampling", "beam", "beam sampling", "return sequences", "prompt look-up"],
        "beam",
        "return sequences",
    ),
)
def test_modes_without_compression(mode):
    options = {
        "sampling": dict(do_sample=True, temperature=1.5),
        "beam": dict(num_beams=3),
        "beam sampling": dict(num_beams=3, do_sample=True),
        "return sequences": dict(do_sample=True, num_return_sequences=3),
        "prompt look-up": dict(prompt_lookup_num_tokens=4),
    }[mode]
    model, inputs = tiny_llama(), prompt(50, batch=1 if mode == "prompt look-up" else 2)
    outs = []
    for cache in (dense(model), fade_fast.create_cache(model, OFF)):
        torch.manual_seed(7)
        outs.append(generate(model, cache, inputs, **options))
    assert torch.equal(*outs)


MODES = [dict(), dict(num_beams=3), dict(num_beams=2, do_sample=True)]


@pytest.mark.parametrize("config", slow_but([SAFE, EVICTING], EVICTING), ids=["safe", "evicting"])
@pytest.mark.parametrize("mode", slow_but(MODES, MODES[-1]), ids=str)
def test_modes_with_compression_equal_the_dense_twin(mode, config):
    """Stock attention over the same codes, decoded, chooses the same tokens."""
    model, inputs = tiny_llama(dtype=torch.float64), prompt(50, batch=2)
    tiered = fade_fast.create_cache(model, config)
    torch.manual_seed(3)
    ours = generate(model, tiered, inputs, **mode)
    assert compressed_tokens(tiered) > 0
    twin = fade_fast.create_cache(model, config)
    fade_fast.detach(model)
    show_survivors(twin)
    torch.manual_seed(3)
    assert torch.equal(ours, generate(model, twin, inputs, **mode))


@pytest.mark.parametrize("settings", [EVICTING, FadeConfig(**SMALL, int4_budget=24, int2_budget=None)])
def test_padding_is_refused_where_it_cannot_be_told_from_tokens(settings):
    """Stock attention masks columns, but survivors are in others; nothing is written by the refusal."""
    model, inputs = tiny_llama(), prompt(60, batch=2, pads=(0, 20))
    filled = fade_fast.create_cache(model, settings)
    new = generate(model, filled, inputs, new=4)
    fade_fast.detach(model)
    step = dict(input_ids=torch.tensor([[5], [6]]), position_ids=torch.tensor([[63], [43]]))
    with pytest.raises(ValueError, match="this cache evicts or moves tokens"):
        model(**step, **{CACHE_NAME: filled}, use_cache=True)
    assert filled.get_seq_length() == 63
    empty = fade_fast.create_cache(model, settings)
    fade_fast.detach(model)
    if settings.evicts:
        with pytest.raises(ValueError, match="this cache evicts or moves tokens"):
            generate(model, empty, inputs, new=4)
        assert empty.get_seq_length() == 0
    fade_fast.attach(model)
    text, mask = torch.cat((inputs["input_ids"], new), 1), torch.ones(2, 64, dtype=torch.long)
    mask[:, :60] = inputs["attention_mask"]
    generate(model, filled, dict(input_ids=text, attention_mask=mask), new=4)
    assert filled.get_seq_length() == 67


CHUNKS = [60] + [1] * 30 + [40, 5, 3] + [1] * 12
TWINS = {
    "int8": FadeConfig(**SMALL, middle_k_bits=8, middle_v_bits=8),
    "int4": SAFE,
    "k3v2": FadeConfig(**SMALL, middle_k_bits=3, middle_v_bits=2),
    "before RoPE": FadeConfig(**SMALL, positions="contiguous"),
    "evicting": EVICTING,
    "evicting, original positions": FadeConfig(**SMALL, int4_budget=24, positions="original"),
    "int4 and int2": FadeConfig(**SMALL, int4_budget=24, int2_budget=24),
}


@pytest.mark.parametrize("name", slow_but(TWINS, "int4 and int2", "k3v2"))
@pytest.mark.parametrize("group, head_dim", slow_but([(1, 64), (3, 80), (4, 96), (7, 128)], (3, 80)))
def test_logits_equal_the_dense_twin(name, group, head_dim):
    """The cache path adds no error beyond quantisation: float64 logits, chunked prefill and decode."""
    model = tiny_llama(heads=1, group=group, head_dim=head_dim, dtype=torch.float64)
    inputs = prompt(sum(CHUNKS), batch=2)
    cache = fade_fast.create_cache(model, TWINS[name])
    ours = teacher_forced(model, cache, inputs, CHUNKS)
    assert compressed_tokens(cache) > 0
    twin = twin_logits(model, TWINS[name], inputs, CHUNKS)
    torch.testing.assert_close(ours, twin, rtol=1e-6, atol=1e-6 * twin.abs().max().item())


@pytest.mark.parametrize(
    "config", slow_but([OFF, SAFE, EVICTING], OFF, EVICTING), ids=["off", "safe", "evicting"]
)
def test_left_padded_rows_equal_the_same_rows_alone(config):
    model, pads = tiny_llama(dtype=torch.float64), (0, 9, 41, 3)
    inputs = prompt(70, batch=4, pads=pads)
    cache = fade_fast.create_cache(model, config)
    together = generate(model, cache, inputs, new=20)
    assert config is OFF or compressed_tokens(cache) > 0
    for b, n in enumerate(pads):
        alone = {name: x[b : b + 1, n:] for name, x in inputs.items()}
        # Blocks start at other tokens in a padded row, so that codes may differ: without
        # compression, and where the mean is the same, tokens are equal; else the row is its own twin.
        if config is OFF or n == 0:
            own = fade_fast.create_cache(model, config)
            assert torch.equal(together[b : b + 1], generate(model, own, alone, new=20))


def test_second_turn_continues_the_conversation():
    model, inputs = tiny_llama(dtype=torch.float64), prompt(120)
    first = {name: x[:, :50] for name, x in inputs.items()}
    for config in (OFF, SAFE, EVICTING):
        cache = fade_fast.create_cache(model, config)
        answer = generate(model, cache, first, new=20)
        text = torch.cat((first["input_ids"], answer, inputs["input_ids"][:, 50:]), dim=1)
        second = dict(input_ids=text, attention_mask=torch.ones_like(text))
        fed = []
        count = lambda _, args, fed=fed: fed.append(args[0].shape[1])  # noqa: E731
        hook = model.model.embed_tokens.register_forward_pre_hook(count)
        ours = generate(model, cache, second, new=20)
        hook.remove()
        assert fed[0] == text.shape[1] - (50 + 20 - 1), "only what the cache has not seen is fed"
        assert cache.get_seq_length() == text.shape[1] + 20 - 1
        if config is OFF:
            assert torch.equal(ours, generate(model, dense(model), second, new=20))
        else:
            assert compressed_tokens(cache) > 0


@pytest.mark.slow
@pytest.mark.parametrize("config", [SAFE, EVICTING], ids=["safe", "evicting"])
def test_prompt_lookup_leaves_no_trace(config):
    """Rejected drafts are cropped before anything is demoted: tokens equal a run without drafts."""
    model, inputs = tiny_llama(dtype=torch.float64), prompt(60)
    inputs["input_ids"][:, 30:] = inputs["input_ids"][:, :30]  # something to look up
    plain = fade_fast.create_cache(model, config)
    expected = generate(model, plain, inputs, new=60)
    drafted = fade_fast.create_cache(model, config)
    assert torch.equal(generate(model, drafted, inputs, new=60, prompt_lookup_num_tokens=5), expected)
    assert compressed_tokens(drafted) > 0


@pytest.mark.slow
def test_tokens_keep_their_codes_wherever_they_move():
    """No middle token is re-quantised through 1000 generated tokens with eviction."""
    model, inputs = tiny_llama(layers=1), prompt(100)
    cache = fade_fast.create_cache(model, EVICTING)
    (layer,) = cache.tiered
    seen, moved, slots = {}, 0, {}

    def follow(*_):
        nonlocal moved
        (tier,) = layer.middle.tiers
        for slot, position in enumerate(tier.records["position"][0, 0].tolist()):
            sides = (unpack_record(tier.fields(slot, slot + 1), side) for side in ("key", "value"))
            now = [x.clone() for packed in sides for x in packed]
            before = seen.setdefault(position, now)
            assert all(torch.equal(a, b) for a, b in zip(before, now)), position
            moved += slots.get(position, slot) != slot
            slots[position] = slot

    model.model.register_forward_hook(follow)
    generate(model, cache, inputs, new=1000)
    assert len(seen) > 900 and moved > 900
    assert cache.memory().tokens["INT4"] == 24 and cache.memory().tokens["EVICTED"] > 900


@pytest.mark.slow
def test_budgets_hold_after_every_step():
    model, inputs = tiny_llama(layers=1), prompt(200)
    config = FadeConfig(**SMALL, int4_budget=20, int2_budget=12)
    cache, sizes = fade_fast.create_cache(model, config), []

    def check(*_):
        tokens = cache.memory().tokens
        assert tokens["INT4"] <= 20 and tokens["INT2"] <= 12 and tokens["FP16"] <= 4 + 16 + 8
        sizes.append(cache.memory().allocated)

    model.model.register_forward_hook(check)
    generate(model, cache, inputs, new=200)
    assert len(sizes) == 200 and max(sizes[1:]) <= sizes[1] * 1.1, "memory does not grow with the text"


def test_float16_overflow_and_nan_of_padding_stay_where_they_are():
    """NaN in the keys and values of padding reaches no real token."""
    model, inputs = tiny_llama(layers=1), prompt(60, batch=2, pads=(0, 20))
    clean = teacher_forced(model, fade_fast.create_cache(model, SAFE), inputs, [60] + [1] * 0)
    projection = model.model.layers[0].self_attn.v_proj
    hook = projection.register_forward_hook(
        lambda _, args, out: out.masked_fill(~inputs["attention_mask"].bool()[..., None], torch.nan)
    )
    poisoned = teacher_forced(model, fade_fast.create_cache(model, SAFE), inputs, [60])
    hook.remove()
    assert torch.equal(clean[0], poisoned[0]) and torch.equal(clean[1, 20:], poisoned[1, 20:])
