"""One plan per KV head: each head keeps different tokens."""

import torch
from torch import Tensor

import fade_fast
from fade_fast.cache.layer import KVLayer
from fade_fast.hf.attention import attention
from fade_fast.hf.layer import PendingKV
from fade_fast.policies import plan, scores
from fade_ref.cache import LayerCache
from fade_ref.config import FadeConfig
from fade_ref.rope import Rope
from fade_ref.tiers import Tier

from .. import cases as measure
from ..case import Case, Found, relative_error

SMALL = dict(recent_window=8, block_size=4, int4_budget=10, middle_k_bits=8, middle_v_bits=8)
STEPS = [14] + [1] * 9 + [20, 5, 1, 6, 1, 30, 1, 1]


def collect() -> list[Case]:
    cases = []
    for policy in plan.SUPPORTED:
        if policy == "adaptive":  # refused, since heads would keep different numbers of tokens
            continue
        kinds = [("contiguous", 0)]
        if policy in ("h2o", "position"):
            kinds += [("original", 0), ("original", 6)]
        for positions, int2 in kinds:
            config = FadeConfig(
                **SMALL, int2_budget=int2, eviction_policy=policy, positions=positions, plan_scope="head"
            )
            name = f"{policy}, {positions}, int2_budget {int2}"
            cases.append(Case("life", "a plan for each head", name, _run(config), ("plan scope head",)))
    return cases


def survivors(layer: KVLayer, row: int, head: int) -> set[tuple[int, Tier, int]]:
    """(position, tier, read position) of each compressed token of a head in a row."""
    tokens = set()
    for tier in layer.held_tiers():
        places = layer.middle.positions_by_head(tier)[row, head].tolist()
        at = tier.records["read_at"][row, head].tolist() if layer.config.contiguous else places
        tokens |= {(p, tier.tier, r) for p, r in zip(places, at) if p >= 0}
    return tokens


def _run(config: FadeConfig):
    def run(found: Found, seed: int):
        shape = measure.Shape(batch=2, heads=3, group=2, dtype=torch.float64, device=found.device)
        model = measure._model(shape).to(shape.device)
        learned = {}
        if config.eviction_policy == "learned":
            learned = dict(layer=0, layers=1, weights=scores.load(scores.SHIPPED))
        cache = fade_fast.create_cache(model, config, policy_weights=learned.get("weights"), verify=False)
        layer, module = cache.tiered[0], model.model.layers[0].self_attn
        rope = Rope(model.model.rotary_emb.inv_freq.double().cpu())
        spec = LayerCache(config, shape.batch, shape.heads, shape.head_dim, rope, **learned)
        generator = torch.Generator().manual_seed(seed % 2**31)
        for i, count in enumerate(STEPS):
            query, keys, values = shape.random(queries=count, generator=generator)
            valid = torch.ones(shape.batch, count, dtype=torch.bool)
            valid[1, : 5 if i == 0 else 0] = False
            spec.step(query, keys, values, valid)
            query, keys, values, valid = (x.to(shape.device) for x in (query, keys, values, valid))
            exact = _plain(layer, query, keys, values, valid)
            mask = torch.ones(count, count, dtype=torch.bool, device=shape.device).tril()
            mask = None if valid.all() else mask & valid[:, None, None, :]
            arrival = PendingKV(cache.layers[0], keys, values)
            ours = attention(module, query, arrival, arrival, mask)[0].transpose(1, 2)
            real = valid[:, None, :, None].expand_as(ours)
            found.near("attention", relative_error(ours[real], exact[real].cpu()), f"step {i}")
            layer.compact()
            _same(found, layer, spec, f"step {i}")
        kept = [survivors(layer, 0, head) for head in range(shape.heads)]
        found.holds("tokens", len(kept[0]) == 10 + config.int2_budget, "budgets are used")
        by_itself = config.eviction_policy != "position"
        found.holds("tokens", (kept[0] != kept[1]) == by_itself, "heads choose for themselves")

    return run


def _same(found: Found, layer: KVLayer, spec: LayerCache, where: str) -> None:
    """Check that each head has the same tokens in the same tiers, at the same read positions."""
    for row, heads in enumerate(spec.rows):
        for head, stored in enumerate(heads):
            tokens = zip(stored.tokens, spec.read_at(stored))
            specified = {(t.position, t.tier, at) for t, at in tokens if t.tier != Tier.FP16}
            ours = survivors(layer, row, head)
            found.holds("tokens", ours == specified, f"{where}, row {row}, head {head}")
            found.bits("tokens", sorted(ours))


def _plain(layer: KVLayer, query: Tensor, keys: Tensor, values: Tensor, valid: Tensor) -> Tensor:
    """Attention [B, Hq, q, D] over all stored tokens, decoded, and the tokens of the step."""
    layer.compact()
    seen = valid[:, None, None, :] & torch.ones(valid.shape[1], valid.shape[1]).bool().tril().to(valid.device)
    if layer.length:
        parts = [(layer.dense["key"], layer.dense["value"], layer.dense_positions() >= 0)]
        parts += [(*layer.decode(t), layer.middle.position(t) >= 0) for t in layer.held_tiers()]
        held_keys, held_values, held = (torch.cat(x, dim=2) for x in zip(*parts))
        keys, values = torch.cat((held_keys, keys), dim=2), torch.cat((held_values, values), dim=2)
        seen = torch.cat((held[:, None].expand(-1, -1, seen.shape[2], -1), seen), dim=-1)
    keys, values = (x.repeat_interleave(query.shape[1] // x.shape[1], dim=1) for x in (keys, values))
    scores = (query @ keys.mT * query.shape[-1] ** -0.5).masked_fill(~seen, torch.finfo(query.dtype).min)
    return scores.softmax(-1) @ values
