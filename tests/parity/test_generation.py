"""Generation inside `generate()` against a loop written by hand over the specification's cache."""

import copy

import pytest
import torch
from transformers import AttentionInterface

import fade_fast
from fade_ref.cache import LayerCache
from fade_ref.config import FadeConfig
from fade_ref.rope import Rope

from ..marks import slow_but
from ..models import SMALL, compressed_tokens, generate, prompt, tiny_llama

BUDGETS = dict(int4_budget=20, int2_budget=12)
CONFIGS = {
    "int4": FadeConfig(**SMALL),
    "k4v2": FadeConfig(**SMALL, middle_v_bits=2),
    "evict": FadeConfig(**SMALL, int4_budget=24),
    "evict, original": FadeConfig(**SMALL, **BUDGETS, positions="original"),
    "two tiers": FadeConfig(**SMALL, **BUDGETS),
    "h2o": FadeConfig(**SMALL, **BUDGETS, eviction_policy="h2o"),
    "h2o by head": FadeConfig(**SMALL, int4_budget=24, eviction_policy="h2o", plan_scope="head"),
    "knorm": FadeConfig(**SMALL, int4_budget=24, eviction_policy="knorm"),
}
NEW = 32


def by_hand(model, config, ids):
    """`NEW` greedy tokens: the model's own layers, each with a cache of the specification."""
    c = model.config
    rope = Rope(model.model.rotary_emb.inv_freq.double())
    caches = [
        LayerCache(config, len(ids), c.num_key_value_heads, c.head_dim, rope)
        for _ in range(c.num_hidden_layers)
    ]

    def attention(module, query, key, value, mask, **kwargs):
        return caches[module.layer_idx].step(query, key, value).transpose(1, 2).to(query.dtype), None

    AttentionInterface.register("by-hand", attention)
    model.set_attn_implementation("by-hand")
    part, seen, found = ids, 0, []
    with torch.no_grad():
        for _ in range(NEW):
            position = torch.arange(seen, seen + part.shape[1])[None]
            logits = model(input_ids=part, position_ids=position, use_cache=False).logits[:, -1]
            seen, part = seen + part.shape[1], logits.argmax(-1, keepdim=True)
            found.append(part)
    return torch.cat(found, dim=1), caches


@pytest.mark.parametrize("name", slow_but(CONFIGS, "two tiers"))
def test_generate_equals_a_loop_by_hand(name):
    model, inputs, config = tiny_llama(dtype=torch.float64), prompt(50, batch=2), CONFIGS[name]
    expected, specified = by_hand(copy.deepcopy(model), config, inputs["input_ids"])
    cache = fade_fast.create_cache(model, config)
    assert torch.equal(generate(model, cache, inputs, new=NEW), expected)
    assert compressed_tokens(cache) > 0
    for layer, reference in zip(cache.tiered, specified):
        for b, rows in enumerate(reference.rows):
            for h, row in enumerate(rows):
                held = [layer.middle.positions_by_head(tier)[b, h] for tier in layer.held_tiers()]
                held = sorted([*layer.dense_positions()[b, 0].tolist(), *torch.cat(held).tolist()])
                assert held == [token.position for token in row.tokens]
