"""Tests of every family in addition to its cells: renumbered keys, refusals, one cache for one text."""

import inspect
import warnings
from dataclasses import replace

import pytest
import torch

import fade_fast
from fade_fast.hf.attach import verified
from fade_fast.hf.attention import NAME
from fade_fast.hf.layer import TieredLayer
from fade_fast.hf.models import attention_modules
from fade_fast.hf.undisturbed import undisturbed
from fade_fast.hf.verify import Verification, distance, feed
from fade_ref.config import FadeConfig

from .. import marks
from .cells import SAFE, SMALL, create
from .families import FAMILIES, KINDS
from .modes import VOCABULARY, Run, prompt
from .twins import held

SERVED = [family for family in FAMILIES.values() if not family.refused]
EVICTING = FadeConfig(**SMALL, int4_budget=8, middle_k_bits=8, middle_v_bits=8)


def named(families):
    return pytest.mark.parametrize("family", marks.named(families, *KINDS))


class Keys(Exception):
    """Stops an attention module when it passes its keys to the cache."""


class Stop:
    def update(self, keys, *args, **kwargs):
        raise Keys(keys)


def rotary(model, hidden, position, kind):
    """The angles of the rotary module of the model."""
    (module,) = (x for name, x in model.get_decoder().named_modules() if name.split(".")[-1] == "rotary_emb")
    if "layer_type" in inspect.signature(module.forward).parameters:
        return module(hidden, position, kind)
    try:
        return module(hidden, position)
    except (IndexError, RuntimeError):  # older versions need three axes
        return module(hidden, position.expand(3, *position.shape))


@named([family for family in SERVED if family.dispatches and not family.renumbers])
def test_keys_after_eviction_are_those_of_the_models_own_rotary(family):
    """Renumbered keys equal the keys of the same hidden states at the new positions, within INT8."""
    model = family.model()
    for index in family.tiered:
        cache, hidden = create(model, EVICTING), []
        attention = attention_modules(model)[index]

        def listen(module, args, kwargs, hidden=hidden):
            hidden.append(kwargs.get("hidden_states", args[0] if args else None))

        hook = attention.register_forward_pre_hook(listen, with_kwargs=True)
        Run(model, lambda cache=cache: cache).generate(prompt(batch=1), max_new_tokens=30)
        hook.remove()
        seen = torch.cat(hidden, dim=1)
        layer = cache.layers[index].kv
        layer.compact()
        keys, _, position = held(layer)
        order = position[0, 0].argsort()
        kept, length = position[0, 0][order].long(), layer.length
        assert len(kept) < length - 20, "nothing was evicted"
        states, places = seen[:, kept], torch.arange(length - len(kept), length)[None]
        angles = rotary(model, states, places, getattr(attention, "layer_type", None))
        offered = dict(
            hidden_states=states, position_embeddings=angles, attention_mask=None,
            past_key_values=Stop(), cache=Stop(), layer_past=Stop(), shared_kv_states={},
        )  # fmt: skip
        names = inspect.signature(attention.forward).parameters
        with pytest.raises(Keys) as caught, torch.no_grad():
            attention(**{name: x for name, x in offered.items() if name in names})
        expected = caught.value.args[0]
        error = (keys[:, :, order] - expected).norm(dim=-1) / expected.norm(dim=-1).mean()
        assert error.max() < 0.05, (index, error.max())


#: Families whose frequencies grow with the text: chunks have others than the whole text.
GROWING = {family.name for family in SERVED if family.state_of_batch}


@named([family for family in SERVED if family.dispatches and family.name not in GROWING])
def test_a_text_at_once_reads_what_its_chunks_would(family):
    """`KVLayer.chunk`, by which widths are measured: with the windows, softcaps, sinks and shared layers of
    each family.
    """
    model = family.model()
    config = FadeConfig(n_sink=3, recent_window=2, block_size=8, middle_k_bits=2, middle_v_bits=3)
    ids = torch.randint(3, VOCABULARY, (2, 61), generator=torch.Generator().manual_seed(5))
    found = {}
    with undisturbed(model):
        model.set_attn_implementation(NAME)
        for each in (6, 61):
            cache = create(model, config)
            for index in family.tiered if each == 61 else ():
                cache.layers[index].kv.chunk = 6
            found[each] = feed(model, cache, ids, [each] * -(-61 // each))
            assert all(cache.layers[index].kv.has_middle for index in family.tiered)
        exact = feed(model, create(model, replace(config, recent_window=None)), ids, [61])
    # Linear attention computes in float32 (Qwen3.5).
    assert distance(found[61], found[6]) < 1e-5 < 1e-3 < distance(found[61], exact)


@named([family for family in SERVED if family.renumbers or not family.dispatches])
def test_families_that_cannot_be_renumbered_say_so(family):
    words = family.renumbers if family.dispatches else "does not dispatch its attention"
    words = "no rotary embedding" if "learned" in words else words
    with pytest.raises(ValueError, match=words):
        create(family.model(), EVICTING)


@named(SERVED)
def test_use_cache_false_is_refused(family):
    """transformers would feed every token again, and the cache would contain it twice."""
    model = family.model()
    with pytest.raises(ValueError, match="use_cache=True"):
        Run(model, lambda: create(model, SAFE)).generate(prompt(), use_cache=False)


@named(SERVED)
def test_layers_tiered_are_those_the_table_names(family):
    cache = create(family.model(), SAFE)
    assert tuple(i for i, layer in enumerate(cache.layers) if isinstance(layer, TieredLayer)) == family.tiered


@named(SERVED)
def test_every_family_verifies_itself(family):
    """attach() compares outputs if it can replace the attention. It leaves no other trace."""
    model, twin = family.model(), family.model()
    state = torch.random.get_rng_state()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore" if not family.dispatches else "error", UserWarning)
        assert fade_fast.attach(model) == family.dispatches
    assert verified(model) == Verification(shapes=verified(model).shapes) and verified(model).shapes
    assert torch.equal(torch.random.get_rng_state(), state)
    fade_fast.detach(model)
    assert model.config._attn_implementation == twin.config._attn_implementation
    for (name, ours), (_, other) in zip(model.named_modules(), twin.named_modules()):
        assert ours.training == other.training and ours._buffers.keys() == other._buffers.keys(), name
        assert ours.__dict__.keys() == other.__dict__.keys(), name
        assert ours._forward_hooks.keys() == other._forward_hooks.keys(), name
        assert ours._forward_pre_hooks.keys() == other._forward_pre_hooks.keys(), name
        for buffer, x in ours._buffers.items():
            assert x is other._buffers[buffer] or torch.equal(x, other._buffers[buffer]), (name, buffer)
