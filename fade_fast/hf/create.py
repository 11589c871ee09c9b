"""Caches for a model: new ones, and those that were saved."""

import os

from torch import Tensor
from transformers import PreTrainedModel

from fade_ref.config import FadeConfig

from ..saved import checkpoint
from .attach import attach
from .cache import TieredKVCache
from .codebooks import Codebooks
from .models import fingerprint, unwrapped


def create_cache(
    model: PreTrainedModel,
    config: str | FadeConfig = "safe",
    *,
    max_length: int | None = None,
    policy_weights: str | os.PathLike | dict[str, Tensor] | None = None,
    codebooks: str | os.PathLike | Codebooks | dict[str, Tensor] | None = None,
    verify: bool = True,
) -> TieredKVCache:
    """A cache for `model.generate(..., cache=cache)` that compresses as it fills.

    The argument may be named `past_key_values` as well, whichever version of transformers is installed.
    Attaches our attention to the model, so that it reads compressed tokens as they are; `detach`
    undoes that. Models that do not let their attention be replaced get dense keys and values at
    every step, and a warning: their memory falls between steps, their speed does not rise.

    Args:
        model: a decoder of transformers, of any dtype and on any device, or what `torch.compile` made of it.
        config: a preset, "lossless", "safe", "balanced" or "aggressive", or a `FadeConfig`. `safe`
            keeps every token; `balanced` and `aggressive` evict by position alone, oldest first. Of
            the other policies (`plan.SUPPORTED`), those in `importance.OBSERVERS` rank tokens by the
            attention they receive: that costs some numbers a token and, in a prompt, its scores twice
            more (of `snapkv` and `tova`, those of the last queries).
        max_length: the most tokens the cache will see; room for them is made at once. By default
            the buffers grow with the text.
        policy_weights: for `eviction_policy="learned"`: a safetensors file, or its tensors, named and
            shaped as `importance.MLP` says. By default those that `fade_fast` brings, trained on
            SmolLM2-135M; what the network sees has no model's shape, so they fit any other.
        codebooks: for `quant_backend="product"`: a file that `fade train-codebook` wrote, what
            `codebooks.train` gave, or tensors named and shaped as there. They are of one model.
        verify: see `attach`.

    Raises:
        ValueError: an unknown preset, or a model or a policy that cannot be served; a policy that
            ranks by attention needs a model whose attention can be replaced; what `attach` raises.
            Codebooks that are missing, given in vain, of another model, or incomplete.
        TypeError: `model`, `config` or `codebooks` is of another type.
    """
    if isinstance(config, str):
        config = FadeConfig.preset(config)
    if not isinstance(config, FadeConfig):
        raise TypeError(f"config must be the name of a preset or a FadeConfig, not {type(config).__name__}")
    if max_length is not None and (
        isinstance(max_length, bool) or not isinstance(max_length, int) or max_length < 1
    ):
        raise ValueError(f"max_length={max_length!r}: an integer of at least 1, or None, is allowed")
    cache = TieredKVCache(model, config, max_length, policy_weights, codebooks)
    attach(model, verify=verify)
    return cache


def load_cache(
    path: str | os.PathLike,
    model: PreTrainedModel,
    *,
    max_length: int | None = None,
    policy_weights=None,
    codebooks=None,
    verify: bool = True,
) -> TieredKVCache:
    """A cache for `model` as `TieredKVCache.save` wrote it; decoding goes on to the bit.

    Args:
        path: what `save` wrote.
        model: the model it was filled by, on any device.
        max_length, policy_weights, codebooks, verify: as `create_cache` takes them; codebooks are not in the
            file, but it knows which they were.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: not such a file, damaged, of another version, of another model or other codebooks.
    """
    model, (tensors, header) = unwrapped(model), checkpoint.read(path)
    theirs, ours = header["model"], fingerprint(model)
    if theirs != ours:
        different = ", ".join(name for name in ours if theirs.get(name) != ours[name])
        raise ValueError(f"{path} was filled by another model: {different} differ")
    config = FadeConfig(**header["config"])
    options = dict(max_length=max_length, policy_weights=policy_weights, verify=verify)
    cache = create_cache(model, config, codebooks=codebooks, **options)
    cache.load_state_dict(tensors, header)
    ids = checkpoint.read_tokens(path)
    if (
        ids is not None
        and ids.dim() == 2
        and cache.token_positions.length
        and len(ids) == cache.token_positions.batch
    ):
        cache.seen.set(ids[:, : cache.token_positions.length])
    return cache
