"""Masks: whatever a step's own tokens may see of each other is obeyed; what contradicts the cache is refused.

The reference is DynamicCache where nothing is compressed, and a twin with the same codes where something is.
"""

import pytest
import torch
from transformers import DynamicCache

import fade_fast
from fade_fast.cache.masks import MaskReader
from fade_fast.hf.models import CACHE_NAME
from fade_ref.config import FadeConfig
from tests.conformance.twins import read_dense

from ..marks import pairwise, slow_but
from ..models import OFF, compressed_tokens, new_cache, prompt, tiny_llama

SMALL = dict(recent_window=8, block_size=4)
CONFIGS = {
    "int4": FadeConfig(**SMALL),
    "evict": FadeConfig(**SMALL, int4_budget=12),
    "two tiers": FadeConfig(**SMALL, int4_budget=12, int2_budget=8, positions="original"),
    "window longer than the text": FadeConfig(recent_window=500),
}
CACHED = 40
PADS = (0, 9)
#: The step's own tokens: a few, as many as a step stores first at most, and a long step.
COUNTS = (2, 7, 16, 17, 70)


def own_masks(new: int) -> dict[str, torch.Tensor]:
    """Boolean masks [2, 1, new, new] over a step's own tokens, rows different; every token sees itself."""
    generator = torch.Generator().manual_seed(new)
    causal = torch.ones(new, new, dtype=torch.bool).tril()
    random = torch.rand(2, 1, new, new, generator=generator) < 0.5
    parent = [0, *(int(torch.randint(i, (), generator=generator)) for i in range(1, new))]
    tree = torch.eye(new, dtype=torch.bool)
    for i in range(1, new):
        tree[i] |= tree[parent[i]]
    half = new // 2
    packed = causal & (torch.arange(new)[:, None] < half).eq(torch.arange(new) < half)
    image = causal.clone()
    image[: half + 1, : half + 1] = True
    eye = torch.eye(new, dtype=torch.bool)
    both = lambda *rows: torch.stack(rows)[:, None]  # noqa: E731
    return {
        "siblings": both(eye, eye),
        "a tree": both(tree, causal),
        "packed texts": both(packed, packed),
        "an image": both(image, causal),
        "random": (random & causal) | eye,
        "random, both ways": random | eye,
        "causal": both(causal, causal),
    }


def step(model, cache, ids, mask, start, position=None):
    """Logits of the tokens from column `start` on."""
    new = ids[:, start:]
    if position is None:
        position = torch.arange(start, ids.shape[1]).expand(ids.shape[0], -1)
    with torch.no_grad():
        return model(
            input_ids=new, attention_mask=mask, position_ids=position, **{CACHE_NAME: cache}, use_cache=True
        ).logits


def scenario(model, cache, own, padded, wide):
    """A prompt, a step with a mask of its own, and two ordinary steps after it."""
    new = own.shape[-1]
    inputs = prompt(CACHED + new + 2, batch=2, pads=PADS if padded else ())
    ids, real = inputs["input_ids"], inputs["attention_mask"]
    position = (real.cumsum(-1) - 1).clamp_min(0)
    end = CACHED + new
    step(model, cache, ids[:, :CACHED], real[:, :CACHED], 0, position[:, :CACHED])
    mask = own
    if wide:
        past = real[:, None, None, :CACHED].bool().expand(-1, -1, new, -1)
        mask = torch.cat((past, own), dim=-1)
    found = [step(model, cache, ids[:, :end], mask, CACHED, position[:, CACHED:end])]
    for n in (end, end + 1):
        found.append(step(model, cache, ids[:, : n + 1], real[:, : n + 1], n, position[:, n : n + 1]))
    return torch.cat(found, dim=1)


KINDS = list(own_masks(4))
QUICK = [(kind, new, True) for kind in KINDS for new in (7, 70)]


@pytest.mark.parametrize(
    "kind, new, padded", slow_but(pairwise(KINDS, COUNTS, (False, True), keep=QUICK), *QUICK)
)
def test_any_mask_over_a_steps_own_tokens_is_obeyed(kind, new, padded):
    """Without compression: what DynamicCache gives, for the step and for those after it."""
    own, model = own_masks(new)[kind], tiny_llama(dtype=torch.float64)
    expected = scenario(model, DynamicCache(config=model.config), own, padded, wide=True)
    for wide in (False, True):
        found = scenario(model, fade_fast.create_cache(model, OFF), own, padded, wide)
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


BOTH_WAYS = ("a tree", "random, both ways", "an image")
QUICK = [(kind, "evict", new, True) for kind in BOTH_WAYS for new in (7, 70)]


@pytest.mark.parametrize(
    "kind, name, new, padded",
    slow_but(pairwise(BOTH_WAYS, CONFIGS, (7, 70), (False, True), keep=QUICK), *QUICK),
)
def test_masks_are_obeyed_beside_compressed_tokens(kind, name, new, padded):
    own, model = own_masks(new)[kind], tiny_llama(dtype=torch.float64)
    cache = new_cache(model, CONFIGS[name])
    found = scenario(model, cache, own, padded, wide=False)
    assert (compressed_tokens(cache) > 0) == (name != "window longer than the text")
    causal = torch.ones_like(own).tril()
    plain = scenario(model, new_cache(model, CONFIGS[name]), causal, padded, wide=False)
    assert (found - plain).abs().max() > 1e-3, "the mask makes no difference: nothing is shown"
    with read_dense():
        expected = scenario(model, new_cache(model, CONFIGS[name]), own, padded, wide=True)
    torch.testing.assert_close(found, expected, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("policy", ["h2o", "tova"])
@pytest.mark.parametrize("first", [False, True], ids=["later step", "first step"])
def test_policies_count_the_attention_that_a_mask_allows(policy, first):
    """A token that no other may see receives nothing but its own attention."""
    model, new = tiny_llama(dtype=torch.float64), 30
    config = FadeConfig(recent_window=200, block_size=8, int4_budget=12, eviction_policy=policy)
    start = 0 if first else CACHED
    ids = prompt(start + new)["input_ids"]
    own = torch.ones(1, 1, new, new, dtype=torch.bool).tril()
    own[..., 11:, 10] = False
    cache = new_cache(model, config)
    if start:
        step(model, cache, ids[:, :start], None, 0)
    step(model, cache, ids, own, start)
    layer = cache.tiered[0]
    if policy == "h2o":
        queries = layer.dense["queries"][0, 0, start:].tolist()
        assert queries == [1 if i == 10 else new - i for i in range(new)]
    else:  # the newest query alone counts, and it could not see the token
        scores = layer.observer.score({name: layer.dense[name] for name in layer.observer.fields})
        scores = scores[0, :, start:].nan_to_num(0.0)
        assert not scores[:, 10].any() and scores[:, 9].all()


@pytest.mark.parametrize("name", ["off", "int4"])
@pytest.mark.parametrize("new", (1, 5, 30))
def test_masks_that_contradict_the_cache_are_refused_before_anything_is_written(name, new):
    model = tiny_llama(dtype=torch.float64)
    config = OFF if name == "off" else CONFIGS[name]
    inputs = prompt(CACHED + new, batch=2, pads=PADS)
    ids, real = inputs["input_ids"], inputs["attention_mask"]

    def filled():
        cache = new_cache(model, config)
        step(
            model, cache, ids[:, :CACHED], real[:, :CACHED], 0, (real.cumsum(-1) - 1).clamp_min(0)[:, :CACHED]
        )
        return cache

    hides, shows = real.clone(), real.clone()
    hides[1, 20], shows[1, 3] = 0, 1
    own = torch.ones(2, 1, new, new, dtype=torch.bool).tril()
    wide = torch.cat((real[:, None, None, :CACHED].bool().expand(-1, -1, new, -1), own), dim=-1)
    wide_hides = wide.clone()
    wide_hides[1, 0, -1, 20] = False
    wrong = {
        "hides a cached token": hides,
        "shows padding": shows,
        "all real": torch.ones_like(real),
        "too short": real[:, :-1],
        "new tokens only": real[:, CACHED:],
        "too long": torch.cat((real, real[:, -1:]), dim=1),
        "4-D, hides a cached token from one query": wide_hides,
        "4-D, too narrow": wide[..., 1:],
        "4-D, too many queries": torch.cat((wide, wide), dim=2),
        "4-D, a bias": torch.zeros(wide.shape, dtype=torch.float64),
        "4-D, of heads": wide.expand(-1, 4, -1, -1),
    }
    cache = filled()
    before = cache.state_dict()
    for what, mask in wrong.items():
        with pytest.raises(ValueError, match="mask"):
            step(model, cache, ids, mask, CACHED)
        assert cache.get_seq_length() == CACHED, what
        after = cache.state_dict()
        assert all(torch.equal(x, after[0][key]) for key, x in before[0].items()) and after[1] == before[1]
    with pytest.raises(ValueError, match="pass the attention_mask"):
        step(model, cache, ids, None, CACHED)
    # The cache goes on as if nothing had been.
    position = (real.cumsum(-1) - 1)[:, CACHED:]
    expected = step(model, filled(), ids, real, CACHED, position)
    assert torch.equal(step(model, cache, ids, real, CACHED, position), expected)


@pytest.mark.parametrize("chunk", [None, 12])
def test_generate_refuses_masks_that_contradict_the_cache(chunk):
    model, inputs = tiny_llama(), prompt(60)
    cache = new_cache(model, CONFIGS["int4"])
    model.generate(**{k: x[:, :40] for k, x in inputs.items()}, cache=cache, max_new_tokens=1)
    inputs["attention_mask"][:, 10:20] = 0
    with pytest.raises(ValueError, match="contradicts the cache: of row 0, token 10"):
        model.generate(**inputs, cache=cache, max_new_tokens=4, prefill_chunk_size=chunk)
    assert cache.get_seq_length() == 40


def test_a_mask_is_judged_once_a_step(monkeypatch):
    """All layers are given one mask; it may be as large as the square of a prompt."""
    model, seen = tiny_llama(layers=4), []
    read = MaskReader.read

    def watched(self, *args):
        result = read(self, *args)
        seen.append(result.verdict)
        return result

    cache, inputs = new_cache(model, CONFIGS["int4"]), prompt(30, batch=2, pads=PADS)
    monkeypatch.setattr(MaskReader, "read", watched)
    model(**inputs, **{CACHE_NAME: cache})
    assert len(seen) == 4 and all(verdict is seen[0] for verdict in seen)


def test_right_padding_is_padding():
    """A row that ends earlier, as libraries pad for training, is as it would be alone."""
    model = tiny_llama(dtype=torch.float64)
    ids, real = prompt(30, batch=2)["input_ids"], torch.ones(2, 30, dtype=torch.long)
    real[1, 20:] = 0
    cache = new_cache(model, CONFIGS["int4"])
    together = step(model, cache, ids, real, 0)
    alone = step(model, new_cache(model, CONFIGS["int4"]), ids[1:, :20], None, 0)
    torch.testing.assert_close(together[1:, :20], alone, rtol=1e-9, atol=1e-9)
    assert int((cache.token_positions.logical[1] < 0).sum()) == 10
