"""Checks when a step enters a model. They run once, before any layer has written anything."""

import threading

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..cache import masks
from .attention import NAME
from .cache import TieredKVCache
from .models import cache_in


def before(model: PreTrainedModel, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
    """A forward pre-hook. It renames the cache argument for the model and refuses arguments that would fail.

    Raises `ValueError` in three cases: `use_cache=False`, layers that gradient checkpointing would run
    without their cache, and masks that contradict the cache.
    """
    cache = cache_in((*kwargs.values(), *args))
    if not isinstance(cache, TieredKVCache):
        return None
    changed = _renamed(model, cache, kwargs)
    if torch.compiler.is_compiling() or cache.decode_graph.active:
        return (args, changed) if changed is not kwargs else None
    if kwargs.get("use_cache") is False:
        raise ValueError(
            "use_cache=False with a cache would feed every token again: pass use_cache=True to generate()"
        )
    for module in model.modules():
        if module.training and module.__dict__.get("gradient_checkpointing"):
            raise ValueError(
                "gradient checkpointing takes the cache away from layers in training mode: call "
                "model.eval() or model.gradient_checkpointing_disable() before generating with a cache"
            )
    tokens = _tokens(args, kwargs)
    if tokens is not None:
        _check_mask(model, cache, kwargs.get("attention_mask"), tokens)
    cache.began[threading.get_ident()] = cache.get_seq_length()
    return args, changed


def after(model: PreTrainedModel, args: tuple, kwargs: dict, output) -> None:
    """A forward hook. It raises `RuntimeError` if the model did not use the given cache."""
    if torch.compiler.is_compiling():
        return
    cache = cache_in((*kwargs.values(), *args))
    start = cache.began.pop(threading.get_ident(), None) if isinstance(cache, TieredKVCache) else None
    if start is None or cache.decode_graph.active:
        return
    tokens = _tokens(args, kwargs)
    if tokens is not None and tokens.shape[1] and cache.get_seq_length() == start:
        raise RuntimeError(
            f"{type(model).__name__} did not use the cache that it was given: this forward() takes it as "
            f"{model._fade.parameter!r}; pass it under this name"
        )


def _renamed(model: PreTrainedModel, cache: TieredKVCache, kwargs: dict) -> dict:
    """Return the arguments with the cache under the name that the model's forward uses.

    The name depends on the version of transformers.
    """
    name = next((name for name, x in kwargs.items() if x is cache), None)
    known = model._fade.parameter
    if name is None or known is None or name == known:
        return kwargs
    changed = dict(kwargs)
    changed[known] = changed.pop(name)
    return changed


def _tokens(args: tuple, kwargs: dict) -> Tensor | None:
    """Return the ids [B, q] or the embeddings [B, q, hidden] of a step."""
    given = (kwargs.get("input_ids"), args[0] if args else None, kwargs.get("inputs_embeds"))
    return next((x for x in given if isinstance(x, Tensor)), None)


def _check_mask(model: PreTrainedModel, cache: TieredKVCache, mask, tokens: Tensor) -> None:
    """Refuse a mask that the cache cannot apply. generate() checks its own mask once, when it begins."""
    new = tokens.shape[1]
    if cache.decode_graph.within and new == 1:
        return
    token_positions = cache.token_positions
    if model.config._attn_implementation != NAME:
        return  # the model's own attention applies every mask
    if isinstance(mask, dict):  # one mask per kind of layer
        mask = mask.get("full_attention")
    positions = token_positions.logical if token_positions.length else None
    if isinstance(mask, Tensor):
        masks.check(mask, tokens.shape[0], new, positions)
    elif (
        mask is None
        and token_positions.length
        and token_positions.has_padding
        and not cache.decode_graph.within
    ):
        raise ValueError(
            "the cache holds rows with padding: pass the attention_mask of all tokens, cached ones included"
        )
