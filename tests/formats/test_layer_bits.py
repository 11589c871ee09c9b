"""Other widths for other layers, layers that are not compressed, and keys alone."""

import random

import pytest
import torch

import fade_fast
from fade_fast.formats.rotated import RotatedTier
from fade_fast.kernels import decode, packed
from fade_fast.kernels.packed import TierView
from fade_fast.kernels.rotated import Packed
from fade_ref.config import FadeConfig
from fade_ref.tiers import INTEGER_TIERS

from ..cache.test_decode_graph import compiled, eager
from ..marks import slow_but
from ..models import compressed_tokens, generate, new_cache, prompt, tiny_llama

SMALL = dict(recent_window=8, block_size=4)
RULES = {
    "keys alone": dict(middle_v_bits=16),
    "boundary": dict(layer_bits="boundary"),
    "boundary-16": dict(layer_bits="boundary-16"),
    "mapping": dict(layer_bits={1: (8, 4), 4: (16, 16), 5: (2, 16)}),
    "function": dict(layer_bits=lambda layer, layers: (8, 16) if layer % 2 else (2, 2)),
    "evicts": dict(layer_bits={0: (16, 16), 3: (8, 16)}, int4_budget=12, int2_budget=8),
    "by attention": dict(layer_bits={2: (16, 16), 3: (8, 16)}, int4_budget=12, eviction_policy="h2o"),
}


def names(cache) -> list[list[str]]:
    """Names of the tiers that hold tokens, by layer."""
    return [[tier.name for tier in layer.held_tiers()] for layer in cache.tiered]


def test_the_rules():
    default, keys, kept = (4, 4), (8, 16), (16, 16)
    bits = lambda **fields: [FadeConfig(**fields).bits(layer, 6) for layer in range(6)]  # noqa: E731
    assert bits() == [default] * 6
    assert bits(layer_bits="boundary") == [(8, 8)] * 2 + [default] * 2 + [(8, 8)] * 2
    assert bits(layer_bits="boundary-16") == [kept] * 2 + [default] * 2 + [kept] * 2
    assert bits(layer_bits={2: keys}) == [default] * 2 + [keys] + [default] * 3
    assert bits(layer_bits=lambda layer, layers: keys if layer == layers - 1 else kept) == [kept] * 5 + [keys]


def test_a_function_becomes_a_mapping_of_the_layers_that_are_tiered():
    config = FadeConfig(layer_bits=lambda layer, layers: (8, 8) if layer < layers // 2 else (4, 2))
    assert config.resolved(4, [0, 3]).layer_bits == ((0, (8, 8)), (3, (4, 2)))
    mapping = FadeConfig(layer_bits={"3": [8, 16], 0: (2, 2)})  # as JSON has it
    assert mapping == FadeConfig(layer_bits=((0, (2, 2)), (3, (8, 16)))) and hash(mapping)


@pytest.mark.parametrize(
    "fields, words",
    [
        (dict(layer_bits="edges"), "layer_bits='edges'"),
        (dict(layer_bits={0: (5, 4)}), r"layer_bits has \(5, 4\)"),
        (dict(layer_bits={0: (16, 4)}), "keys of 16 bits go with values of 16 bits"),
        (dict(layer_bits={-1: (8, 8)}), "numbered from 0"),
        (dict(layer_bits={0: 8}), "layer_bits"),
        (dict(layer_bits=7), "layer_bits=7"),
        (dict(middle_k_bits=16), "middle_k_bits=16"),
        (dict(layer_bits={0: (8, 8)}, quant_backend="symmetric"), "quant_backend='symmetric'"),
        (dict(middle_v_bits=16, quant_backend="channel"), "quant_backend='channel'"),
    ],
    ids=str,
)
def test_wrong_rules_are_refused(fields, words):
    with pytest.raises(ValueError, match=words):
        FadeConfig(**fields)


def test_layers_that_cannot_be_compressed_are_refused():
    with pytest.raises(ValueError, match=r"layer_bits names layers \[2, 9\]"):
        new_cache(tiny_llama(), FadeConfig(layer_bits={1: (8, 8), 2: (8, 8), 9: (4, 2)}))
    with pytest.raises(ValueError, match="layer_bits has"):
        new_cache(tiny_llama(), FadeConfig(layer_bits=lambda layer, layers: (1, 1)))


@pytest.mark.parametrize("pads", [pytest.param((), marks=pytest.mark.slow, id="unpadded"), (0, 11)])
@pytest.mark.parametrize("name", slow_but(RULES, "by attention"))
def test_each_layer_has_its_format(name, pads, tmp_path):
    """Text, tiers, memory and a checkpoint, against a cache that reads the same codes dense."""
    model, config = tiny_llama(layers=6, dtype=torch.float64), FadeConfig(**SMALL, **RULES[name])
    inputs = prompt(60, batch=2, pads=pads)
    cache = new_cache(model, config)
    generate(model, cache, inputs, new=30)
    for layer, held in zip(range(6), names(cache)):
        keys, values = config.bits(layer, 6)
        first = INTEGER_TIERS[keys].name if keys == values < 16 else f"K{keys}V{values}"
        assert held[:1] == ([] if keys == 16 else [first])
        kept = cache.tiered[layer].dense.count == cache.get_seq_length()
        assert kept == (keys == 16)
    assert compressed_tokens(cache) > 0
    cache.save(tmp_path / "cache")
    again = fade_fast.load_cache(tmp_path / "cache", model, verify=False)
    assert (
        again.memory().packed == cache.memory().packed
        and again.snapshot()["layers"] == cache.snapshot()["layers"]
    )
    for ours, theirs in zip(cache.tiered, again.tiered):
        assert all(torch.equal(a, b) for a, b in zip(ours.decode_all(), theirs.decode_all()))


@pytest.mark.slow
@pytest.mark.parametrize("pads", [(0, 0), (0, 11)], ids=["unpadded", "padded"])
@pytest.mark.parametrize("name", RULES)
def test_captured_steps_equal_eager_ones(name, pads):
    """One graph serves layers of different formats."""
    model, config = tiny_llama(layers=6, dtype=torch.float64), FadeConfig(**SMALL, **RULES[name])
    inputs = prompt(60, batch=2, pads=pads)
    cache, theirs = new_cache(model, config), new_cache(model, config)
    assert torch.equal(compiled(model, cache, inputs, new=40), eager(model, theirs, inputs, new=40))
    assert cache.decode_graph.steps > 30 and names(cache) == names(theirs) and compressed_tokens(cache) > 0


def test_values_of_16_bits_are_as_they_came():
    model = tiny_llama(dtype=torch.float32)
    cache, plain = (
        new_cache(model, FadeConfig(**SMALL, middle_v_bits=16)),
        new_cache(model, FadeConfig(recent_window=None)),
    )
    for c in (cache, plain):
        generate(model, c, prompt(60), new=1)
    (keys, values), (exact_keys, exact_values) = (c.tiered[0].decode_all() for c in (cache, plain))
    assert torch.equal(values, exact_values) and not torch.equal(keys, exact_keys)
    assert compressed_tokens(cache) > 0


@pytest.mark.parametrize(
    "dtype, compiles",
    [(dtype, False) for dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16)]
    + [(dtype, True) for dtype in (torch.float16, torch.bfloat16)],  # others are never compiled
    ids=str,
)
def test_attention_over_values_of_16_bits(dtype, compiles, request):
    """Against float64. Slots without a token hold NaN and infinity."""
    draw, seeds = torch.Generator().manual_seed(0), random.Random(0)
    if compiles:
        request.getfixturevalue("uncompiled_kernels")
    for large in (1.0, 1e3):
        batch, heads, group, dim, held = 2, 2, 4, 64, seeds.randint(130, 250)
        normal = lambda *shape: torch.randn(*shape, generator=draw)  # noqa: E731
        values = (normal(batch, heads, dim, 512) * large).to(dtype)
        bound = values[..., :held].abs().amax((-2, -1)).float()
        values[..., held::3], values[..., held + 1 :: 3] = torch.nan, torch.inf
        codes = torch.randint(256, (batch, heads, 512, dim // 2), generator=draw, dtype=torch.uint8)
        scale, zero = (normal(batch, heads, 512).half() * 0.02 for _ in range(2))
        valid = (torch.arange(512) < held).expand(batch, 1, -1)
        means = torch.zeros(batch, heads, 1, dim, dtype=torch.float16)
        view = TierView(Packed(codes, scale, zero), Packed(values, None, None), bound, means, valid, 1 << 30)
        eye = torch.cat((torch.eye(dim), torch.ones(1, dim)))
        query = normal(batch, heads * group, 1, dim).to(dtype)
        dense = torch.zeros(batch, heads, 4, dim, dtype=dtype)
        nothing = torch.zeros(batch, 1, 4, dtype=torch.bool)
        output = decode.attend(
            query, dense, dense, nothing, eye, [view], bits=[(4, packed.DENSE)], slots_read=[256], scaling=0.1
        )
        numbers = torch.cat((codes & 15, codes >> 4), dim=-1)[:, :, :held].double()
        keys = numbers * scale[:, :, :held, None].double() + zero[:, :, :held, None].double()
        keys, exact = (x.repeat_interleave(group, dim=1) for x in (keys, values[..., :held].double().mT))
        exact = ((query.double() @ keys.mT * 0.1).softmax(-1) @ exact).transpose(1, 2)
        allowed = {torch.float64: 1e-6, torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}[dtype]
        assert (output.double() - exact).norm() <= allowed * exact.norm()
    assert not compiles or decode._compiled.graphs


def test_tiers_with_and_without_values_of_16_bits_cannot_be_mixed():
    with pytest.raises(ValueError, match="allowed: 16-bit values in all tiers, or in none"):
        x = torch.zeros(1, 1, 4, 64)
        matrix = torch.zeros(65, 64)
        seen = torch.ones(1, 1, 4, dtype=torch.bool)
        view = _empty_view
        decode.attend(
            x[:, :, :1],
            x,
            x,
            seen,
            matrix,
            [view(4), view(16)],
            bits=[(4, 4), (4, 16)],
            slots_read=[1, 1],
            scaling=1.0,
        )


def _empty_view(value_bits: int) -> TierView:
    scale, mean = torch.zeros(1, 1, 8, dtype=torch.float16), torch.zeros(1, 1, 1, 64, dtype=torch.float16)
    keys = Packed(torch.zeros(1, 1, 8, 32, dtype=torch.uint8), scale, scale)
    values = Packed(torch.zeros(1, 1, 32, 8, dtype=torch.uint8), scale, scale)
    if value_bits == 16:
        values = Packed(torch.zeros(1, 1, 64, 8), None, None)
    return TierView(keys, values, torch.ones(1, 1), mean, torch.ones(1, 1, 8, dtype=torch.bool), 1 << 30)


def test_nan_in_padding_does_not_reach_the_bound():
    """Values beside a NaN or an infinite one are still bounded by the largest finite one."""
    tier = RotatedTier((4, 16), torch.eye(64), INTEGER_TIERS[4], torch.float32)
    values = torch.randn(2, 3, 64, 9, generator=torch.Generator().manual_seed(0))
    most = values[..., 2:].abs().amax((-2, -1))
    values[..., 0], values[..., 1] = torch.nan, torch.inf
    bound = tier.value_bound(dict(value_codes=values))
    assert bound.isfinite().all() and (bound >= most).all() and (bound <= most * 1.001).all()
