"""Create a new cache for a model, or load a saved cache."""

import os
from dataclasses import fields

from torch import Tensor
from transformers import PreTrainedModel

from fade_ref.config import FadeConfig

from ..compile.start import start_workers
from ..errors import known_keywords
from ..saved import checkpoint
from . import generate
from .attach import attach
from .cache import TieredKVCache
from .calibration import Calibration, of_tensors
from .models import of_process, unwrapped
from .widths import Choice, settled

FIELDS = tuple(field.name for field in fields(FadeConfig))


@known_keywords(FIELDS)
def create_cache(
    model: PreTrainedModel,
    config: str | FadeConfig = "safe",
    *,
    max_length: int | None = None,
    policy_weights: str | os.PathLike | dict[str, Tensor] | None = None,
    calibration: str | os.PathLike | Calibration | None = None,
    verify: bool = True,
) -> TieredKVCache:
    """Create a cache for `model.generate(..., cache=cache)`. The cache compresses tokens while it fills.

    The argument may also be named `past_key_values`, with every version of transformers. This function
    attaches our attention to the model, so that it reads compressed tokens directly. `detach` undoes this.
    Some models do not allow a replacement of their attention. They get dense keys and values at every step,
    and a warning. Their memory decreases between steps, but their speed does not increase.

    Every process of a tensor-parallel model calls this function. Each gets a cache of its own KV heads, and
    all keep the same tokens: policies that average over heads ask the other processes for their scores.

    Args:
        model: a decoder of transformers, of any dtype and on any device. The result of `torch.compile` for
            such a model is also allowed.
        config: a `FadeConfig`, or a preset: "lossless", "safe", "int4", "recall", "balanced" or
            "aggressive". `safe` keeps every token. At the first cache of a model, a short text measures what
            4 bits lose, and layers that lose too much get more bits (`FadeConfig.loss_bound`); `cache.choice`
            says which. `int4` has 4 bits in every layer. `recall` keeps every token, reads a part of them,
            and keeps the rest in host memory. `balanced` and `aggressive` evict by position alone, and evict
            the oldest token first. The other policies are in `plan.SUPPORTED`. The policies in
            `scores.OBSERVERS` rank tokens by the attention that the tokens receive. They store some numbers
            per token. In a prompt, they also compute the scores twice more (`snapkv` and `tova`: only the
            scores of the last queries).
        max_length: the largest number of tokens that the cache will see. The buffers for them are allocated
            at once. By default the buffers grow with the text.
        policy_weights: weights for `eviction_policy="learned"`: a safetensors file, or its tensors. `MLP` in
            `fade_ref.scores` gives their names and shapes. By default the weights of `fade_fast` are used,
            which were trained on SmolLM2-135M. The inputs of the network do not depend on the shape of a
            model, so the weights fit every model.
        calibration: a file that `fade calibrate` wrote, or a `Calibration`. It belongs to one model.
            `quant_backend="matched"`, the codec of `safe`, `int4` and `recall`, needs one: by default the
            model is calibrated at its first cache of this kind, on a short text, and the result is kept in
            the user's cache folder. Each process of a tensor-parallel model takes its heads from a file, and
            measures at each start without one. `safe` takes the widths that the file contains. A model that
            cannot read a text by itself is calibrated on the first prompt of the process; `describe()` says
            so. If its attention cannot be replaced either, these presets get the codec "rotated", and a
            `CodecWarning`.
        verify: see `attach`.

    Raises:
        ValueError: the preset is unknown, or the model or the policy is not supported. A policy that ranks by
            attention needs a model whose attention can be replaced. A calibration is from another model, or
            given although the configuration does not use it. Processes of a tensor-parallel model would hold
            parts of KV heads. `attach` can also raise `ValueError`.
        TypeError: `model`, `config` or `calibration` has another type.
    """
    if isinstance(config, str):
        config = FadeConfig.preset(config)
    if not isinstance(config, FadeConfig):
        raise TypeError(
            f"config must be the name of a preset or a FadeConfig, not {type(config).__name__}: pass 'safe', "
            "for example"
        )
    if max_length is not None and (
        isinstance(max_length, bool) or not isinstance(max_length, int) or max_length < 1
    ):
        raise ValueError(f"max_length={max_length!r}: an integer of at least 1, or None, is allowed")
    start_workers(getattr(model, "device", None))  # while the model is calibrated and verified
    config, calibration, choice = settled(model, config, calibration)
    cache = TieredKVCache(model, config, max_length, policy_weights, calibration)
    cache.choice = choice
    attach(model, verify=verify)
    return cache


@known_keywords(FIELDS)
def load_cache(
    path: str | os.PathLike,
    model: PreTrainedModel,
    *,
    max_length: int | None = None,
    policy_weights: str | os.PathLike | dict[str, Tensor] | None = None,
    verify: bool = True,
) -> TieredKVCache:
    """Load a cache for `model` from a file of `TieredKVCache.save`. Decoding continues with identical bits.

    Args:
        path: the file that `save` wrote.
        model: the model that filled the cache, on any device.
        max_length, policy_weights, verify: as in `create_cache`. The file contains the calibration.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: the file is not a saved cache, is damaged, or belongs to another version, another model or
            another process of a tensor-parallel model.
    """
    model, (tensors, header) = unwrapped(model), checkpoint.read(path)
    calibration = None
    if "calibration" in header:
        marker = checkpoint.CALIBRATION
        named = {n.removeprefix(marker): x for n, x in tensors.items() if n.startswith(marker)}
        calibration = of_tensors(named, header["calibration"])
    theirs, ours = header["model"], of_process(model)
    if theirs != ours:
        names = dict.fromkeys((*ours, *theirs))
        different = ", ".join(name for name in names if theirs.get(name) != ours.get(name))
        raise ValueError(
            f"{path} was filled by another model: {different} differ; load it with the model and the dtype "
            "that filled it"
        )
    config = FadeConfig(**header["config"])
    cache = create_cache(
        model,
        config,
        max_length=max_length,
        policy_weights=policy_weights,
        calibration=calibration,
        verify=verify,
    )
    cache.load_state_dict(tensors, header)
    cache.choice = Choice.of_json(header["widths"]) if "widths" in header else None
    ids = checkpoint.read_tokens(path)
    if (
        ids is not None
        and ids.dim() == 2
        and cache.token_positions.length
        and len(ids) == cache.token_positions.batch
    ):
        cache.seen.set(ids[:, : cache.token_positions.length])
    return cache


generate.MAKERS[generate.FADE] = create_cache
