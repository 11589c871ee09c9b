"""Attach a model to tiered caches, and detach it."""

import types
import warnings

from torch import Tensor
from transformers import GenerationMixin, PreTrainedModel

from fade_ref.config import FadeConfig

from . import calls
from .attention import NAME
from .cache import TieredKVCache
from .guard import plainly
from .models import unwrapped
from .verify import compare


def attach(model: PreTrainedModel, *, verify: bool = True) -> bool:
    """Let the model's attention read tiered caches; plain caches go on working under it.

    Returns whether the model dispatches its attention, and so could be attached. The setting lives
    on the model's configuration: models built from one configuration object share it.

    Args:
        model: a decoder of transformers.
        verify: first compare our attention, compressing nothing, with the model's own on 72 random
            tokens, in chunks and single steps; once for a model, and not where it is read dense.

    Raises `ValueError`, naming the layer and the error, if they differ; the model is as it was then.
    """
    model = unwrapped(model)
    if verify:
        with plainly():
            _verify(model)
    if "_fade_guard" not in model.__dict__:
        model._fade_guard = model.register_forward_pre_hook(_refuse, with_kwargs=True)
    if model.config.model_type in SWITCHING:
        model.prepare_inputs_for_generation = types.MethodType(_prepare_inputs, model)
    if model.config._attn_implementation == NAME:
        calls.attach(model)  # a copy of an attached model has lost some of it
        return True
    if not model._can_set_attn_implementation():
        warnings.warn(
            f"{type(model).__name__} does not dispatch its attention: a tiered cache hands it dense "
            "keys and values at every step, so it saves memory between steps but no time",
            stacklevel=3,
        )
        return False
    model._fade_previous = model.config._attn_implementation
    model.set_attn_implementation(NAME)
    calls.attach(model)
    return True


def _verify(model: PreTrainedModel) -> None:
    """Compare our attention with the model's own, unless that was done before."""
    own = model.__dict__.get("_fade_previous") or model.config._attn_implementation
    if own == NAME:  # attached through another model, whose configuration this one shares
        own = "sdpa" if model._supports_sdpa else "eager"
    if model.__dict__.get("_fade_verified") == own or not model._can_set_attn_implementation():
        return
    plain = FadeConfig(recent_window=None)
    try:
        TieredKVCache(model, plain)
    except ValueError:  # no cache to be had, and nothing to verify
        return
    compare(model, NAME, own, lambda: TieredKVCache(model, plain))
    model._fade_verified = own


def detach(model: PreTrainedModel) -> None:
    """Undo `attach`: the model's own attention function is back. Nothing happens without one.

    A hook stays that refuses what would go wrong with a tiered cache; it does nothing with others.
    """
    model = unwrapped(model)
    model.__dict__.pop("prepare_inputs_for_generation", None)
    previous = model.__dict__.pop("_fade_previous", None)
    if previous is not None:
        model.set_attn_implementation(previous)
    calls.detach(model)


#: Models that drop their cache, for good, when the text reaches the length where long RoPE switches.
SWITCHING = ("phi3", "phimoe", "phi4_multimodal")


def _prepare_inputs(model, input_ids, past_key_values=None, **kwargs):
    """What such a model feeds in a step, but through the same cache after the switch."""
    prepare = type(model).prepare_inputs_for_generation
    length = getattr(model.config, "original_max_position_embeddings", None)
    if not isinstance(past_key_values, TieredKVCache) or length is None or input_ids.shape[1] <= length:
        return prepare(model, input_ids, past_key_values=past_key_values, **kwargs)
    if past_key_values.get_seq_length() <= length:  # keys of the short frequencies are made anew
        past_key_values.reset()
        kwargs["next_sequence_length"] = None
    return GenerationMixin.prepare_inputs_for_generation(
        model, input_ids, past_key_values=past_key_values, **kwargs
    )


def _refuse(model, args, kwargs) -> None:
    """Refuse a step that is fed every token again on top of what the cache holds, and padding where
    the model's own attention, whose masks count columns, would read what is left after eviction."""
    cache, mask = kwargs.get("past_key_values"), kwargs.get("attention_mask")
    if not isinstance(cache, TieredKVCache):
        return
    if kwargs.get("use_cache") is False:
        raise ValueError(
            "use_cache=False with a cache would feed every token again: pass use_cache=True to generate()"
        )
    if not cache.fade_config.evicts or model.config._attn_implementation == NAME:
        return
    if isinstance(mask, Tensor) and mask.dim() == 2 and not mask.all():
        raise ValueError(
            "padding, and a cache that evicts, under the model's own attention, which cannot tell which of "
            "the tokens left are padding: fade_fast.attach(model) replaces it"
        )
