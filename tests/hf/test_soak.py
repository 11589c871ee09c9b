"""A very long generation with eviction: memory, accuracy and compiled code stay what they were.

FADE_SOAK=20000 sets the number of new tokens; by default there are fewer, for a run in CI.
"""

import copy
import gc
import os
from dataclasses import replace

import pytest
import torch
from torch._dynamo.utils import counters
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

import fade_fast
from fade_fast.hf.models import CACHE_NAME
from fade_ref.config import FadeConfig

from ..cache.test_decode_graph import compiled
from ..conformance.twins import held
from ..models import prompt, tiny_llama

NEW, PART = int(os.environ.get("FADE_SOAK", 1200)), 300
SMALL = dict(recent_window=16, block_size=16, middle_k_bits=8, middle_v_bits=8, int4_budget=40)


def survivors(layer):
    """Keys and values [1, H, n, D] of all live tokens, oldest first, and their positions [n]."""
    layer.compact()
    keys, values, position = held(layer)
    order = position[0, 0].argsort()
    return keys[:, :, order], values[:, :, order], position[0, 0][order].long()


def fresh(model, ids, at):
    """Keys and values that the model's only layer makes of tokens [n], read at positions [n]."""
    layer = model.model.layers[0]
    hidden = layer.input_layernorm(model.model.embed_tokens(ids[None]))
    shape = (1, len(ids), -1, layer.self_attn.head_dim)
    keys, values = (
        make(hidden).view(shape).transpose(1, 2) for make in (layer.self_attn.k_proj, layer.self_attn.v_proj)
    )
    cos, sin = model.model.rotary_emb(hidden, at[None])
    return apply_rotary_pos_emb(keys, keys, cos, sin)[1], values


def distance(a, b):
    return ((a - b).norm() / b.norm()).item()


def alive():
    """Tensors there are, and their bytes; what only garbage holds is collected first."""
    gc.collect()
    found = [x for x in gc.get_objects() if issubclass(type(x), torch.Tensor)]
    return len(found), sum(x.untyped_storage().nbytes() for x in found)


GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")


@pytest.mark.slow
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=GPU)])
@pytest.mark.parametrize("preset", ["balanced", "aggressive"])
def test_memory_is_flat_over_calls(device, preset):
    """Several generate() on one cache that evicts: captured steps, and what comes between them."""
    config = replace(FadeConfig.preset(preset), recent_window=32, int4_budget=40, block_size=16)
    model = tiny_llama(dtype=torch.bfloat16 if device == "cuda" else torch.float64, layers=4).to(device)
    cache, sizes = fade_fast.create_cache(model, config), []
    text = prompt(120)["input_ids"].to(device)
    for _ in range(5):
        inputs = dict(input_ids=text, attention_mask=torch.ones_like(text))
        options = dict(do_sample=False, max_new_tokens=200, min_new_tokens=200)
        if device == "cpu":
            text = compiled(model, cache, inputs, new=200, min_new_tokens=200)
        else:
            text = model.generate(**inputs, **{CACHE_NAME: cache}, **options)
        memory = cache.memory()
        assert memory.tokens["EVICTED"] > 0 and cache.decode_graph.steps > 190
        positions = sum(
            x.nbytes for x in cache.token_positions.tensors()
        )  # 4 bytes a token seen, with room to spare
        assert positions <= 4 * (2 * text.shape[1] + 512)
        sizes.append(memory.allocated - positions)
    assert max(sizes) <= 1.005 * min(sizes), sizes


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize("policy", ["position", "h2o"])
def test_soak(policy):
    """After every part: keys, values and logits against a fresh run of the model on the survivors."""
    model = tiny_llama(layers=1, head_dim=32)
    cache = fade_fast.create_cache(model, FadeConfig(**SMALL, eviction_policy=policy))
    text, errors, sizes, tensors = prompt(60)["input_ids"], [], [], []
    torch._dynamo.reset()
    counters.clear()
    torch.manual_seed(7)
    for part in range(NEW // PART):
        inputs = dict(input_ids=text, attention_mask=torch.ones_like(text))
        text = compiled(model, cache, inputs, new=PART, min_new_tokens=PART, do_sample=True)
        seen = text.shape[1] - 1
        assert cache.get_seq_length() == seen == 59 + (part + 1) * PART
        twin = copy.deepcopy(cache)
        keys, values, position = survivors(twin.tiered[0])
        live = len(position)
        assert twin.memory().tokens["INT8"] == 40 and live < 4 + 40 + 32 and position.unique().numel() == live
        assert position[:4].tolist() == [0, 1, 2, 3] and position[-1] == seen - 1
        newest = position[-live + 4 :] - position[4] == torch.arange(live - 4)
        assert newest.all() == (policy == "position"), "what is kept is not what the policy keeps"
        at = torch.arange(seen - live, seen)
        exact = fresh(model, text[0, position], at)
        errors.append([distance(keys, exact[0]), distance(values, exact[1])])
        step = dict(input_ids=text[:, -1:], position_ids=torch.tensor([[seen]]))
        found = model(**step, **{CACHE_NAME: twin}, use_cache=True).logits[0, -1]
        kept = dict(
            input_ids=torch.cat((text[:, position], text[:, -1:]), dim=1),
            position_ids=torch.arange(seen - live, seen + 1)[None],
        )
        errors[-1].append(distance(found, model(**kept, use_cache=False).logits[0, -1]))
        del twin
        token_positions = sum(x.nbytes for x in cache.token_positions.tensors())
        assert token_positions <= 4 * (seen + seen // 64 + 256)
        sizes.append(cache.memory().allocated - token_positions)
        tensors.append(alive())
        graphs = counters["stats"]["unique_graphs"]
        assert graphs == 1 and not counters["graph_break"]
    print(policy, text.shape[1], "errors first, last:", errors[0], errors[-1], "bytes", sizes[0], tensors[0])
    assert len(set(sizes)) == 1, sizes
    *stored, logits = zip(*errors)
    assert all(max(kind) < 0.01 and kind[-1] < 1.3 * kind[0] for kind in stored), stored
    assert max(logits) < 0.05 and logits[-1] < 3 * max(logits[: len(logits) // 2]), logits
    assert {n for n, _ in tensors[1:]} == {tensors[1][0]}, tensors
    assert tensors[-1][1] - tensors[1][1] <= 64 * NEW  # the text, its mask and the timeline
