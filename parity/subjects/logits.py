"""Logits of a one-layer model in its dtype, compared with float64 logits after the specified attention."""

import copy
from collections.abc import Iterator

import torch
from transformers import AttentionInterface, LlamaConfig, LlamaForCausalLM

import fade_fast
import fade_fast.hf.attention as fast
from fade_fast.hf.layer import PendingKV
from fade_fast.hf.models import CACHE_NAME
from fade_ref.cache import LayerCache
from fade_ref.rope import Rope

from .. import cases as measure
from ..case import Draw, relative_error

CHUNKS = [20, 1, 1, 18, 1, 5, 1]


def logits(config, dtype, device, seed) -> Iterator[tuple[str, float]]:
    """Yield the relative error of the logits of each step. Both models use the same queries and codes."""
    torch.manual_seed(seed % 2**31)
    heads, dim = 2, 64
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=64, hidden_size=64, intermediate_size=96, num_hidden_layers=1, head_dim=dim,
            num_attention_heads=2 * heads, num_key_value_heads=heads, initializer_range=0.2,
        )
    ).to(dtype).to(device).eval()  # fmt: skip
    cache = fade_fast.create_cache(model, config, verify=False)
    layer = cache.tiered[0]
    rope = Rope(model.model.rotary_emb.inv_freq.double().cpu())
    empty = LayerCache(config, 2, heads, dim, rope)
    wide = copy.deepcopy(model).double().cpu()
    seen = []

    def exact(module, query, key, value, mask, **kwargs):
        """The output of the specification for the last attention of the fast model."""
        return seen[-1].transpose(1, 2), None

    def watch(module, query, key, value, mask, **kwargs):
        if isinstance(key, PendingKV):
            layer.compact()
            twin = measure.mirror(layer, empty) if layer.length else copy.deepcopy(empty)
            seen.append(twin.step(*(x.cpu() for x in (query, key.keys, key.values))))
        return fast.attention(module, query, key, value, mask, **kwargs)

    AttentionInterface.register("parity-exact", exact)
    wide.set_attn_implementation("parity-exact")
    ids = Draw(seed).integers(0, 64, 2, sum(CHUNKS))
    AttentionInterface.register(fast.NAME, watch)
    try:
        for i, part in enumerate(ids.split(CHUNKS, dim=1)):
            ours = model(input_ids=part.to(device), **{CACHE_NAME: cache}, use_cache=True).logits
            specified = wide(input_ids=part, use_cache=False).logits
            yield f"step {i}: {part.shape[1]}", relative_error(ours, specified)
    finally:
        AttentionInterface.register(fast.NAME, fast.attention)
